"""A frozen network's first convolution on a CPU, float32, in NHWC: from the few channels of a picture.

It is an implementation of ``ops.conv_bn_relu``; csrc/stem_conv.cpp says how it computes.
"""

from __future__ import annotations

import math

import torch
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
    "fastperc/ops/stem_conv.py",
    "csrc/stem_conv.h",
    "csrc/stem_conv.cpp",
    "csrc/conv_epilogue.h",
    "csrc/conv3x3_tile.h",
)
MOST_CHANNELS = 4  # of a picture
WIDEST_KERNEL = 11  # pixels
FEWEST_LANES = 8  # floats in a register, as AVX2 has
MOST_OUTPUTS = 1 << 19  # that stay in the cache; oneDNN writes larger maps as fast or faster
HALF_PANEL = _native.STEM_PANEL // 2


def why_not(x: Tensor, weight: Tensor, bias: Tensor, geometry: Geometry, epilogue: Epilogue) -> str | None:
    """Why the kernel cannot serve this call of ``conv_bn_relu``, or ``None``."""
    if reason := why_not_frozen(x, weight, bias, epilogue=epilogue) or why_not_cpp(x):
        return reason
    _, channels, *kernel = weight.shape
    if channels > MOST_CHANNELS or geometry.groups != 1 or geometry.dilation != 1:
        return f"the convolution is not from at most {MOST_CHANNELS} channels, or it is dilated"
    if kernel[0] != kernel[1] or kernel[0] > WIDEST_KERNEL or min(geometry.padding.sides) < 0:
        return f"the kernel is not square, or more than {WIDEST_KERNEL} pixels wide, or the map is cropped"
    if weight.numel() == 0:
        return "there are no channels"
    return why_not_fused(x, weight, bias, geometry, epilogue)


def why_slow(x: Tensor, weight: Tensor, bias: Tensor, geometry: Geometry, epilogue: Epilogue) -> str | None:
    """Why PyTorch's library is expected to be faster, or ``None``."""
    if _native.winograd_lanes() < FEWEST_LANES:
        return f"fewer than {FEWEST_LANES} floats in a register"
    outputs = math.prod(geometry.output_shape(x, weight))
    return "writing a large map takes longer than computing it" if outputs > MOST_OUTPUTS else None


def run(x: Tensor, weight: Tensor, bias: Tensor, geometry: Geometry, epilogue: Epilogue) -> Tensor:
    """``conv_bn_relu`` of a call that :func:`why_not` accepts."""

    def pack() -> tuple[Tensor, Tensor]:
        matrix = filled(weight.detach().permute(0, 2, 3, 1).flatten(1), HALF_PANEL).t()  # [k · k · I, O]
        panels = [panel.reshape(-1) for panel in matrix.split(_native.STEM_PANEL, dim=1)]
        return torch.cat(panels), filled(bias.detach(), HALF_PANEL)

    weights, filled_bias = packed("stem", pack, weight, bias)
    if geometry.padding.mode != "zeros":
        x, geometry = channels_last(reference.pad(x, geometry.padding)), geometry._replace(padding=Padding())
    x = evenly_spaced(x)

    def fill(fused: Epilogue, out: Tensor) -> None:
        _native.stem_conv(x, weights, filled_bias, weight.shape[2], geometry, fused)

    return run_fused(x, weight, geometry, epilogue, HALF_PANEL, fill)
