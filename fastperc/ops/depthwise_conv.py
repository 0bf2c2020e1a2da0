"""A frozen network's depthwise convolutions on a CPU, float32, in NHWC: each channel is convolved by itself.

They are an implementation of ``ops.conv_bn_relu``; csrc/depthwise_conv.cpp says how they compute.
"""

from __future__ import annotations

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
    if epilogue.norm is not None:
        return "an instance norm follows"
    tensors = [x, weight, bias, *(t for t in (epilogue.skip, epilogue.out) if t is not None)]
    if any(t.dtype != torch.float32 for t in tensors):
        return "the kernel computes in float32"
    skip = epilogue.skip
    return None if skip is None or skip.shape == geometry.output_shape(x, weight) else "the skip has another shape"


def why_slow(x: Tensor, weight: Tensor, bias: Tensor, geometry: Geometry, epilogue: Epilogue) -> str | None:
    """Why PyTorch's library is expected to be faster, or ``None``."""
    lanes = _native.winograd_lanes()
    if lanes < FEWEST_LANES:
        return f"fewer than {FEWEST_LANES} floats in a register"
    return "fewer channels than a register holds" if x.shape[1] < lanes else None


def run(x: Tensor, weight: Tensor, bias: Tensor, geometry: Geometry, epilogue: Epilogue) -> Tensor:
    """``conv_bn_relu`` of a call that :func:`why_not` accepts."""

    def pack() -> tuple[Tensor, Tensor]:
        taps = _filled(weight.detach().flatten(1))  # [C, k · k]
        return taps.view(-1, _native.DEPTHWISE_PANEL, taps.shape[1]).mT.contiguous(), _filled(bias.detach())

    weights, filled_bias = packed("depthwise", pack, weight, bias)
    if geometry.padding.mode != "zeros":
        x, geometry = channels_last(reference.pad(x, geometry.padding)), geometry._replace(padding=Padding())
    x, out, activation, skip = evenly_spaced(x), epilogue.out, epilogue.activation, epilogue.skip
    if out is None or _native.pixel_step(out) is None:
        out = empty_like(x, geometry.output_shape(x, weight))
    fused = activation is None or activation.name in _native.PASS_ACTIVATIONS
    passed = activation if fused else None
    if passed is not None and passed.slopes is not None:
        slopes, channels = passed.slopes, len(bias)
        wide = packed(("depthwise", channels), lambda: _filled(slopes.detach().float().expand(channels)), slopes)
        passed = Activation(passed.name, slopes=wide)
    _native.depthwise_conv(x, weights, filled_bias, geometry, channels_adjacent(skip), passed, out)
    return copied_to(out if fused else activate_(out, activation), epilogue.out)


def _filled(x: Tensor) -> Tensor:
    """``x`` [C, ...], filled up with zeros to a multiple of a panel."""
    return F.pad(x, (*(0, 0) * (x.dim() - 1), 0, -len(x) % _native.DEPTHWISE_PANEL)).contiguous()
