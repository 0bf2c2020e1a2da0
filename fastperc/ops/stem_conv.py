"""A frozen network's first convolution on a CPU, float32, in NHWC: from the few channels of a picture.

It is an implementation of ``ops.conv_bn_relu``; csrc/stem_conv.cpp says how it computes.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastperc import _native, reference
from fastperc.ops.common import (
    activate_,
    channels_adjacent,
    channels_last,
    copied_to,
    empty_like,
    evenly_spaced,
    packed,
    why_not_cpp,
    why_not_frozen,
)
from fastperc.types import Activation, Epilogue, Geometry, Padding

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
    if epilogue.norm is not None:
        return "an instance norm follows"
    tensors = [x, weight, bias, *(t for t in (epilogue.skip, epilogue.out) if t is not None)]
    if any(t.dtype != torch.float32 for t in tensors):
        return "the kernel computes in float32"
    if weight.numel() == 0:
        return "there are no channels"
    skip = epilogue.skip
    return None if skip is None or skip.shape == geometry.output_shape(x, weight) else "the skip has another shape"


def why_slow(x: Tensor, weight: Tensor, bias: Tensor, geometry: Geometry, epilogue: Epilogue) -> str | None:
    """Why PyTorch's library is expected to be faster, or ``None``."""
    if _native.winograd_lanes() < FEWEST_LANES:
        return f"fewer than {FEWEST_LANES} floats in a register"
    outputs = math.prod(geometry.output_shape(x, weight))
    return "writing a large map takes longer than computing it" if outputs > MOST_OUTPUTS else None


def run(x: Tensor, weight: Tensor, bias: Tensor, geometry: Geometry, epilogue: Epilogue) -> Tensor:
    """``conv_bn_relu`` of a call that :func:`why_not` accepts."""

    def pack() -> tuple[Tensor, Tensor]:
        matrix = _filled(weight.detach().permute(0, 2, 3, 1).flatten(1)).t()  # [k · k · I, O]
        panels = [panel.reshape(-1) for panel in matrix.split(_native.STEM_PANEL, dim=1)]
        return torch.cat(panels), _filled(bias.detach())

    weights, filled_bias = packed("stem", pack, weight, bias)
    if geometry.padding.mode != "zeros":
        x, geometry = channels_last(reference.pad(x, geometry.padding)), geometry._replace(padding=Padding())
    x, out, activation, skip = evenly_spaced(x), epilogue.out, epilogue.activation, epilogue.skip
    if out is None or _native.pixel_step(out) is None:
        out = empty_like(x, geometry.output_shape(x, weight))
    fused = activation is None or activation.name in _native.PASS_ACTIVATIONS
    passed = activation if fused else None
    if passed is not None and passed.slopes is not None:
        slopes, channels = passed.slopes, len(bias)
        wide = packed(("stem", channels), lambda: _filled(slopes.detach().float().expand(channels)), slopes)
        passed = Activation(passed.name, slopes=wide)
    call = Epilogue(None, passed, channels_adjacent(skip), out)
    _native.stem_conv(x, weights, filled_bias, weight.shape[2], geometry, call)
    return copied_to(out if fused else activate_(out, activation), epilogue.out)


def _filled(x: Tensor) -> Tensor:
    """``x`` [O, ...], filled up with zeros to a multiple of half a panel."""
    return F.pad(x, (*(0, 0) * (x.dim() - 1), 0, -len(x) % HALF_PANEL)).contiguous()
