"""What the 9×9 convolutions at the ends of a frozen network share when Winograd's F(3×3, 3×3) computes them, in float32
on a CPU; csrc/rgb_conv_winograd.cpp says how."""

from __future__ import annotations

import torch
from torch import Tensor

from fastperc.ops.common import why_not_cpp
from fastperc.ops.conv3x3 import why_slow_winograd
from fastperc.types import Padding

# The transform of three taps to five points (0, 1, -1, 2 and infinity); the kernel has the other two transforms.
POINTS = ((1 / 2, 0, 0), (-1 / 2, -1 / 2, -1 / 2), (-1 / 6, 1 / 6, -1 / 6), (1 / 6, 1 / 3, 2 / 3), (0, 0, 1))
CHANNELS = 16  # those that are not RGB are a multiple of this


def why_not(x: Tensor, weight: Tensor, bias: Tensor) -> str | None:
    """Why the kernel cannot multiply ``x``, of any layout, by ``weight``, or ``None``."""
    if {x.dtype, weight.dtype, bias.dtype} != {torch.float32}:
        return "the kernel computes in float32"
    if weight.shape[2:] != (9, 9):
        return "this is no 9×9 convolution"
    if max(weight.shape[:2]) % CHANNELS:
        return f"channels are no multiple of {CHANNELS}"
    return why_not_cpp(x)


def why_slow(images: int, rows: int, columns: int) -> str | None:
    """Why oneDNN is expected to be faster for an output of this size, or ``None``."""
    return why_slow_winograd(images * rows * columns)


def output_size(height: int, width: int, padding: Padding) -> tuple[int, int]:
    """Rows and columns of the output."""
    left, right, top, bottom = padding.sides
    return height + top + bottom - 8, width + left + right - 8


def transformed(weight: Tensor) -> Tensor:
    """[O, I, 9, 9] → [25, 3, 3, I, O] in float32: each of the 3×3 blocks of 3×3 taps by points."""
    points = torch.tensor(POINTS, dtype=torch.float64)
    blocks = weight.detach().double().unflatten(3, (3, 3)).unflatten(2, (3, 3))
    return torch.einsum("oiyaxb,pa,qb->pqyxio", blocks, points, points).flatten(0, 1).float()
