"""Perceptual losses: content, style and total variation of images under a fixed VGG, as one weighted sum."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Literal, NamedTuple, TypedDict

import torch
from torch import Tensor, nn

from fastperc import backends, ops, reference
from fastperc.models.common import unwrapped
from fastperc.models.image_range import RANGES, check_range
from fastperc.models.vgg import VGGFeatures, check_images, layer_names
from fastperc.modules import TVLoss
from fastperc.modules.norms import WideStatistics
from fastperc.ops.vgg_terms import CRITERIA, ContentTerm, GramTerm, Term, gram_size, shape_at
from fastperc.presets import CONVENTIONS, PLAIN_CONVENTION

if TYPE_CHECKING:
    from typing_extensions import Unpack

CONTENT_LAYER = "relu2_2"  # the default: the paper's
FROBENIUS = "fro"  # the criterion that is the root of the batch's sum of squares, as BasicSR has it


class FeatureLoss(nn.Module):
    """``weight`` · ‖x − target‖² / (C·H·W), averaged over the batch (paper, equation 2).

    Equivalent to ``weight * F.mse_loss(x, target)`` in float32. Both are [N, C, H, W]; returns a scalar, float32 or
    wider.

    Raises:
        ValueError: on forward, when the shapes differ.
    """

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        if x.shape != target.shape:
            raise ValueError(f"{type(self).__name__} needs equal shapes, got {list(x.shape)} and {list(target.shape)}")
        return self.weight * reference.feature_loss(x, target)

    def extra_repr(self) -> str:
        return f"weight={self.weight}"


class PixelLoss(FeatureLoss):
    """``weight`` · ‖ŷ − y‖² / (C·H·W), averaged over the batch: :class:`FeatureLoss` on the images themselves."""


def check_weights(weights: Mapping[str, float]) -> None:
    """Raises a ``ValueError`` unless the weights, by name, are finite numbers from 0 up."""
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, Real) or not 0 <= weight < math.inf:
            raise ValueError(f"the weight of {name} must be a finite number from 0 up, got {weight!r}")


class PerceptualTerms(NamedTuple):
    """The weighted terms of a :class:`PerceptualLoss` and their sum; scalars."""

    total: Tensor
    content: Tensor
    style: Tensor
    tv: Tensor


class Criteria(NamedTuple):
    """The criteria of the content terms and of the Gram terms."""

    content: str
    gram: str


class Options(TypedDict, total=False):
    """The other arguments of :class:`PerceptualLoss`."""

    content_layer: str
    content_weight: float | None
    style_weight: float | None
    tv_weight: float | None


class PerceptualLoss(WideStatistics):
    """Content, style and total variation of an image, as one weighted sum (paper, equation 5).

    ``forward(output, content)`` takes RGB images [N, 3, H, W] and returns :class:`PerceptualTerms`. Gradients flow to
    ``output`` only, unless asked for. It raises a ``ValueError`` if ``content`` has another range, and warns once of
    ``output``.

    Args:
        features: the loss network, built with the layers named here.
        style: the painting, RGB in ``input_range`` [1, 3, H, W]; its Gram matrices are taken once. ``"target"``: the
            Gram matrices are those of ``content``, image by image. ``None``: no style term, as in super-resolution.
        content_layers: one content term each; a dict gives each term's weight by layer; ``()``: no content term.
            Default: ``content_layer``.
        style_layers: one Gram term each, likewise. Default: every layer of ``features``, with weight 1.
        criterion: how features are compared, and Gram matrices likewise: ``"l2"`` (squares), ``"l1"``, ``"smooth_l1"``
            or ``"fro"`` (the root of the sum of squares over all of the batch). :class:`Criteria` names two.
        convention: what the weights multiply: ``"relative"``, ``"paper"``, ``"means"`` or ``"plain"``; see
            ``CONVENTIONS`` and ``PLAIN_CONVENTION``. The default makes each term relative to the size of its target, so
            that it is about 1 for any VGG and style. ``"plain"`` is for losses without a painting: means, with weights
            of 1 and no total variation.
        input_range: that of the images: ``(0, 1)`` or ``(-1, 1)``.
        options: ``content_layer``, one name (default ``"relu2_2"``); ``content_weight``, ``style_weight`` and
            ``tv_weight`` (default: the convention's).

    Raises:
        ValueError: an unknown convention, criterion or range; a layer that ``features`` was not built with; a weight of
            a layer that is no finite number from 0 up; a style that is not one painting.
    """

    style_scales: Tensor

    def __init__(
        self,
        features: VGGFeatures,
        style: Tensor | Literal["target"] | None = None,
        *,
        content_layers: Iterable[str] | Mapping[str, float] | None = None,
        style_layers: Iterable[str] | Mapping[str, float] | None = None,
        criterion: str | Criteria = "l2",
        convention: str = "relative",
        input_range: tuple[float, float] = (0.0, 1.0),
        **options: Unpack[Options],
    ) -> None:
        super().__init__()
        self._set_weights(convention, options)
        self.criteria = Criteria(criterion, criterion) if isinstance(criterion, str) else Criteria(*criterion)
        if unknown := [name for name in self.criteria if name not in (*CRITERIA, FROBENIUS)]:
            raise ValueError(f"criterion must be one of {', '.join((*CRITERIA, FROBENIUS))}, got {unknown[0]!r}")
        if tuple(input_range) not in RANGES:
            raise ValueError(f"input_range must be (0, 1) or (-1, 1), got {input_range!r}")
        self.input_range = float(input_range[0]), float(input_range[1])

        self.features = features = unwrapped(features)
        if content_layers is None:
            content_layers = checked_content_layer(options.get("content_layer", CONTENT_LAYER))
        self.content_layers = weighted_layers(content_layers)
        style_layers = features.layers if style_layers is None else style_layers
        self.style_layers = {} if style is None else weighted_layers(style_layers)
        check_style(style)
        missing = [layer for layer in (*self.content_layers, *self.style_layers) if layer not in features.layers]
        if missing:
            raise ValueError(f"the loss network was built without {', '.join(missing)}")
        self.style_is_target = isinstance(style, str)
        self.tv_loss = TVLoss(reduction="mean" if convention in ("relative", "plain") else "sum")
        scales = [features.mean.new_zeros(0)]
        if isinstance(style, Tensor):
            scales += self._keep_grams(style)
        self.register_buffer("style_scales", torch.cat(scales))

    def _set_weights(self, convention: str, options: Options) -> None:
        """Takes the weights of the terms, by default those of ``convention``."""
        conventions = {**CONVENTIONS, "plain": PLAIN_CONVENTION}
        if convention not in conventions:
            raise ValueError(f"convention must be one of {', '.join(conventions)}, got {convention!r}")
        if unknown := [name for name in options if name not in Options.__annotations__]:
            raise TypeError(f"PerceptualLoss has no argument {unknown[0]!r}")
        self.convention = convention
        given = {name: weight for name, weight in options.items() if name.endswith("_weight") and weight is not None}
        weights: dict[str, float] = {**conventions[convention], **given}  # type: ignore[dict-item]
        self.content_weight, self.style_weight = weights["content_weight"], weights["style_weight"]
        self.tv_weight = weights["tv_weight"]

    def _keep_grams(self, style: Tensor) -> list[Tensor]:
        """Registers the Gram matrices of the painting, and returns the scale [1] of each layer's term."""
        scales = []
        for layer, activation in self.style_features(style).items():
            gram = reference.gram_matrix(activation)
            self.register_buffer(f"gram_{layer}", gram)
            size: Tensor | float = self._gram_size(gram.shape[1])
            if self.convention == "relative":
                criterion = self.criteria.gram
                size = as_norm(gram_size(gram, summed(criterion)), 1, criterion)
            scales.append(self.style_layers[layer] / (gram.new_ones(1) * size))
        return scales

    @torch.no_grad()
    def style_features(self, style: Tensor) -> dict[str, Tensor]:
        """The painting's activations at the style layers, in their order."""
        check_range("the loss's style", style, limits=self.input_range)
        features = self.features(self._in_0_to_1(style), self.style_layers)
        return {layer: features[layer] for layer in self.style_layers}

    def forward(self, output: Tensor, content: Tensor, *, content_gradient: bool = False) -> PerceptualTerms:
        """The terms of ``output`` against ``content``, the target. 0 for an empty batch.

        Args:
            output, content: RGB in ``input_range`` [N, 3, H, W].
            content_gradient: whether gradients flow to ``content`` too. That takes about the memory of plain PyTorch's
                features at the layers, and of a second network's masks.

        Raises:
            ValueError: another shape or range; images smaller than the network's poolings.
        """
        check_images(output)
        check_images(content)
        check_range("the loss's output", output, computed=True, limits=self.input_range)
        check_range("the loss's content", content, computed=content_gradient, limits=self.input_range)
        if not content_gradient and (terms := self._kernels_terms(output, content)) is not None:
            return terms
        output = self._in_0_to_1(output)
        content_term, style_term = self._feature_terms(output, self._in_0_to_1(content), content_gradient)
        content_term = self.content_weight * content_term
        style_term = self.style_weight * style_term
        tv_term = self._tv_term(output)
        return PerceptualTerms(content_term + style_term + tv_term, content_term, style_term, tv_term)

    def _kernels_terms(self, output: Tensor, content: Tensor) -> PerceptualTerms | None:
        """The terms by ``ops.loss_terms``, where that can serve them."""
        if output.device.type == "cpu" and backends.forced() != "triton":  # where Triton's interpreter serves tests
            return None
        contents, styles = self._computed_layers()
        if self.input_range != (0, 1) or FROBENIUS in self.criteria or (self.style_is_target and styles):
            return None
        taps = self.features.taps((*contents, *styles))
        terms: list[Term] = [ContentTerm(taps[layer], self.criteria.content) for layer in contents]
        terms += [GramTerm(taps[layer], self.criteria.gram, self.get_buffer(f"gram_{layer}")) for layer in styles]
        loss = ops.LossTerms(
            self.features.frozen(),
            self.features.mean,
            self.features.std,
            terms,
            self.content_weight * next(iter(contents.values()), 0.0),
            self.style_weight,
            self.style_scales if styles else None,
            self.tv_weight * self._tv_factor(output),
            self.convention == "relative",
        )
        if ops.why_not_loss_terms(output, content, loss):
            return None
        return PerceptualTerms(*ops.loss_terms(output, content, loss))

    def _computed_layers(self) -> tuple[Mapping[str, float], Mapping[str, float]]:
        """The weights of the content and of the Gram terms by layer; those of a weight of 0 are not computed."""
        return self.content_layers if self.content_weight else {}, self.style_layers if self.style_weight else {}

    def _tv_factor(self, output: Tensor) -> float:
        """What multiplies the sum of squares of neighbours' differences, beside the weight."""
        if self.convention in ("relative", "plain"):
            return 1 / max(output.numel(), 1)
        return 255**2 / (max(output.shape[0], 1) if self.convention == "paper" else 2)

    def _in_0_to_1(self, x: Tensor) -> Tensor:
        return x if self.input_range == (0, 1) else (reference.widen(x) + 1) / 2

    def _feature_terms(self, output: Tensor, content: Tensor, content_gradient: bool) -> tuple[Tensor, Tensor]:
        """The content and the style term, without their weights; those with a weight of 0 are not computed."""
        contents, styles = self._computed_layers()
        taps = self.features.taps((*contents, *styles))
        terms: list[Term] = [ContentTerm(taps[layer], summed(self.criteria.content)) for layer in contents]
        for layer in styles:
            gram = None if self.style_is_target else self.get_buffer(f"gram_{layer}")
            terms.append(GramTerm(taps[layer], summed(self.criteria.gram), gram))
        content_term = style_term = None
        if not terms:
            zero = zero_term(output)
            return zero, zero
        convs, normalized = self.features.frozen(), self.features.normalized
        relative = self.convention == "relative" and (bool(contents) or self.style_is_target)
        values, sizes = ops.vgg_loss(normalized(output), normalized(content), convs, terms, relative, content_gradient)
        number = len(contents)
        content_values, gram_values = values.split([number, len(terms) - number])
        if contents:
            counts = [math.prod(shape_at(taps[layer], convs, output.shape)) for layer in contents]
            parts = [Part(weight, count) for weight, count in zip(contents.values(), counts)]
            content_term = self._sum(content_values, sizes[:number], parts, self.criteria.content)
        if self.style_is_target and styles:
            channels = [shape_at(taps[layer], convs, output.shape)[1] for layer in styles]
            parts = [Part(weight / self._gram_size(c), len(output)) for weight, c in zip(styles.values(), channels)]
            style_term = self._sum(gram_values, sizes[number:], parts, self.criteria.gram)
        elif styles:
            style_term = (as_norm(gram_values, len(output), self.criteria.gram) * self.style_scales).sum()
        content_term = zero_term(output) if content_term is None else content_term
        return content_term, zero_term(output) if style_term is None else style_term

    def _sum(self, values: Tensor, sizes: Tensor, parts: Sequence[Part], criterion: str) -> Tensor:
        """The weighted sum of ``values`` [terms], under ``"relative"`` over their ``sizes``."""
        total = None
        for i, (value, (weight, numbers)) in enumerate(zip(values.unbind(), parts)):
            value = as_norm(value, numbers, criterion)
            if self.convention == "relative" and numbers:
                value = value / as_norm(sizes[i], numbers, criterion)
            value = value if weight == 1 else weight * value
            total = value if total is None else total + value
        assert total is not None
        return total

    def _gram_size(self, channels: int) -> int:
        """What a Gram term is divided by, whatever its target."""
        is_mean = self.convention in ("means", "plain") and self.criteria.gram != FROBENIUS
        return channels**2 if is_mean else 1

    def _tv_term(self, output: Tensor) -> Tensor:
        """The total variation of ``output`` in 0–1, weighted.

        In style transfer it is computed with a weight of 0 too: it shows pixels that are not finite.
        """
        if not self.tv_weight and self.convention == "plain":
            computed = (self.content_weight and self.content_layers) or (self.style_weight and self.style_layers)
            zero = output.new_zeros(()) if computed else 0 * output.sum()  # which has a gradient, as a loss has
            return zero.to(torch.promote_types(zero.dtype, torch.float32))
        tv_term = self.tv_loss(output)
        if self.convention == "paper":
            tv_term = tv_term * 255**2 / max(output.shape[0], 1)
        elif self.convention == "means":
            tv_term = tv_term * 255**2 / 2
        return self.tv_weight * tv_term


class Part(NamedTuple):
    """A term of a sum."""

    weight: float
    numbers: int  # whose squares "fro" sums, for each that the term's value sums


def zero_term(output: Tensor) -> Tensor:
    """The value of a term of ``output`` that is not computed."""
    return output.new_zeros((), dtype=torch.promote_types(output.dtype, torch.float32))


def summed(criterion: str) -> str:
    """The criterion of the sum that ``criterion`` is computed from."""
    return "l2" if criterion == FROBENIUS else criterion


def as_norm(value: Tensor, count: int, criterion: str) -> Tensor:
    """For ``"fro"`` the root of ``value`` · ``count``, with a gradient of 0 at 0; for others ``value``."""
    if criterion != FROBENIUS:
        return value
    square = value * count
    is_zero = square == 0
    return torch.where(is_zero, 1.0, square).sqrt() * ~is_zero


def weighted_layers(layers: Iterable[str] | Mapping[str, float]) -> dict[str, float]:
    """The weight of each of ``layers``, by name: 1 unless it is given.

    Raises:
        ValueError: something that is no name, or a weight that is no finite number from 0 up.
    """
    if isinstance(layers, Mapping):
        check_weights(layers)
        return {layer: layers[layer] for layer in layer_names(layers)}
    return dict.fromkeys(layer_names(layers), 1.0)


def checked_content_layer(layer: object) -> tuple[str]:
    """The single ``layer``. Raises a ``ValueError`` if it is no name."""
    if not isinstance(layer, str):
        raise ValueError(
            f"content_layer must be one name such as 'relu2_2', got {layer!r}; content_layers takes several"
        )
    return (layer,)


def check_style(style: object) -> None:
    """Raises a ``ValueError`` unless ``style`` is one painting, ``"target"`` or ``None``."""
    if style is None or (isinstance(style, str) and style == "target"):
        return
    if not isinstance(style, Tensor) or style.dim() != 4 or style.shape[:2] != (1, 3):
        got = f"shape {list(style.shape)}" if isinstance(style, Tensor) else type(style).__name__
        raise ValueError(f"style must be one painting (or 'target'), a tensor of RGB in 0–1 [1, 3, H, W], got {got}")
