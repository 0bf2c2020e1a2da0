"""The coefficients of a norm, from its input's statistics by tiles: see ``fastperc.kernels.instance_norm``.

    norm_coefficients       weight / σ, bias − μ · weight / σ and more, from an image's tiles by Chan's formula
    gradient_coefficients   the same for the backward

The tiles are added up in a fixed order, without atomics.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastperc.kernels.deferred import GRADIENT_ROWS, NORM_ROWS, coefficient

BLOCK_TILES, BLOCK_CHANNELS = 512, 8  # per program: 32 bytes of a tile's line
COEFFICIENTS_OPTIONS = dict(num_warps=8, num_stages=1)


@triton.jit
def place_channels(pid, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr):
    """The image and the channels of a program for BLOCK_C channels."""
    BLOCKS: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    return (pid // BLOCKS).to(tl.int64), pid % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)


@triton.jit
def norm_coefficients_tile(
    pid,
    partials_ptr,
    weight_ptr,
    bias_ptr,
    mean_ptr,
    variance_ptr,
    batches_ptr,
    coefficients_ptr,
    statistics_ptr,
    tiles,
    eps,
    momentum,
    CHANNELS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """What program ``pid`` of :func:`norm_coefficients_kernel` does."""
    image, offs_c = place_channels(pid, CHANNELS, BLOCK_C)
    mask_c = offs_c < CHANNELS
    if partials_ptr is None:
        total = tl.zeros([BLOCK_C], dtype=tl.float32)
        center = tl.load(mean_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
        variance = tl.load(variance_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    else:
        partials_ptr += image * tiles * 3 * CHANNELS
        count = tl.zeros([BLOCK_T, BLOCK_C], dtype=tl.float32)
        mean = tl.zeros([BLOCK_T, BLOCK_C], dtype=tl.float32)
        m2 = tl.zeros([BLOCK_T, BLOCK_C], dtype=tl.float32)
        for first in tl.range(0, tiles, BLOCK_T):
            offs_t = first + tl.arange(0, BLOCK_T)
            mask = (offs_t[:, None] < tiles) & mask_c[None, :]
            partial_ptrs = partials_ptr + offs_t[:, None].to(tl.int64) * 3 * CHANNELS + offs_c[None, :]
            tile_count = tl.load(partial_ptrs, mask=mask, other=0.0)
            difference = tl.load(partial_ptrs + CHANNELS, mask=mask, other=0.0) - mean
            sum_count = count + tile_count
            share = tile_count / tl.maximum(sum_count, 1.0)  # 0 where there is no tile
            mean += difference * share
            tile_m2 = tl.load(partial_ptrs + 2 * CHANNELS, mask=mask, other=0.0)
            m2 += tile_m2 + difference * difference * count * share
            count = sum_count
        total = tl.sum(count, axis=0)
        values = tl.maximum(total, 1.0)  # total is 0 where there is no channel
        center = tl.sum(count * mean, axis=0) / values
        difference = mean - center[None, :]
        squares = tl.sum(m2 + difference * difference * count, axis=0)
        variance = squares / values
        if statistics_ptr is not None:
            offs = image * 3 * CHANNELS + offs_c
            tl.store(statistics_ptr + offs, total, mask=mask_c)
            tl.store(statistics_ptr + offs + CHANNELS, center, mask=mask_c)
            tl.store(statistics_ptr + offs + 2 * CHANNELS, squares, mask=mask_c)
        if mean_ptr is not None:
            if batches_ptr is not None:
                momentum = 1.0 / tl.load(batches_ptr).to(tl.float32)
            before = tl.load(mean_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
            after = before + momentum * (center - before)
            tl.store(mean_ptr + offs_c, after.to(mean_ptr.dtype.element_ty), mask=mask_c)
            before = tl.load(variance_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
            after = before + momentum * (squares / tl.maximum(total - 1, 1.0) - before)
            tl.store(variance_ptr + offs_c, after.to(variance_ptr.dtype.element_ty), mask=mask_c)
    weight = tl.load(weight_ptr + offs_c, mask=mask_c, other=0.0)
    bias = tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0)
    inverse = 1.0 / tl.sqrt(variance + eps)
    scale = weight * inverse
    coefficient_ptrs = coefficients_ptr + image * NORM_ROWS * CHANNELS + offs_c
    tl.store(coefficient_ptrs, scale, mask=mask_c)
    tl.store(coefficient_ptrs + CHANNELS, bias - center * scale, mask=mask_c)
    tl.store(coefficient_ptrs + 2 * CHANNELS, center, mask=mask_c)
    tl.store(coefficient_ptrs + 3 * CHANNELS, inverse, mask=mask_c)
    tl.store(coefficient_ptrs + 4 * CHANNELS, total, mask=mask_c)


@triton.jit(do_not_specialize=["tiles"])
def norm_coefficients_kernel(
    partials_ptr,  # [N, tiles, 3, C] fp32; or None: the running statistics are applied
    weight_ptr,  # [C] fp32
    bias_ptr,  # [C] fp32
    mean_ptr,  # [C] fp16|bf16|fp32: running mean, updated with momentum; without partials applied; or None
    variance_ptr,  # [C]: running variance, as the mean
    batches_ptr,  # [] int64: how many batches there were with this one: 1 / that is the momentum; or None
    coefficients_ptr,  # [N, NORM_ROWS, C] fp32
    statistics_ptr,  # [N, 3, C] fp32: count, mean and M2 of an image's tiles together; or None
    tiles,
    eps,
    momentum,
    CHANNELS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    norm_coefficients_tile(
        tl.program_id(0),
        partials_ptr,
        weight_ptr,
        bias_ptr,
        mean_ptr,
        variance_ptr,
        batches_ptr,
        coefficients_ptr,
        statistics_ptr,
        tiles,
        eps,
        momentum,
        CHANNELS,
        BLOCK_T,
        BLOCK_C,
    )


@triton.jit
def gradient_coefficients_tile(
    pid,
    partials_ptr,
    weight_ptr,
    norm_ptr,
    coefficients_ptr,
    sums_ptr,
    sums_stride_image,
    sums_stride_row,
    tiles,
    FROZEN: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """What program ``pid`` of :func:`gradient_coefficients_kernel` does."""
    image, offs_c = place_channels(pid, CHANNELS, BLOCK_C)
    mask_c = offs_c < CHANNELS
    partials_ptr += image * tiles * 2 * CHANNELS
    total = tl.zeros([BLOCK_T, BLOCK_C], dtype=tl.float32)
    product = tl.zeros([BLOCK_T, BLOCK_C], dtype=tl.float32)
    for first in tl.range(0, tiles, BLOCK_T):
        offs_t = first + tl.arange(0, BLOCK_T)
        mask = (offs_t[:, None] < tiles) & mask_c[None, :]
        partial_ptrs = partials_ptr + offs_t[:, None].to(tl.int64) * 2 * CHANNELS + offs_c[None, :]
        total += tl.load(partial_ptrs, mask=mask, other=0.0)
        product += tl.load(partial_ptrs + CHANNELS, mask=mask, other=0.0)
    total = tl.sum(total, axis=0)
    product = tl.sum(product, axis=0)
    sums_ptrs = sums_ptr + image * sums_stride_image + offs_c
    tl.store(sums_ptrs, total, mask=mask_c)
    tl.store(sums_ptrs + sums_stride_row, product, mask=mask_c)

    norm_ptr += image * NORM_ROWS * CHANNELS
    mean = coefficient(norm_ptr, 2, offs_c, CHANNELS)
    inverse = coefficient(norm_ptr, 3, offs_c, CHANNELS)
    scale = tl.load(weight_ptr + offs_c, mask=mask_c, other=0.0) * inverse
    if FROZEN:
        of_x = tl.zeros_like(scale)
        constant = of_x
    else:
        count = tl.maximum(coefficient(norm_ptr, 4, offs_c, CHANNELS), 1.0)
        of_x = -scale * inverse * product / count
        constant = -scale * total / count - of_x * mean
    coefficient_ptrs = coefficients_ptr + image * GRADIENT_ROWS * CHANNELS + offs_c
    tl.store(coefficient_ptrs, scale, mask=mask_c)
    tl.store(coefficient_ptrs + CHANNELS, constant, mask=mask_c)
    tl.store(coefficient_ptrs + 2 * CHANNELS, of_x, mask=mask_c)


@triton.jit(do_not_specialize=["tiles"])
def gradient_coefficients_kernel(
    partials_ptr,  # [N, tiles, 2, C] fp32: Σ g and Σ g · x̂
    weight_ptr,  # [C] fp32
    norm_ptr,  # [N, NORM_ROWS, C] fp32
    coefficients_ptr,  # [N, GRADIENT_ROWS, C] fp32
    sums_ptr,  # [N, 2, C] fp32 with strides for all but C: sums over the tiles, the gradients of bias and weight
    sums_stride_image,
    sums_stride_row,
    tiles,
    FROZEN: tl.constexpr,  # whether the statistics are constants
    CHANNELS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    gradient_coefficients_tile(
        tl.program_id(0),
        partials_ptr,
        weight_ptr,
        norm_ptr,
        coefficients_ptr,
        sums_ptr,
        sums_stride_image,
        sums_stride_row,
        tiles,
        FROZEN,
        CHANNELS,
        BLOCK_T,
        BLOCK_C,
    )


class RunningStatistics(NamedTuple):
    """The running statistics of a batch norm."""

    mean: Tensor  # [C]
    variance: Tensor  # [C]
    momentum: float | None  # None: the mean over all batches
    batches: Tensor  # [] int64: how many batches there were with this one


def norm_coefficients(
    partials: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    running: RunningStatistics | None = None,
    statistics: Tensor | None = None,
) -> Tensor:
    """The coefficients [N, NORM_ROWS, C] float32 of a norm, from the ``partials`` [N, tiles, 3, C] of its input.

    N is 1 for a batch norm. Updates ``running``; without ``partials`` applies it. Fills ``statistics`` [N, 3, C] with
    count, mean and M2.
    """
    images, tiles = (1, 0) if partials is None else partials.shape[:2]
    channels = len(weight)
    coefficients = torch.empty(images, NORM_ROWS.value, channels, device=weight.device)
    tracked = running is not None and running.momentum is None
    norm_coefficients_kernel[(images * triton.cdiv(channels, BLOCK_CHANNELS),)](
        partials,
        weight,
        bias,
        running and running.mean,
        running and running.variance,
        running.batches if running is not None and tracked else None,
        coefficients,
        statistics,
        tiles,
        eps,
        (running and running.momentum) or 0.0,
        CHANNELS=channels,
        BLOCK_T=BLOCK_TILES,
        BLOCK_C=BLOCK_CHANNELS,
        **COEFFICIENTS_OPTIONS,
    )
    return coefficients


def gradient_coefficients(partials: Tensor, weight: Tensor, norm: Tensor, frozen: bool, sums: Tensor) -> Tensor:
    """The coefficients [N, GRADIENT_ROWS, C] float32 that give the gradient of a norm's input from that of its output.

    Fills ``sums`` [N, 2, C] float32, C innermost, with the gradients of the norm's bias and weight for each image.
    ``partials`` [N, tiles, 2, C] are those of the output's gradient; ``norm`` [N, NORM_ROWS, C] the norm's own
    coefficients.
    """
    images, tiles, _, channels = partials.shape
    coefficients = torch.empty(images, GRADIENT_ROWS.value, channels, device=weight.device)
    gradient_coefficients_kernel[(images * triton.cdiv(channels, BLOCK_CHANNELS),)](
        partials,
        weight,
        norm,
        coefficients,
        sums,
        *sums.stride()[:2],
        tiles,
        FROZEN=frozen,
        CHANNELS=channels,
        BLOCK_T=BLOCK_TILES,
        BLOCK_C=BLOCK_CHANNELS,
        **COEFFICIENTS_OPTIONS,
    )
    return coefficients
