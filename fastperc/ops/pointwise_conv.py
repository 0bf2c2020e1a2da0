"""A frozen network's convolutions on a CPU, float32, in NHWC, as products of matrices with their epilogue in one pass.

They are two implementations of ``ops.conv_bn_relu``, for kernels of 1×1 and for larger ones. csrc/pointwise_conv.cpp
says how they compute.
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
FEWEST_LANES = 8  # floats in a register, as AVX2 has; with fewer it was not measured
FEWEST_CHANNELS = 24  # of input and of output, of a larger kernel
MANY_PIXELS = 8192  # of a 1×1 convolution's output: with more it takes 3 % to 50 % longer than oneDNN
MOST_PIXELS = 400  # of the output of a larger kernel


def why_not(x: Tensor, weight: Tensor, bias: Tensor, geometry: Geometry, epilogue: Epilogue) -> str | None:
    """Why the kernel cannot serve this call of ``conv_bn_relu`` as a 1×1 convolution, or ``None``."""
    if weight.shape[2:] != (1, 1) or any(geometry.padding.sides):
        return "the kernel is larger than a pixel, or there is a border"
    return _why_not(x, weight, bias, geometry, epilogue)


def why_not_direct(x: Tensor, weight: Tensor, bias: Tensor, geometry: Geometry, epilogue: Epilogue) -> str | None:
    """Why the kernel cannot serve this call of ``conv_bn_relu`` tap by tap, or ``None``."""
    if weight.shape[2:] == (1, 1):
        return "the kernel is a pixel"
    if geometry.padding.mode != "zeros":
        return "the border is not of zeros"
    return _why_not(x, weight, bias, geometry, epilogue)


def _why_not(x: Tensor, weight: Tensor, bias: Tensor, geometry: Geometry, epilogue: Epilogue) -> str | None:
    if reason := why_not_frozen(x, weight, bias, epilogue=epilogue) or why_not_cpp(x):
        return reason
    if geometry.groups != 1:
        return "there are groups"
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
    """Why oneDNN is expected to be faster for a 1×1 convolution, or ``None``: where it was measured to be so with
    AVX-512 and with AVX2."""
    if reason := _why_slow_processor():
        return reason
    images, _, rows, columns = geometry.output_shape(x, weight)
    if images * rows * columns > MANY_PIXELS and epilogue.out is None:  # which oneDNN's output is copied to
        return f"more than {MANY_PIXELS} pixels"
    return None


def why_slow_direct(x: Tensor, weight: Tensor, bias: Tensor, geometry: Geometry, epilogue: Epilogue) -> str | None:
    """Why oneDNN is expected to be faster for a larger kernel, or ``None``: where it was measured to be so or as fast,
    with AVX-512 and with AVX2. With few pixels the threads share the channels, so that each weight is read once."""
    if reason := _why_slow_processor():
        return reason
    images, channels, rows, columns = geometry.output_shape(x, weight)
    if images * rows * columns > MOST_PIXELS:
        return f"more than {MOST_PIXELS} pixels"
    few = min(channels, x.shape[1]) < FEWEST_CHANNELS
    return f"fewer than {FEWEST_CHANNELS} channels" if few else None


def _why_slow_processor() -> str | None:
    return f"fewer than {FEWEST_LANES} floats in a register" if _native.winograd_lanes() < FEWEST_LANES else None


def run(x: Tensor, weight: Tensor, bias: Tensor, geometry: Geometry, epilogue: Epilogue) -> Tensor:
    """``conv_bn_relu`` of a call that :func:`why_not` or :func:`why_not_direct` accepts."""
    weights, filled_bias = packed("pointwise", lambda: (_panels(weight.detach()), _filled(bias.detach())), weight, bias)
    x, out, activation = evenly_spaced(x), epilogue.out, epilogue.activation
    if out is None or _native.pixel_step(out) is None:
        out = empty_like(x, geometry.output_shape(x, weight))
    fused = activation is None or activation.name in _native.PASS_ACTIVATIONS
    computed = activation if fused else None
    if activation is not None and activation.slopes is not None:
        slopes, channels = activation.slopes, len(bias)
        wide = packed(("pointwise", channels), lambda: _filled(slopes.detach().float().expand(channels)), slopes)
        computed = Activation(activation.name, slopes=wide)
    kernel = weight.shape[2], weight.shape[3]
    inner_epilogue = Epilogue(None, computed, channels_adjacent(epilogue.skip))
    _native.pointwise_conv(x, weights, filled_bias, kernel, geometry, inner_epilogue, out)
    return copied_to(out if fused else activate_(out, activation), epilogue.out)


def _panels(weight: Tensor) -> Tensor:
    """``weight`` [O, I, k, k] packed as csrc/pointwise_conv.h says."""
    matrix = _filled(weight.permute(0, 2, 3, 1).flatten(1)).t()
    lanes, most = _native.pointwise_panels()
    left, widths = matrix.shape[1] // lanes, []
    while left:
        widths.append(most - 1 if left == most + 1 and most > 2 else min(left, most))
        left -= widths[-1]
    return torch.cat([panel.reshape(-1) for panel in matrix.split([lanes * width for width in widths], dim=1)])


def _filled(x: Tensor) -> Tensor:
    """``x`` [O, ...], filled up with zeros to a multiple of the floats in a register."""
    return F.pad(x, (*(0, 0) * (x.dim() - 1), 0, -len(x) % _native.pointwise_panels()[0])).contiguous()
