"""What the 9×9 convolutions at the ends of a frozen network share when Winograd's F(3×3, 3×3) computes them, in float32
on a CPU; csrc/rgb_conv_winograd.cpp says how. A 7×7 kernel with a ring of zeros is a 9×9 one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastperc.ops.common import why_not_cpp
from fastperc.ops.conv3x3 import why_slow_winograd
from fastperc.types import Padding

# The transform of three taps to five points (0, 1, -1, 2 and infinity); the kernel has the other two transforms.
POINTS = ((1 / 2, 0, 0), (-1 / 2, -1 / 2, -1 / 2), (-1 / 6, 1 / 6, -1 / 6), (1 / 6, 1 / 3, 2 / 3), (0, 0, 1))
CHANNELS = 16  # those that are not RGB are a multiple of this


def why_not(x: Tensor, weight: Tensor, bias: Tensor, kernels: tuple[int, ...] = (9,)) -> str | None:
    """Why the kernel cannot multiply ``x``, of any layout, by ``weight``, or ``None``.

    ``kernels`` are the sizes of kernels by which it is faster than oneDNN.
    """
    if {x.dtype, weight.dtype, bias.dtype} != {torch.float32}:
        return "the kernel computes in float32"
    if weight.shape[2] not in kernels or weight.shape[2] != weight.shape[3]:
        return f"the kernel's size is not {' or '.join(f'{size}×{size}' for size in kernels)}"
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


def with_ring(padding: Padding, weight: Tensor) -> Padding:
    """The ``padding`` for the 9×9 kernel that :func:`transformed` makes of ``weight``: as wide as its ring of zeros."""
    ring = (9 - weight.shape[2]) // 2
    left, right, top, bottom = padding.sides
    return padding._replace(sides=(left + ring, right + ring, top + ring, bottom + ring))


def transformed(weight: Tensor) -> Tensor:
    """[O, I, 9, 9] → [25, 3, 3, I, O] in float32: each of the 3×3 blocks of 3×3 taps by points.

    A kernel of 7×7 gets a ring of zeros.
    """
    points = torch.tensor(POINTS, dtype=torch.float64)
    weight = F.pad(weight.detach(), ((9 - weight.shape[2]) // 2,) * 4)
    blocks = weight.double().unflatten(3, (3, 3)).unflatten(2, (3, 3))
    return torch.einsum("oiyaxb,pa,qb->pqyxio", blocks, points, points).flatten(0, 1).float()
