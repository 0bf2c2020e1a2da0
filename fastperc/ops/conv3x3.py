"""3×3 convolutions of stride 1, forward and backward: float32 on a CPU by Winograd's algorithm, in NHWC.

By tiles of 2×2 pixels Winograd multiplies 16 times where the definition multiplies 36, by tiles of 4×4 only 9 times;
csrc/conv3x3.cpp says how. :func:`conv3x3`, for training, takes tiles of 2×2. Frozen networks use :func:`winograd`
through ``ops.conv_bn_relu`` with either, VGG through ``ops.vgg_chain`` with those of 2×2.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastperc import _native
from fastperc.backends import Implementation, Operation, TuningCases, first_two_arguments, register
from fastperc.ops.common import (
    COMMON_CPP_SOURCES,
    activate_,
    channels_adjacent,
    channels_last,
    copied_to,
    empty_like,
    packed,
    why_not_cpp,
    why_not_here,
)
from fastperc.types import NO_EPILOGUE, RELU, Epilogue

FEWEST_PIXELS = 128  # of all images: with fewer, transforming the weights takes longer than the products save
PIXELS_A_CHANNEL = 0.5  # the same in training, where weights are transformed twice in each step
FEWEST_LANES = 8  # floats in a register, as AVX2 has; with fewer no gain was measured
WIDEST_PADDING = 2  # the input's gradient is a convolution with a padding of 2 - padding


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None = None, padding: int = 1) -> Tensor:
    """``F.conv2d(x, weight, bias, padding=padding)`` of a 3×3 ``weight``: [N, I, H, W] → [N, O, H', W'].

    Args:
        x: [N, I, H, W].
        weight, bias: [O, I, 3, 3] and [O].
        padding: zeros on each side.
    """
    return CONV3X3(x, weight, bias, padding)


def why_not_winograd(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> str | None:
    """Why Winograd cannot multiply ``x``, of any size and layout, by ``weight``, or ``None``."""
    if reason := why_not_here() or why_not_cpp(x):
        return reason
    if {x.dtype, weight.dtype, x.dtype if bias is None else bias.dtype} != {torch.float32}:
        return "the kernel computes in float32"
    if torch.is_autocast_enabled("cpu"):
        return "autocast computes in half precision"
    if x.dim() != 4 or weight.shape[1:] != (x.shape[1], 3, 3):
        return "this is no 3×3 convolution of images"
    if x.shape[1] % _native.WINOGRAD_PANEL or weight.shape[0] % _native.WINOGRAD_PANEL or weight.numel() == 0:
        return f"channels are no multiple of {_native.WINOGRAD_PANEL}"
    return None


def why_slow_winograd(pixels: int, fewest: int = FEWEST_PIXELS) -> str | None:
    """Why another kernel is expected to be faster for an output of ``pixels``, or ``None``: ``fewest`` are enough."""
    if pixels < fewest:
        return f"fewer than {fewest} pixels"
    return f"fewer than {FEWEST_LANES} floats in a register" if _native.winograd_lanes() < FEWEST_LANES else None


def _why_not(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> str | None:
    if reason := why_not_winograd(x, weight, bias):
        return reason
    if not 0 <= padding <= WIDEST_PADDING:
        return f"a padding of {padding} is not between 0 and {WIDEST_PADDING}"
    if not x.is_contiguous(memory_format=torch.channels_last):
        return "the activations are not in NHWC"
    if x.numel() == 0 or min(x.shape[2:]) + 2 * padding < 3:
        return "the output is empty"
    return None


def _why_slow(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> str | None:
    return why_slow_winograd(_pixels(x, padding))


def _pixels(x: Tensor, padding: int) -> int:
    """Of the output, of all images."""
    return len(x) * (x.shape[2] + 2 * padding - 2) * (x.shape[3] + 2 * padding - 2)


def winograd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: int,
    relu: bool = False,
    turned: bool = False,
    epilogue: Epilogue = NO_EPILOGUE,
    tile: int = 2,
) -> Tensor:
    """activation(conv(``x``) + ``bias`` + skip), without gradients, of an ``x`` in NHWC that :func:`why_not_winograd`
    accepts. ``x`` and the epilogue's ``out`` may be slices of the channels of larger maps, and of the same one.

    ``relu`` is short for the activation. An epilogue has no norm here. An activation that the kernel does not compute
    is computed in place afterwards.

    ``turned`` takes ``weight`` rotated by 180° with input and output channels exchanged, as the gradient to the input
    wants it. A weight that needs no gradient is transformed once, and kept as long as it lives. Skip and ``out``, in
    float32, have the shape of the output. Tiles of 4×4 pixels take fewer products than those of 2×2, and lose some
    digits.

    Raises:
        ValueError: skip or ``out`` has another shape or dtype.
    """

    def pack() -> Tensor:
        return _native.winograd_weights(weight, turned, tile)

    weights = pack() if weight.requires_grad else packed(("winograd", turned, tile), pack, weight)
    n, _, h, w = x.shape
    channels = weight.shape[1 if turned else 0]
    shape, skip = (n, channels, h + 2 * padding - 2, w + 2 * padding - 2), epilogue.skip
    for name, given in (("a skip", skip), ("an out", epilogue.out)):
        if given is not None and (given.shape != shape or given.dtype != torch.float32):
            raise ValueError(f"expected {name} of {list(shape)} in float32, got {list(given.shape)} in {given.dtype}")
    out = epilogue.out
    if out is None or _native.pixel_step(out) is None:
        out = empty_like(x, shape)
    activation = RELU if relu else epilogue.activation
    fused = activation is None or activation.name in _native.PASS_ACTIVATIONS
    bias = None if bias is None else bias.contiguous()
    _native.winograd_conv(x, weights, bias, padding, channels_adjacent(skip), activation if fused else None, out)
    return copied_to(out if fused else activate_(out, activation), epilogue.out)


class _Conv3x3(torch.autograd.Function):
    # Without setup_context, for which PyTorch inspects signatures in each call.
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
        ctx.padding, ctx.with_bias = padding, bias is not None
        ctx.save_for_backward(x, weight)
        if _few_pixels(x, weight, padding):
            return channels_last(F.conv2d(x, weight, bias, padding=padding))
        return winograd(x, weight, bias, padding)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():  # to be differentiated again
            return *_library_gradients(ctx, grad, x, weight, [needs_x, needs_weight, needs_bias]), None

        grad, grad_x = channels_last(grad), None
        if needs_x and _few_pixels(x, weight, ctx.padding):
            grad_x, *_ = _library_gradients(ctx, grad, x, weight, [True, False, False])
        elif needs_x:
            grad_x = winograd(grad, weight, None, 2 - ctx.padding, turned=True)
        grad_weight = torch.empty_like(weight) if needs_weight else None
        grad_bias = weight.new_empty(len(weight)) if needs_bias else None
        if grad_weight is not None:
            _native.winograd_weight_gradient(x, grad, ctx.padding, grad_weight, grad_bias)
        elif grad_bias is not None:
            torch.sum(grad, (0, 2, 3), out=grad_bias)
        return grad_x, grad_weight, grad_bias, None


def _few_pixels(x: Tensor, weight: Tensor, padding: int) -> bool:
    """Whether the library computes the output and the gradient of ``x``, and Winograd that of the weights alone."""
    return _pixels(x, padding) < PIXELS_A_CHANNEL * max(weight.shape[:2])


def _library_gradients(ctx: Any, grad: Tensor, x: Tensor, weight: Tensor, needed: list[bool]) -> tuple[Tensor, ...]:
    sizes = [len(weight)] if ctx.with_bias else None
    convolution = (sizes, [1, 1], [ctx.padding] * 2, [1, 1], False, [0, 0], 1)
    return torch.ops.aten.convolution_backward(grad, x, weight, *convolution, needed)


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
    return F.conv2d(x, weight, bias, padding=padding)


CONV3X3 = register(
    Operation(
        "conv3x3",
        "3×3 conv",
        (
            Implementation("native", _Conv3x3.apply, _why_not, _why_slow, "winograd"),
            Implementation("reference", _plain),
        ),
        TuningCases(
            lambda batch, size: [((batch, 128, size // 4, size // 4), (128, 128, 3, 3))],
            lambda x, weight: (x, weight, weight.new_zeros(weight.shape[0]), 1),
        ),
        (*COMMON_CPP_SOURCES, "csrc/conv3x3*", "fastperc/ops/conv3x3.py"),
        first_two_arguments,
    )
)
