"""A convolution to few channels in training: a network's last one, 9×9 to RGB.

Three filters are too few for a matrix unit. So the horizontal taps become columns of the product, 27 of them, and nine
shifted additions make each pixel. Frozen networks have ``ops.rgb_conv_head``, and ``ops.rgb_conv_stem`` at their start.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastperc import reference
from fastperc.backends import Implementation, Operation, TuningCases, first_two_arguments, register
from fastperc.ops import onednn
from fastperc.ops.common import (
    COMMON_SOURCES,
    channels_last,
    compute_dtype,
    empty_like,
    storage_dtype,
    why_not_here,
    without_slow_autocast,
)
from fastperc.types import Padding, same_sides


def rgb_conv(x: Tensor, weight: Tensor, bias: Tensor, padding: int, padding_mode: str = "zeros") -> Tensor:
    """A convolution to few channels, with gradients: [N, C, H, W] → [N, O, H', W'].

    Args:
        x: [N, C, H, W].
        weight, bias: [O, C, k, k] and [O], O much less than C.
        padding: pixels on each side.
        padding_mode: as ``nn.Conv2d``'s.
    """
    return RGB_CONV(x, weight, bias, same_sides(padding, padding_mode))


def taps_as_filters(weight: Tensor) -> Tensor:
    """[O, C, k, k] → [k·O, C, k, 1]: a filter for each horizontal tap."""
    return weight.permute(3, 0, 1, 2).flatten(0, 1)[..., None]


def _why_not_native(x: Tensor, weight: Tensor, bias: Tensor, padding: Padding) -> str | None:
    if reason := why_not_here():
        return reason
    if torch.float64 in (x.dtype, weight.dtype, bias.dtype):
        return "oneDNN does not compute in float64"
    if x.numel() == 0:
        return "the tensor is empty"
    return onednn.why_not(x.new_empty(0, dtype=compute_dtype(x)))


def _native(x: Tensor, weight: Tensor, bias: Tensor, padding: Padding) -> Tensor:
    dtype, stored = compute_dtype(x), storage_dtype(x)
    x, weight = x.to(dtype), weight.to(dtype)
    zeros = padding.sides[0]  # columns of zeros are no part of the product
    if padding.mode != "zeros":
        x, zeros = reference.pad(x, padding), 0
    with without_slow_autocast(x):
        products = F.conv2d(channels_last(x), channels_last(taps_as_filters(weight)), padding=(zeros, 0))
    return (_Fold.apply(products, weight.shape[3], zeros) + bias.view(-1, 1, 1)).to(stored)


class _Fold(torch.autograd.Function):
    """Adds up the columns of the product, column j moved left by j, in float32 or wider: [N, k·O, H, W] →
    [N, O, H, W + 2·zeros − k + 1]."""

    @staticmethod
    def forward(products: Tensor, k: int, zeros: int) -> Tensor:
        width = products.shape[3] + 2 * zeros - k + 1
        columns = F.pad(products, (zeros, zeros)).unflatten(1, (k, -1))
        out = channels_last(reference.widen(columns[:, 0, ..., :width]))
        for j in range(1, k):
            out += columns[:, j, ..., j : j + width]
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int, int], output: Tensor) -> None:
        products, ctx.k, ctx.zeros = inputs
        ctx.dtype = products.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Unfold.apply(grad, ctx.k, ctx.zeros, ctx.dtype), None, None


class _Unfold(torch.autograd.Function):
    """The adjoint of :class:`_Fold`, in ``dtype``: each gradient goes to all columns that its pixel is a sum of."""

    @staticmethod
    def forward(grad: Tensor, k: int, zeros: int, dtype: torch.dtype) -> Tensor:
        n, channels, height, width = grad.shape
        width = width + k - 1 - 2 * zeros
        grad = grad.to(dtype)
        out = empty_like(grad, (n, k * channels, height, width))
        columns, wide = out.unflatten(1, (k, channels)), F.pad(grad, (k - 1, k - 1))
        for j in range(k):
            first = k - 1 - j + zeros
            columns[:, j] = wide[..., first : first + width]
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int, int, torch.dtype], output: Tensor) -> None:
        _, ctx.k, ctx.zeros, _ = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _Fold.apply(grad, ctx.k, ctx.zeros), None, None, None


def _plain(x: Tensor, weight: Tensor, bias: Tensor, padding: Padding) -> Tensor:
    return reference.convolve(x, weight, bias, 1, padding)


RGB_CONV = register(
    Operation(
        "rgb_conv",
        "9×9 conv",
        (
            Implementation("native", _native, _why_not_native),
            Implementation("reference", _plain),
        ),
        TuningCases(
            lambda batch, size: [((batch, 32, size, size), (3, 32, 9, 9))],
            lambda x, weight: (x, weight, weight.new_zeros(3), same_sides(4)),
        ),
        (*COMMON_SOURCES, "fastperc/ops/rgb_conv.py", "fastperc/ops/onednn.py"),
        first_two_arguments,
    )
)
