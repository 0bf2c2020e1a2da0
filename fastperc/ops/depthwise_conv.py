"""A frozen network's depthwise convolutions on a CPU, float32, in NHWC: each channel is convolved by itself.

They are an implementation of ``ops.conv_bn_relu``; csrc/depthwise_conv.cpp says how they compute.
"""

from __future__ import annotations

from torch import Tensor

from fastperc import _native, reference
from fastperc.ops.common import (
    channels_last,
    evenly_spaced,
    filled,
    packed,
    run_fused,
    why_not_cpp,
    why_not_frozen,
    why_not_fused,
)
from fastperc.types import Epilogue, Geometry, Padding

SOURCES = (
    "fastperc/ops/depthwise_conv.py",
    "csrc/depthwise_conv.h",
    "csrc/depthwise_conv.cpp",
    "csrc/conv_epilogue.h",
    "csrc/conv3x3_tile.h",
)
KERNELS = (3, 5, 7)  # pixels wide
FEWEST_LANES = 8  # floats in a register, as AVX2 has; with fewer no gain was measured


def why_not(x: Tensor, weight: Tensor, bias: Tensor, geometry: Geometry, epilogue: Epilogue) -> str | None:
    """Why the kernel cannot serve this call of ``conv_bn_relu``, or ``None``."""
    if reason := why_not_frozen(x, weight, bias, epilogue=epilogue) or why_not_cpp(x):
        return reason
    channels, _, *kernel = weight.shape
    if not geometry.groups == channels == x.shape[1]:
        return "the convolution is not depthwise"
    if kernel[0] != kernel[1] or kernel[0] not in KERNELS or geometry.dilation != 1 or geometry.stride > 2:
        return "the kernel is not 3, 5 or 7 pixels wide and high, or it is dilated, or the stride is more than 2"
    if max(geometry.padding.sides) > kernel[0] or min(geometry.padding.sides) < 0:
        return "the border is wider than the kernel, or the map is cropped"
    return why_not_fused(x, weight, bias, geometry, epilogue)


def why_slow(x: Tensor, weight: Tensor, bias: Tensor, geometry: Geometry, epilogue: Epilogue) -> str | None:
    """Why PyTorch's library is expected to be faster, or ``None``."""
    lanes = _native.winograd_lanes()
    if lanes < FEWEST_LANES:
        return f"fewer than {FEWEST_LANES} floats in a register"
    return "fewer channels than a register holds" if x.shape[1] < lanes else None


def run(x: Tensor, weight: Tensor, bias: Tensor, geometry: Geometry, epilogue: Epilogue) -> Tensor:
    """``conv_bn_relu`` of a call that :func:`why_not` accepts."""
    panel = _native.DEPTHWISE_PANEL

    def pack() -> tuple[Tensor, Tensor]:
        taps = filled(weight.detach().flatten(1), panel)  # [C, k · k]
        return taps.view(-1, panel, taps.shape[1]).mT.contiguous(), filled(bias.detach(), panel)

    weights, filled_bias = packed("depthwise", pack, weight, bias)
    if geometry.padding.mode != "zeros":
        x, geometry = channels_last(reference.pad(x, geometry.padding)), geometry._replace(padding=Padding())
    x = evenly_spaced(x)

    def fill(fused: Epilogue, out: Tensor) -> None:
        _native.depthwise_conv(x, weights, filled_bias, geometry, fused.skip, fused.activation, out)

    return run_fused(x, weight, geometry, epilogue, panel, fill)
