"""ReLU and pooling of a fixed loss network, kept as a bit and a byte.

All tensors are NHWC and dense. After ReLU a number is positive, zero or NaN; a gradient passes where it is not zero.

    relu_mask_fwd, relu_mask_bwd   1 bit an element                     instead of the activations
    relu_pool_fwd, relu_pool_bwd   1 byte a window: its winner, if any  instead of the activations and 8-byte indices
    relu_pool_masks_fwd            the masks of earlier layers beside a pooling, in one launch
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # elements per program of the passes over memory
PASS_OPTIONS = dict(num_warps=8, num_stages=1)
NO_WINNER = tl.constexpr(4)


@triton.jit
def relu_mask_fwd_tile(x_ptr, bits_ptr, pid, count, BLOCK: tl.constexpr):
    """What program ``pid`` of :func:`relu_masks_fwd_kernel` does for a layer."""
    offs_byte = pid.to(tl.int64) * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
    offs = offs_byte[:, None] * 8 + tl.arange(0, 8)[None, :]
    x = tl.load(x_ptr + offs, mask=offs < count, other=0.0)
    bits = tl.sum((x != 0).to(tl.int32) << tl.arange(0, 8)[None, :], axis=1)
    tl.store(bits_ptr + offs_byte, bits.to(tl.uint8), mask=offs_byte * 8 < count)


@triton.jit
def relu_masks_fwd_kernel(
    x_ptrs,  # for each layer: [count] fp16|bf16|fp32
    bits_ptrs,  # for each layer: [count / 8 rounded up] uint8
    counts,
    ends,  # the first program of the next layer
    LAYERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    start = 0
    for layer in tl.static_range(LAYERS):
        if (pid >= start) & (pid < ends[layer]):
            relu_mask_fwd_tile(x_ptrs[layer], bits_ptrs[layer], pid - start, counts[layer], BLOCK)
        start = ends[layer]


@triton.jit
def relu_mask_bwd_kernel(
    grad_ptr,  # [count] fp16|bf16|fp32, changed in place
    bits_ptr,  # [count / 8 rounded up] uint8
    count,
    BLOCK: tl.constexpr,
):
    offs_byte = tl.program_id(0).to(tl.int64) * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
    offs = offs_byte[:, None] * 8 + tl.arange(0, 8)[None, :]
    bits = tl.load(bits_ptr + offs_byte, mask=offs_byte * 8 < count, other=0).to(tl.int32)
    passes = (bits[:, None] >> tl.arange(0, 8)[None, :]) & 1
    grad = tl.load(grad_ptr + offs, mask=offs < count, other=0.0)
    tl.store(grad_ptr + offs, tl.where(passes != 0, grad, 0.0), mask=offs < count)


@triton.jit
def relu_pool_fwd_tile(
    x_ptr,
    pooled_ptr,
    winners_ptr,
    pid,
    count,
    count_winners,
    height,
    width,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What program ``pid`` of :func:`relu_pool_fwd_kernel` does."""
    offs = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < count
    window, channel = offs // CHANNELS, offs % CHANNELS
    column, row = window % (width // 2), window // (width // 2) % (height // 2)
    image = window // (width // 2) // (height // 2)
    upper = x_ptr + ((image * height + 2 * row) * width + 2 * column) * CHANNELS + channel
    best = tl.load(upper, mask=mask, other=0.0)
    winner = tl.zeros([BLOCK], dtype=tl.int32)
    for other in tl.static_range(1, 4):
        value = tl.load(upper + (other // 2 * width + other % 2) * CHANNELS, mask=mask, other=0.0)
        wins = (value > best) | (value != value)  # the first of equals, and NaN over all, as in PyTorch
        best = tl.where(wins, value, best)
        winner = tl.where(wins, other, winner)
    tl.store(pooled_ptr + offs, best, mask=mask)
    winner = tl.where(best != 0, winner, NO_WINNER)
    tl.store(winners_ptr + offs, winner.to(tl.uint8), mask=offs < count_winners)


@triton.jit(do_not_specialize=["height", "width"])
def relu_pool_fwd_kernel(
    x_ptr,  # [N, H, W, C] fp16|bf16|fp32
    pooled_ptr,  # [N, H/2, W/2, C] as x
    winners_ptr,  # [n, H/2, W/2, C] uint8, for the first n images
    count,  # elements of pooled
    count_winners,
    height,
    width,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    relu_pool_fwd_tile(
        x_ptr, pooled_ptr, winners_ptr, tl.program_id(0), count, count_winners, height, width, CHANNELS, BLOCK
    )


@triton.jit(do_not_specialize=["height", "width", "programs"])
def relu_pool_masks_fwd_kernel(
    x_ptr,  # [N, H, W, C] fp16|bf16|fp32
    pooled_ptr,  # [N, H/2, W/2, C] as x
    winners_ptr,  # [n, H/2, W/2, C] uint8, for the first n images
    count,  # elements of pooled
    count_winners,
    height,
    width,
    programs,  # that pool
    mask_x_ptrs,  # this and all up to ends: see relu_masks_fwd_kernel
    bits_ptrs,
    counts,
    ends,
    LAYERS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    if pid < programs:
        relu_pool_fwd_tile(x_ptr, pooled_ptr, winners_ptr, pid, count, count_winners, height, width, CHANNELS, BLOCK)
    start = programs
    for layer in tl.static_range(LAYERS):
        end = programs + ends[layer]
        if (pid >= start) & (pid < end):
            relu_mask_fwd_tile(mask_x_ptrs[layer], bits_ptrs[layer], pid - start, counts[layer], BLOCK)
        start = end


@triton.jit
def unpooled(
    grad_pooled_ptr,  # [H/2, W/2, C] fp16|bf16|fp32, of one image
    winners_ptr,  # [H/2, W/2, C] uint8
    row,
    column,
    channel,
    mask,
    height,
    width,
    CHANNELS: tl.constexpr,
):
    """The gradient of the pixels (row, column) of an image through the pooling."""
    mask &= (row < height // 2 * 2) & (column < width // 2 * 2)  # no window covers an odd last row or column
    offs = (row // 2 * (width // 2) + column // 2) * CHANNELS + channel
    wins = tl.load(winners_ptr + offs, mask=mask, other=NO_WINNER).to(tl.int32) == row % 2 * 2 + column % 2
    return tl.where(wins, tl.load(grad_pooled_ptr + offs, mask=mask, other=0.0), 0.0)


@triton.jit(do_not_specialize=["height", "width"])
def relu_pool_bwd_kernel(
    grad_pooled_ptr,  # [N, H/2, W/2, C] fp16|bf16|fp32
    winners_ptr,  # [N, H/2, W/2, C] uint8
    grad_ptr,  # [N, H, W, C] as grad_pooled
    count,
    height,
    width,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    pixel, channel = offs // CHANNELS, offs % CHANNELS
    column, row, image = pixel % width, pixel // width % height, pixel // width // height
    skipped = image * (height // 2) * (width // 2) * CHANNELS
    grad = unpooled(
        grad_pooled_ptr + skipped,
        winners_ptr + skipped,
        row,
        column,
        channel,
        offs < count,
        height,
        width,
        CHANNELS,
    )
    tl.store(grad_ptr + offs, grad, mask=offs < count)


def relu_mask_fwd(x: Tensor, bits: Tensor) -> None:
    """Fills ``bits`` [numel / 8 rounded up] uint8 with whether each element of ``x`` is not zero."""
    relu_masks_fwd([(x, bits)])


def relu_masks_fwd(masks: Sequence[tuple[Tensor, Tensor]]) -> None:
    """:func:`relu_mask_fwd` of each pair of ``masks``, in one launch."""
    arguments, programs = _of_masks(masks)
    relu_masks_fwd_kernel[(programs,)](*arguments, LAYERS=len(masks), BLOCK=BLOCK, **PASS_OPTIONS)


def _of_masks(masks: Sequence[tuple[Tensor, Tensor]]) -> tuple[tuple[Any, ...], int]:
    """The arguments of a kernel that fills ``masks``, and how many programs do."""
    counts = tuple(x.numel() for x, _ in masks)
    ends = tuple(itertools.accumulate(triton.cdiv(count, BLOCK) for count in counts))
    return (tuple(x for x, _ in masks), tuple(bits for _, bits in masks), counts, ends), ends[-1]


def relu_mask_bwd(grad: Tensor, bits: Tensor) -> None:
    """Sets ``grad`` to zero where ``bits``, from :func:`relu_mask_fwd`, has a zero."""
    relu_mask_bwd_kernel[(triton.cdiv(grad.numel(), BLOCK),)](grad, bits, grad.numel(), BLOCK=BLOCK, **PASS_OPTIONS)


def relu_pool_fwd(x: Tensor, pooled: Tensor, winners: Tensor) -> None:
    """Fills ``pooled`` [N, C, H/2, W/2] with the 2×2 max pooling of ``x`` [N, C, H, W], and ``winners``.

    ``winners`` [n, C, H/2, W/2] uint8, for the first n images, has the position of each maximum, 0 to 3; 4 where the
    maximum is 0.
    """
    _, channels, height, width = x.shape
    relu_pool_fwd_kernel[(triton.cdiv(pooled.numel(), BLOCK),)](
        x,
        pooled,
        winners,
        pooled.numel(),
        winners.numel(),
        height,
        width,
        CHANNELS=channels,
        BLOCK=BLOCK,
        **PASS_OPTIONS,
    )


def relu_pool_masks_fwd(x: Tensor, pooled: Tensor, winners: Tensor, masks: Sequence[tuple[Tensor, Tensor]]) -> None:
    """:func:`relu_pool_fwd`, and :func:`relu_mask_fwd` of each pair of ``masks``, in one launch."""
    if not masks:
        relu_pool_fwd(x, pooled, winners)
        return
    _, channels, height, width = x.shape
    (arguments, others), programs = _of_masks(masks), triton.cdiv(pooled.numel(), BLOCK)
    relu_pool_masks_fwd_kernel[(programs + others,)](
        x,
        pooled,
        winners,
        pooled.numel(),
        winners.numel(),
        height,
        width,
        programs,
        *arguments,
        LAYERS=len(masks),
        CHANNELS=channels,
        BLOCK=BLOCK,
        **PASS_OPTIONS,
    )


def relu_pool_bwd(grad_pooled: Tensor, winners: Tensor, grad: Tensor) -> None:
    """Fills ``grad`` [N, C, H, W] with the gradient before pooling and ReLU; the other two are as in
    :func:`relu_pool_fwd`, ``grad_pooled`` being the gradient of ``pooled``."""
    _, channels, height, width = grad.shape
    relu_pool_bwd_kernel[(triton.cdiv(grad.numel(), BLOCK),)](
        grad_pooled, winners, grad, grad.numel(), height, width, CHANNELS=channels, BLOCK=BLOCK, **PASS_OPTIONS
    )
