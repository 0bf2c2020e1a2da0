"""Total variation and its gradient, where the CUDA C++ kernel was not built: a pass each.

A program takes a block of elements in memory's order. Loads of the neighbours come from the caches. Each program stores
one partial sum; they are added up afterwards, in order, without atomics.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048  # elements per program
OPTIONS = dict(num_warps=8, num_stages=1)


@triton.jit
def neighbours(
    x_ptr,
    offs,  # of elements, in memory's order
    channels,
    height,
    width,
    stride_image,
    stride_channel,
    stride_row,
    stride_column,
    mask,
    CHANNELS_LAST: tl.constexpr,
):
    """Where the elements are, their row and column, and their values."""
    if CHANNELS_LAST:
        channel = offs % channels
        column = offs // channels % width
        row = offs // channels // width % height
        image = offs // channels // width // height
    else:
        column = offs % width
        row = offs // width % height
        channel = offs // width // height % channels
        image = offs // width // height // channels
    ptrs = x_ptr + image * stride_image + channel * stride_channel + row * stride_row + column * stride_column
    return ptrs, row, column, tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["channels", "height", "width"])
def tv_loss_fwd_kernel(
    x_ptr,  # [N, C, H, W] fp16|bf16|fp32 of any strides
    pieces_ptr,  # [programs] fp32
    count,
    channels,
    height,
    width,
    stride_image,
    stride_channel,
    stride_row,
    stride_column,
    L1: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    offs = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < count
    ptrs, row, column, x = neighbours(
        x_ptr,
        offs,
        channels,
        height,
        width,
        stride_image,
        stride_channel,
        stride_row,
        stride_column,
        mask,
        CHANNELS_LAST,
    )
    has_right = mask & (column + 1 < width)
    has_below = mask & (row + 1 < height)
    right = tl.where(has_right, tl.load(ptrs + stride_column, mask=has_right, other=0.0).to(tl.float32) - x, 0.0)
    below = tl.where(has_below, tl.load(ptrs + stride_row, mask=has_below, other=0.0).to(tl.float32) - x, 0.0)
    total = tl.abs(right) + tl.abs(below) if L1 else right * right + below * below
    tl.store(pieces_ptr + pid, tl.sum(total))


@triton.jit
def slope(difference, exists, L1: tl.constexpr):
    """The derivative of a difference's term; 0 where there is none. NaN stays NaN."""
    if L1:
        result = tl.where(difference > 0, 1.0, tl.where(difference < 0, -1.0, difference))
    else:
        result = 2 * difference
    return tl.where(exists, result, 0.0)


@triton.jit(do_not_specialize=["channels", "height", "width"])
def tv_loss_bwd_kernel(
    x_ptr,  # [N, C, H, W] fp16|bf16|fp32 of any strides
    grad_loss_ptr,  # [] fp32; or None, and the gradient has no such part
    factor_ptr,  # [] fp32: what multiplies it; or None
    above_ptr,  # as grad: what is added, over std; or None
    std_ptr,  # [channels] fp32; or None
    grad_ptr,  # [N, C, H, W] as x, dense in NHWC or NCHW
    count,
    channels,
    height,
    width,
    stride_image,
    stride_channel,
    stride_row,
    stride_column,
    L1: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < count
    ptrs, row, column, x = neighbours(
        x_ptr,
        offs,
        channels,
        height,
        width,
        stride_image,
        stride_channel,
        stride_row,
        stride_column,
        mask,
        CHANNELS_LAST,
    )
    grad = tl.zeros([BLOCK], dtype=tl.float32)
    if grad_loss_ptr is not None:
        for side in tl.static_range(4):
            if side == 0:
                exists = mask & (column > 0)
                neighbour = ptrs - stride_column
            elif side == 1:
                exists = mask & (column + 1 < width)
                neighbour = ptrs + stride_column
            elif side == 2:
                exists = mask & (row > 0)
                neighbour = ptrs - stride_row
            else:
                exists = mask & (row + 1 < height)
                neighbour = ptrs + stride_row
            grad += slope(x - tl.load(neighbour, mask=exists, other=0.0).to(tl.float32), exists, L1)
        grad *= tl.load(grad_loss_ptr)
        if factor_ptr is not None:
            grad *= tl.load(factor_ptr)
    if above_ptr is not None:
        channel = offs % channels if CHANNELS_LAST else offs // width // height % channels
        above = tl.load(above_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        grad += above / tl.load(std_ptr + channel, mask=mask, other=1.0)
    tl.store(grad_ptr + offs, grad.to(grad_ptr.dtype.element_ty), mask=mask)


def _constants(norm: str, channels_last: bool) -> dict[str, Any]:
    return dict(L1=norm == "l1", CHANNELS_LAST=channels_last, BLOCK=BLOCK, **OPTIONS)


def tv_loss_fwd(x: Tensor, norm: str, channels_last: bool) -> Tensor:
    """The sum's pieces, float32; ``channels_last`` says in which order ``x`` [N, C, H, W] is read."""
    programs = triton.cdiv(x.numel(), BLOCK)
    pieces = torch.empty(programs, device=x.device)
    tv_loss_fwd_kernel[(programs,)](x, pieces, x.numel(), *x.shape[1:], *x.stride(), **_constants(norm, channels_last))
    return pieces


class Addend(NamedTuple):
    """A gradient that is added to that of total variation."""

    grad: Tensor  # as the result
    std: Tensor  # [C] float32: what divides its channels


def tv_loss_bwd(
    x: Tensor,
    grad_loss: Tensor | None,
    grad: Tensor,
    norm: str,
    channels_last: bool,
    factor: Tensor | None = None,
    addend: Addend | None = None,
) -> None:
    """Fills ``grad``, as ``x`` and dense in NHWC if ``channels_last``, else in NCHW: total variation's gradient times
    ``grad_loss`` and ``factor``, float32, plus ``addend``."""
    tv_loss_bwd_kernel[(triton.cdiv(x.numel(), BLOCK),)](
        x,
        grad_loss,
        factor,
        *(addend or (None, None)),
        grad,
        x.numel(),
        *x.shape[1:],
        *x.stride(),
        **_constants(norm, channels_last),
    )
