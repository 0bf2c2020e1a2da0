"""The paper's objective: content, style and total variation under one roof."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastperc import ops, reference
from fastperc.models.common import unwrapped
from fastperc.models.image_range import check_range
from fastperc.models.vgg import LAYERS, VGG16Features, layer_names
from fastperc.modules import TVLoss
from fastperc.modules.norms import WideStatistics
from fastperc.presets import CONVENTIONS


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


class PerceptualLoss(WideStatistics):
    """Content, style and total variation of an image, as one weighted sum (paper, equation 5).

    ``forward(output, content)`` takes RGB images in 0–1 [N, 3, H, W] and returns :class:`PerceptualTerms`. Gradients
    flow to ``output`` only. It raises a ``ValueError`` if ``content`` has another range, and warns once of ``output``.

    Args:
        features: the loss network, built with the layers named here.
        style: the painting, RGB in 0–1 [1, 3, H, W]; its Gram matrices are taken once. ``None``: no style term, as in
            super-resolution.
        content_layer: φ of the content term.
        style_layers: one Gram term each; a dict gives each term's weight by layer. Default: every layer of
            ``features``, with weight 1.
        convention: what the weights multiply: ``"relative"``, ``"paper"`` or ``"means"``; see ``CONVENTIONS``. The
            default makes each term relative to the size of its target, so that it is about 1 for any VGG and style.
        content_weight, style_weight, tv_weight: default to the convention's.

    Raises:
        ValueError: unknown convention; a layer that ``features`` was not built with; a weight that is no finite number
            from 0 up; a style that is not one painting.
    """

    style_scales: Tensor

    def __init__(
        self,
        features: VGG16Features,
        style: Tensor | None = None,
        *,
        content_layer: str = "relu2_2",
        style_layers: Iterable[str] | Mapping[str, float] | None = None,
        convention: str = "relative",
        content_weight: float | None = None,
        style_weight: float | None = None,
        tv_weight: float | None = None,
    ) -> None:
        super().__init__()
        if convention not in CONVENTIONS:
            raise ValueError(f"convention must be one of {', '.join(CONVENTIONS)}, got {convention!r}")
        defaults = CONVENTIONS[convention]
        if isinstance(style_layers, Mapping):
            check_weights(style_layers)
        self.convention = convention
        self.content_weight = defaults["content_weight"] if content_weight is None else content_weight
        self.style_weight = defaults["style_weight"] if style_weight is None else style_weight
        self.tv_weight = defaults["tv_weight"] if tv_weight is None else tv_weight

        self.features = features = unwrapped(features)
        self.content_layer = content_layer
        self.style_layers = () if style is None else layer_names(style_layers or features.layers)
        if not isinstance(content_layer, str):
            raise ValueError(f"content_layer must be one name such as 'relu2_2', got {content_layer!r}")
        if style is not None and (not isinstance(style, Tensor) or style.dim() != 4 or style.shape[:2] != (1, 3)):
            got = f"shape {list(style.shape)}" if isinstance(style, Tensor) else type(style).__name__
            raise ValueError(f"style must be one painting, a tensor of RGB in 0–1 [1, 3, H, W], got {got}")
        missing = [layer for layer in (content_layer, *self.style_layers) if layer not in features.layers]
        if missing:
            raise ValueError(f"the loss network was built without {', '.join(missing)}")
        self.tv_loss = TVLoss(reduction="mean" if convention == "relative" else "sum")
        scales = [features.mean.new_zeros(0)]
        for layer, activation in ({} if style is None else self.style_features(style)).items():
            gram = reference.gram_matrix(activation)
            self.register_buffer(f"gram_{layer}", gram)
            size: Any = {"paper": 1.0, "means": gram.numel(), "relative": gram.square().sum()}[convention]
            weight = style_layers[layer] if isinstance(style_layers, Mapping) else 1.0
            scales.append(weight / (gram.new_ones(1) * size))
        self.register_buffer("style_scales", torch.cat(scales))

    @torch.no_grad()
    def style_features(self, style: Tensor) -> dict[str, Tensor]:
        """The painting's activations at the style layers, in their order."""
        features = self.features(style, self.style_layers)
        return {layer: features[layer] for layer in self.style_layers}

    def forward(self, output: Tensor, content: Tensor) -> PerceptualTerms:
        check_range("the loss's output", output, computed=True)
        check_range("the loss's content", content)
        grams = {LAYERS.index(layer): self.get_buffer(f"gram_{layer}") for layer in self.style_layers}
        normalized = self.features.normalized
        terms = ops.vgg_loss(
            normalized(output), normalized(content), self.features.frozen(), LAYERS.index(self.content_layer), grams
        )
        content_term = terms.content / terms.target_square if self.convention == "relative" else terms.content
        style_term = (terms.style * self.style_scales).sum()
        tv_term = self.tv_loss(output)
        if self.convention == "paper":
            tv_term = tv_term * 255**2 / max(output.shape[0], 1)
        elif self.convention == "means":
            tv_term = tv_term * 255**2 / 2

        content_term = self.content_weight * content_term
        style_term = self.style_weight * style_term
        tv_term = self.tv_weight * tv_term
        return PerceptualTerms(content_term + style_term + tv_term, content_term, style_term, tv_term)
