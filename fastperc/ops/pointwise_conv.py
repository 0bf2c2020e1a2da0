"""A frozen network's 1×1 convolutions on a CPU, float32, in NHWC: a product of matrices with its epilogue in one pass.

They are an implementation of ``ops.conv_bn_relu``; csrc/pointwise_conv.cpp says how they compute.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastperc import _native
from fastperc.ops.common import (
    activate_,
    channels_adjacent,
    copied_to,
    empty_like,
    evenly_spaced,
    packed,
    why_not_cpp,
    why_not_frozen,
)
from fastperc.types import Activation, Epilogue, Geometry

SOURCES = (
    "fastperc/ops/pointwise_conv.py",
    "csrc/pointwise_conv.h",
    "csrc/pointwise_conv.cpp",
    "csrc/conv3x3_tile.h",
)
FEWEST_LANES = 8  # floats in a register, as AVX2 has; with fewer no gain was measured
HALF_PANEL = _native.POINTWISE_PANEL // 2


def why_not(x: Tensor, weight: Tensor, bias: Tensor, geometry: Geometry, epilogue: Epilogue) -> str | None:
    """Why the kernel cannot serve this call of ``conv_bn_relu``, or ``None``."""
    if reason := why_not_frozen(x, weight, bias, epilogue=epilogue) or why_not_cpp(x):
        return reason
    if weight.shape[2:] != (1, 1) or geometry.groups != 1 or any(geometry.padding.sides):
        return "the kernel is larger than a pixel, or there are groups or a border"
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
    return f"fewer than {FEWEST_LANES} floats in a register" if _native.winograd_lanes() < FEWEST_LANES else None


def run(x: Tensor, weight: Tensor, bias: Tensor, geometry: Geometry, epilogue: Epilogue) -> Tensor:
    """``conv_bn_relu`` of a call that :func:`why_not` accepts."""

    def pack() -> tuple[Tensor, Tensor]:
        matrix = _filled(weight.detach().flatten(1)).t()
        panels = [panel.reshape(-1) for panel in matrix.split(_native.POINTWISE_PANEL, dim=1)]
        return torch.cat(panels), _filled(bias.detach())

    weights, filled_bias = packed("pointwise", pack, weight, bias)
    x, out, activation, skip = evenly_spaced(x), epilogue.out, epilogue.activation, epilogue.skip
    if out is None or _native.pixel_step(out) is None:
        out = empty_like(x, geometry.output_shape(x, weight))
    fused = activation is None or activation.name in _native.PASS_ACTIVATIONS
    if activation is not None and activation.slopes is not None:
        slopes, channels = activation.slopes, len(bias)
        wide = packed(("pointwise", channels), lambda: _filled(slopes.detach().float().expand(channels)), slopes)
        activation = Activation(activation.name, slopes=wide)
    _native.pointwise_conv(
        x, weights, filled_bias, geometry.stride, channels_adjacent(skip), activation if fused else None, out
    )
    return copied_to(out if fused else activate_(out, activation), epilogue.out)


def _filled(x: Tensor) -> Tensor:
    """``x`` [O, ...], filled up with zeros to a multiple of half a panel."""
    return F.pad(x, (*(0, 0) * (x.dim() - 1), 0, -len(x) % HALF_PANEL)).contiguous()
