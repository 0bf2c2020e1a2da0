"""3×3 convolutions of stride 1, forward and back: float32 on a CPU by Winograd's F(2×2, 3×3), in NHWC.

It multiplies 16 times where the definition multiplies 36; csrc/winograd.cpp says how. Half precision, GPUs and narrow
maps are left to PyTorch, whose libraries are as good or better there. :func:`conv3x3` is for training; the convolutions
of frozen networks come here from :mod:`fastperc.ops.conv_bn_relu`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastperc import _native, backends
from fastperc.ops.frozen import channels_last, empty_like, native_unsupported, side_by_side, transformed
from fastperc.ops.packing import packed

FEWEST_PIXELS = 128  # of all images together, below which the weights' transforms take what the products save
FEWEST_LANES = 8  # floats in a register: AVX2's; with fewer it was not seen to gain
WIDEST_PADDING = 2  # that of the input's gradient is 2 less the convolution's


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None = None, padding: int = 1) -> Tensor:
    """``F.conv2d(x, weight, bias, padding=padding)`` of a 3×3 ``weight``: [N, I, H, W] → [N, O, H', W'].

    Args:
        x: [N, I, H, W].
        weight, bias: [O, I, 3, 3] and [O].
        padding: zeros on each side.
    """
    obstacles = {"native": unsupported(x, weight, bias, padding)}
    if obstacles["native"] is None and slower(x, padding):
        obstacles = {"reference": None, **obstacles}
    if backends.choose("conv3x3", x, weight, **obstacles) == "reference":
        return F.conv2d(x, weight, bias, padding=padding)
    return _Conv3x3.apply(x, weight, bias, padding)


def unsupported(x: Tensor, weight: Tensor, bias: Tensor | None = None, padding: int = 1) -> str | None:
    """Why only plain PyTorch can take the call, or ``None``."""
    if obstacle := transformed() or native_unsupported(x):
        return obstacle
    if {x.dtype, weight.dtype, x.dtype if bias is None else bias.dtype} != {torch.float32}:
        return "the kernel computes in float32"
    if torch.is_autocast_enabled("cpu"):
        return "autocast computes in half precision"
    if x.dim() != 4 or weight.shape[1:] != (x.shape[1], 3, 3) or not 0 <= padding <= WIDEST_PADDING:
        return "this is no 3×3 convolution of images"
    if x.shape[1] % _native.WINOGRAD_PANEL or weight.shape[0] % _native.WINOGRAD_PANEL or weight.numel() == 0:
        return f"channels are no multiple of {_native.WINOGRAD_PANEL}"
    if not x.is_contiguous(memory_format=torch.channels_last):
        return "the activations do not lie in NHWC"
    if x.numel() == 0 or min(x.shape[2:]) + 2 * padding < 3:
        return "the output is empty"
    return None


def slower(x: Tensor, padding: int = 1) -> bool:
    """Whether plain PyTorch, which can do without, is faster than what is not :func:`unsupported`."""
    height, width = x.shape[-2:]
    pixels = len(x) * (height + 2 * padding - 2) * (width + 2 * padding - 2)
    return pixels < FEWEST_PIXELS or _native.winograd_lanes() < FEWEST_LANES


def winograd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    padding: int,
    relu: bool,
    turned: bool = False,
    skip: Tensor | None = None,
) -> Tensor:
    """relu?(conv(``x``) + ``bias`` + ``skip``) without gradients, of what is not :func:`unsupported`.

    ``turned`` takes ``weight`` turned by 180°, in and out exchanged, as gradients pass to the input. A weight that
    wants no gradient is transformed once, and kept so for as long as it lives. ``skip``, in float32, has the shape of
    the output.

    Raises:
        ValueError: ``skip`` has another shape or dtype.
    """

    def make() -> Tensor:
        return _native.winograd_weights(weight, turned)

    weights = make() if weight.requires_grad else packed(("winograd", turned), make, weight)
    n, _, h, w = x.shape
    channels = weight.shape[1 if turned else 0]
    out = empty_like(x, (n, channels, h + 2 * padding - 2, w + 2 * padding - 2))
    if skip is not None and (skip.shape != out.shape or skip.dtype != out.dtype):
        raise ValueError(f"expected a skip of {list(out.shape)} in float32, got {list(skip.shape)} in {skip.dtype}")
    _native.winograd_conv(
        x, weights, None if bias is None else bias.contiguous(), padding, side_by_side(skip), relu, out
    )
    return out


class _Conv3x3(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
        return winograd(x, weight, bias, padding, relu=False)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, ctx.padding = inputs
        ctx.with_bias = bias is not None
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():  # the gradient of this gradient may be asked for
            padding, sizes = [ctx.padding] * 2, [len(weight)] if ctx.with_bias else None
            convolution = (sizes, [1, 1], padding, [1, 1], False, [0, 0], 1)
            return *torch.ops.aten.convolution_backward(grad, x, weight, *convolution, [of_x, of_weight, of_bias]), None

        grad = channels_last(grad)
        to_x = winograd(grad, weight, None, 2 - ctx.padding, relu=False, turned=True) if of_x else None
        to_weight = torch.empty_like(weight) if of_weight else None
        to_bias = weight.new_empty(len(weight)) if of_bias else None
        if to_weight is not None:
            _native.winograd_weight_gradient(x, grad, ctx.padding, to_weight, to_bias)
        elif to_bias is not None:
            torch.sum(grad, (0, 2, 3), out=to_bias)
        return to_x, to_weight, to_bias, None
