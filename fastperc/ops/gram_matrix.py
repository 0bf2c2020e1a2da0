"""The Gram matrix of features, for losses of one's own.

Plain PyTorch takes three products of one size, one in the forward and two in the backward. ``"native"`` leaves three
quarters of the forward's and one of the backward's to the BLAS library: G is symmetric, and its gradient multiplies ψ
by the sum of itself and its transpose.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastperc import reference
from fastperc.backends import Implementation, Operation, TuningCases, register
from fastperc.ops.common import COMMON_SOURCES, why_not_here
from fastperc.ops.gram_loss import PIXELS_AT_ONCE, dense_format, wide_blocks

SMALLEST_BLOCK = 32  # channels: products of fewer are slow


def gram_matrix(x: Tensor) -> Tensor:
    """ψψᵀ / (C·H·W), ψ being ``x`` [N, C, H, W] as a C × H·W matrix (paper, equation 3).

    Returns [N, C, C] in float32 or wider, under autocast too. Sums are kept in float32 or wider.

    Raises:
        ValueError: ``x`` is not [N, C, H, W], or has no elements to a map.
    """
    reference.check_features(x)
    with torch.autocast(x.device.type, enabled=False):
        return GRAM_MATRIX(x)


class _GramMatrix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        n, channels = x.shape[:2]
        gram = x.new_empty(n, channels, channels, dtype=torch.promote_types(x.dtype, torch.float32))
        half = -(-channels // 2) if channels >= 2 * SMALLEST_BLOCK else channels
        for psi, first in wide_blocks(x):
            beta = 0 if first else 1
            gram[:, :half].baddbmm_(psi[:, :half], psi.mT, beta=beta)
            if half < channels:
                gram[:, half:, half:].baddbmm_(psi[:, half:], psi[:, half:].mT, beta=beta)
        upper = gram.div_(x[0].numel()).triu_()  # a library's product of a matrix with itself may not be symmetric
        return upper + upper.triu(1).mT

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        slopes = (grad + grad.mT) / x[0].numel()
        if torch.is_grad_enabled():  # to be differentiated again
            return (slopes @ reference.widen(x).flatten(2)).view_as(x).to(x.dtype)
        out = torch.empty_like(x, memory_format=dense_format(x))
        if out.dtype == slopes.dtype:
            torch.bmm(slopes, x.flatten(2), out=out.flatten(2))
            return out
        for (psi, _), part in zip(wide_blocks(x), out.flatten(2).split(PIXELS_AT_ONCE, dim=2)):
            part.copy_(torch.bmm(slopes, psi))
        return out


def _why_not_native(x: Tensor) -> str | None:
    return why_not_here() or ("the batch is empty" if len(x) == 0 else None)


GRAM_MATRIX = register(
    Operation(
        "gram_matrix",
        "Gram matrix",
        (
            Implementation("native", _GramMatrix.apply, _why_not_native),
            Implementation("reference", reference.gram_matrix),
        ),
        TuningCases(
            lambda batch, size: [((batch, c, size // s, size // s),) for c, s in ((64, 1), (128, 2), (256, 4))],
            lambda x: (x,),
        ),
        (*COMMON_SOURCES, "fastperc/ops/gram_loss.py", "fastperc/ops/gram_matrix.py"),
    )
)
