"""A frozen network's convolutions on a CPU, float32, in NHWC, as products of matrices with their epilogue in one pass.

They are two implementations of ``ops.conv_bn_relu``, for kernels of 1×1 and for larger ones. csrc/pointwise_conv.cpp
says how they compute.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastperc import _native
from fastperc.ops.common import (
    evenly_spaced,
    filled,
    packed,
    run_fused,
    why_not_cpp,
    why_not_frozen,
    why_not_fused,
)
from fastperc.types import Epilogue, Geometry

SOURCES = (
    "fastperc/ops/pointwise_conv.py",
    "csrc/pointwise_conv.h",
    "csrc/pointwise_conv.cpp",
    "csrc/conv3x3_tile.h",
)
FEWEST_LANES = 8  # floats in a register, as AVX2 has; with fewer it was not measured
FEWEST_CHANNELS = 24  # of input and of output, of a larger kernel
MANY_PIXELS = 16384  # of the output of a 1×1 convolution: with more, oneDNN is faster by itself and in a network
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
    if weight.numel() == 0:
        return "there are no channels"
    return why_not_fused(x, weight, bias, geometry, epilogue)


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
    lanes, _ = _native.pointwise_panels()

    def pack() -> tuple[Tensor, Tensor]:
        return _panels(weight.detach()), filled(bias.detach(), lanes)

    weights, filled_bias = packed("pointwise", pack, weight, bias)
    x, kernel = evenly_spaced(x), (weight.shape[2], weight.shape[3])

    def fill(fused: Epilogue, out: Tensor) -> None:
        _native.pointwise_conv(x, weights, filled_bias, kernel, geometry, fused, out)

    return run_fused(x, weight, geometry, epilogue, lanes, fill)


def _panels(weight: Tensor) -> Tensor:
    """``weight`` [O, I, k, k] packed as csrc/pointwise_conv.h says."""
    lanes, most = _native.pointwise_panels()
    matrix = filled(weight.permute(0, 2, 3, 1).flatten(1), lanes).t()
    left, widths = matrix.shape[1] // lanes, []
    while left:
        widths.append(most - 1 if left == most + 1 and most > 2 else min(left, most))
        left -= widths[-1]
    return torch.cat([panel.reshape(-1) for panel in matrix.split([lanes * width for width in widths], dim=1)])
