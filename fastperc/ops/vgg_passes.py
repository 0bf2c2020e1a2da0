"""The passes of a VGG loss between convolutions and at taps: in C++ and plain PyTorch, and as Triton kernels."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastperc import _native, kernels, reference
from fastperc.ops.vgg_chain import Passes, SavedLayer, mask, unpool
from fastperc.types import Tap

# The gradient of a content term is this much, over the number of elements, of its slopes.
SLOPE_FACTORS = {"l2": 2.0, "l1": 1.0, "smooth_l1": 1.0}


class Content(NamedTuple):
    """What the backward of a content term needs."""

    position: int  # among the terms
    criterion: str
    saved: Tensor  # [n, C, H, W]: the slopes, see ``slopes_``, or, if the pass says so, the target's maps


class Style(NamedTuple):
    """What the backward of a Gram term needs; see :func:`fastperc.ops.gram_loss.gram_loss_fwd`."""

    delta: Tensor  # half of the sum's slopes, in the form of the backend
    scale: Tensor  # [1]
    position: int  # among the terms
    backend: str  # of ``fastperc.ops.gram_loss.KERNELS``


class SavedTap(NamedTuple):
    """What the backward of the terms at a tap needs."""

    tap: Tap
    maps: list[Tensor]  # [n, C, H, W]: the output's, if a term needs them; emptied by their use
    contents: list[Content]  # emptied by their use
    styles: list[Style]


class Compared(NamedTuple):
    """A content term of some images."""

    value: Tensor  # scalar
    size: Tensor | None  # scalar: against zeros
    saved: Tensor  # for ``Content``


def slopes_(difference: Tensor, criterion: str) -> Tensor:
    """The derivatives of each element's distance by ``difference``, over ``SLOPE_FACTORS``; changes ``difference``."""
    if criterion == "l2":
        return difference
    return difference.sign_() if criterion == "l1" else difference.clamp_(-1, 1)


class NativePasses:
    """The passes between the convolutions and at the taps, in C++ and plain PyTorch."""

    passes: Passes = _native
    keeps_maps = False  # whether the backward of a content term needs the output's maps

    def compare(self, x: Tensor, target: Tensor, criterion: str, sized: bool) -> Compared:
        """The mean distance between ``x`` and ``target``, and, if ``sized``, between ``target`` and zeros; overwrites
        ``target`` with the slopes."""
        # Not mse_loss, which takes the memory twice, nor vector_norm, which adds millions of float32 one by one.
        size = reference.distances(reference.widen(target), criterion).mean() if sized else None
        if target.dtype in (torch.float32, torch.float64):
            difference = torch.sub(x, target, out=target)
        else:
            difference = reference.widen(x) - reference.widen(target)
        value = reference.distances(difference, criterion).mean()
        slopes = slopes_(difference, criterion)
        return Compared(value, size, target if slopes is target else target.copy_(slopes))

    def slopes(self, x: Tensor | None, content: Content) -> Tensor:
        """The slopes of a content term, in memory that nothing else uses any more."""
        return content.saved

    def tap_gradient(self, saved: SavedTap, grads: Tensor, layer: SavedLayer, above: Tensor | None) -> Tensor:
        """The gradient at a tap (after a ReLU: before it); it may overwrite ``above``. ``grads`` [terms] are those of
        the terms."""
        after_relu = saved.tap.kind == "relu"
        grad = unpool(above, layer, self.passes) if above is not None and after_relu else above
        x = saved.maps.pop() if saved.maps else None
        for style in saved.styles:
            assert x is not None
            grad = torch.zeros_like(x) if grad is None else grad
            slope = style.delta * (grads[style.position] * (4 / x.numel()))
            if grad.dtype == slope.dtype:
                grad.flatten(2).baddbmm_(slope, x.flatten(2))
            else:
                grad += torch.bmm(slope, reference.widen(x).flatten(2)).view_as(x)
        while saved.contents:
            content = saved.contents.pop()
            slopes = self.slopes(x, content)
            slopes.mul_(grads[content.position] * (SLOPE_FACTORS[content.criterion] / slopes.numel()))
            grad = slopes if grad is None else grad.add_(slopes)
        assert grad is not None
        if after_relu and x is not None:
            torch.ops.aten.threshold_backward.grad_input(grad, x, 0, grad_input=grad)
        elif after_relu:
            mask(grad, layer, self.passes)
        return grad


class TritonPasses(NativePasses):
    """The same as Triton kernels."""

    keeps_maps = True

    @property
    def passes(self) -> Passes:  # type: ignore[override]
        return kernels.vgg_loss

    def compare(self, x: Tensor, target: Tensor, criterion: str, sized: bool) -> Compared:
        """As in :class:`NativePasses`; the target stays as it is."""
        value, size = kernels.vgg_loss.content_fwd(x, target, criterion) / target.numel()
        return Compared(value, size, target)

    def slopes(self, x: Tensor | None, content: Content) -> Tensor:
        assert x is not None
        return slopes_(x - content.saved, content.criterion)

    def tap_gradient(self, saved: SavedTap, grads: Any, layer: SavedLayer, above: Tensor | None) -> Tensor:
        """As in :class:`NativePasses`. ``grads`` may be a list too: of each term its gradient and what multiplies it,
        or ``None`` where the term has no gradient."""
        several = len(saved.contents) > 1 or len(saved.styles) > 1
        if several or any(style.backend != "triton" for style in saved.styles):
            return super().tap_gradient(saved, grads, layer, above)
        x, after_relu = saved.maps.pop(), saved.tap.kind == "relu"
        if above is not None and after_relu and layer.averages:
            above = unpool(above, layer, self.passes)
        winners = layer.winners if after_relu else None
        style = content = None
        if saved.styles:
            delta, scale, position, _ = saved.styles[0]
            if (grad_term := grads[position]) is not None:
                style = kernels.vgg_loss.StyleTerm(delta, scale, *_with_factor(grad_term))
        if saved.contents:
            position, criterion, target = saved.contents.pop()
            if (grad_term := grads[position]) is not None:
                grad_content, factor = _with_factor(grad_term)
                content = kernels.vgg_loss.ContentTerm(target, grad_content, criterion, factor)
        grad = torch.empty_like(x) if above is None or winners is not None else above
        kernels.vgg_loss.tap_bwd(x, kernels.vgg_loss.Above(above, winners, after_relu), style, content, grad)
        return grad


class PiecePasses(TritonPasses):
    """The same for ``ops.loss_terms``: the value of a content term is in pieces."""

    def compare(self, x: Tensor, target: Tensor, criterion: str, sized: bool) -> Compared:
        """The value is [2, pieces]: see :func:`fastperc.kernels.vgg_loss.content_pieces`."""
        return Compared(kernels.vgg_loss.content_pieces(x, target, criterion), None, target)


def _with_factor(grad: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
    """The gradient of a term, and what multiplies it, if that is given beside it."""
    return grad if isinstance(grad, tuple) else (grad, None)
