"""The passes of a VGG loss between convolutions and at taps: in C++ and plain PyTorch, and as Triton kernels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastperc import _native, kernels, reference
from fastperc.ops.vgg_chain import Passes, SavedLayer, unpool


class Style(NamedTuple):
    """What the backward of one layer's style term needs; see :func:`fastperc.ops.gram_loss.gram_loss_fwd`."""

    delta: Tensor
    scale: Tensor  # [1]
    position: int  # among the style's layers
    backend: str  # of ``fastperc.ops.gram_loss.KERNELS``


class Tap(NamedTuple):
    """The terms at a layer whose features are kept."""

    style: Style | None
    grad_style: Tensor | None  # scalar: of the layer's style term, if it has one
    target: Tensor | None  # the content's features, at the content layer
    grad_content: Tensor  # scalar


class NativePasses:
    """The passes between the convolutions and at the taps, in C++ and plain PyTorch."""

    passes: Passes = _native

    def compare(self, features: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The means of (features − target)² and of target²."""
        features, target = reference.widen(features), reference.widen(target)
        # Not mse_loss, which takes the memory twice, nor vector_norm, which adds millions of float32 one by one.
        return (features - target).square_().mean(), target.square().mean()

    def tap_gradient(self, x: Tensor, layer: SavedLayer, above: Tensor | None, tap: Tap) -> Tensor:
        """The gradient before the ReLU of a layer whose features ``x`` are kept; it may overwrite ``above``."""
        if above is None:
            grad = torch.zeros_like(x)
        else:
            grad = above if layer.winners is None else unpool(above, layer, self.passes)
        if tap.style is not None:
            assert tap.grad_style is not None
            slope = tap.style.delta * (tap.grad_style * (4 / x.numel()))
            if grad.dtype == slope.dtype:
                grad.flatten(2).baddbmm_(slope, x.flatten(2))
            else:
                grad += torch.bmm(slope, reference.widen(x).flatten(2)).view_as(x)
        if tap.target is not None:  # in place: nothing else uses the target any more
            grad -= tap.target.sub_(x).mul_(tap.grad_content * (2 / x.numel()))
        return torch.ops.aten.threshold_backward.grad_input(grad, x, 0, grad_input=grad)


class TritonPasses(NativePasses):
    """The same as Triton kernels."""

    @property
    def passes(self) -> Passes:  # type: ignore[override]
        return kernels.vgg_loss

    def compare(self, features: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        difference, square = kernels.vgg_loss.content_fwd(features, target) / target.numel()
        return difference, square

    def tap_gradient(self, x: Tensor, layer: SavedLayer, above: Tensor | None, tap: Tap) -> Tensor:
        if tap.style is not None and tap.style.backend != "triton":
            return super().tap_gradient(x, layer, above, tap)
        grad = torch.empty_like(x) if above is None or layer.winners is not None else above
        style = None
        if tap.style is not None:
            assert tap.grad_style is not None
            style = kernels.vgg_loss.StyleTerm(tap.style.delta, tap.style.scale, tap.grad_style)
        kernels.vgg_loss.tap_bwd(x, above, layer.winners, style, tap.target, tap.grad_content, grad)
        return grad
