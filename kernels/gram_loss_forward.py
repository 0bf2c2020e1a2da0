"""The kernels of the style loss, forward: see ``fastperc.kernels.gram_loss``.

gram_partials   for each range of pixels Σ F_i F_jᵀ / CHW, for a pair of channel blocks i ≤ j; reads the features once
gram_deltas     the sum over the ranges, in order, minus the target: Δ = G − A; pieces of ‖Δ‖² and max |Δ|
gram_finish     the sums over the pieces, in order: a loss per layer; Δ as two half-precision numbers
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_pixels(
    x_ptr,  # [pixels, channels] of one image, fp16|bf16|fp32, or the transpose
    offs_p,  # pixels
    offs_c,  # channels
    pixels,
    stride,  # between pixels if CHANNELS_LAST, else between channels; the other one is 1
    CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """The tile [pixels, channels], read along the axis that is contiguous in memory; zero outside the map."""
    if CHANNELS_LAST:
        mask = (offs_p[:, None] < pixels) & (offs_c[None, :] < CHANNELS)
        return tl.load(x_ptr + offs_p[:, None].to(tl.int64) * stride + offs_c[None, :], mask=mask, other=0.0)
    mask = (offs_c[:, None] < CHANNELS) & (offs_p[None, :] < pixels)
    return tl.trans(tl.load(x_ptr + offs_c[:, None].to(tl.int64) * stride + offs_p[None, :], mask=mask, other=0.0))


@triton.jit
def channel_blocks(pair, BLOCKS: tl.constexpr):
    """The pair-th (i, j) with i ≤ j < BLOCKS, column by column: (0, 0), (0, 1), (1, 1), (0, 2), …"""
    i = pair
    j = 0
    for column in tl.static_range(1, BLOCKS):
        reached = pair >= column * (column + 1) // 2
        i = tl.where(reached, pair - column * (column + 1) // 2, i)
        j = tl.where(reached, column, j)
    return i, j


@triton.jit
def gram_partials_tile(
    x_ptr,  # [N, C, H, W] fp16|bf16|fp32
    partials_ptr,  # [N, pairs of channel blocks, splits, BLOCK_C, BLOCK_C] fp32
    pid,
    pixels,
    splits,
    stride_image,
    stride,
    scale,
    CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PIXELS_PER_PROGRAM: tl.constexpr,
):
    BLOCKS: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    PAIRS: tl.constexpr = BLOCKS * (BLOCKS + 1) // 2
    split = pid % splits
    i, j = channel_blocks(pid // splits % PAIRS, BLOCKS)
    x_ptr += (pid // splits // PAIRS).to(tl.int64) * stride_image
    offs_c = tl.arange(0, BLOCK_C)
    acc = tl.zeros([BLOCK_C, BLOCK_C], dtype=tl.float32)
    for k in tl.range(0, PIXELS_PER_PROGRAM, BLOCK_P):
        offs_p = split * PIXELS_PER_PROGRAM + k + tl.arange(0, BLOCK_P)
        right = load_pixels(x_ptr, offs_p, j * BLOCK_C + offs_c, pixels, stride, CHANNELS, CHANNELS_LAST)
        if BLOCKS == 1:
            left = right
        else:
            left = load_pixels(x_ptr, offs_p, i * BLOCK_C + offs_c, pixels, stride, CHANNELS, CHANNELS_LAST)
        # Scaled and added here in float32: in a tensor core's own long sum of like numbers an H200 loses 1e-5 of it.
        acc += scale * tl.dot(tl.trans(left), right, input_precision="ieee")
    offs = offs_c[:, None] * BLOCK_C + offs_c[None, :]
    tl.store(partials_ptr + pid.to(tl.int64) * BLOCK_C * BLOCK_C + offs, acc)


@triton.jit
def gram_partials_kernel(
    x_ptrs,  # for each layer: [N, C, H, W] fp16|bf16|fp32
    partials_ptrs,  # for each layer: [N, pairs of channel blocks, splits, BLOCK_C, BLOCK_C] fp32
    pixels,
    splits,
    strides_image,
    strides,
    scales,  # 1 / CHW
    ends,  # the first program of the next layer
    CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    PIXELS_PER_PROGRAM: tl.constexpr,
):
    pid = tl.program_id(0)
    start = 0
    for layer in tl.static_range(len(CHANNELS)):
        if (pid >= start) & (pid < ends[layer]):
            gram_partials_tile(
                x_ptrs[layer],
                partials_ptrs[layer],
                pid - start,
                pixels[layer],
                splits[layer],
                strides_image[layer],
                strides[layer],
                scales[layer],
                CHANNELS[layer],
                CHANNELS_LAST[layer],
                BLOCK_C[layer],
                BLOCK_P,
                PIXELS_PER_PROGRAM,
            )
        start = ends[layer]


@triton.jit
def gram_deltas_tile(
    partials_ptr,  # [N, pairs of channel blocks, splits, BLOCK_C, BLOCK_C] fp32
    target_ptr,  # [N or 1, C, C] fp32
    delta_ptr,  # [N, C, C] fp32
    piece_ptr,  # fp32: this program's Σ Δ²; `pieces` further on, its max |Δ|
    pieces,
    pid,
    splits,
    stride_target,
    CHANNELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    BLOCKS: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    PAIRS: tl.constexpr = BLOCKS * (BLOCKS + 1) // 2
    ROW_BLOCKS: tl.constexpr = BLOCK_C // BLOCK_R
    row_block = pid % ROW_BLOCKS
    pair = pid // ROW_BLOCKS % PAIRS
    image = (pid // ROW_BLOCKS // PAIRS).to(tl.int64)
    i, j = channel_blocks(pair, BLOCKS)

    rows = row_block * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.arange(0, BLOCK_C)
    partial_ptr = partials_ptr + (image * PAIRS + pair) * splits * BLOCK_C * BLOCK_C
    acc = tl.zeros([BLOCK_R, BLOCK_C], dtype=tl.float32)
    for split in range(splits):
        acc += tl.load(partial_ptr + split * BLOCK_C * BLOCK_C + rows[:, None] * BLOCK_C + columns[None, :])

    rows += i * BLOCK_C
    columns += j * BLOCK_C
    mask = (rows[:, None] < CHANNELS) & (columns[None, :] < CHANNELS)
    offs = rows[:, None] * CHANNELS + columns[None, :]
    offs_transposed = columns[None, :] * CHANNELS + rows[:, None]
    target_ptr += image * stride_target
    target = tl.load(target_ptr + offs, mask=mask, other=0.0)
    target_transposed = tl.load(target_ptr + offs_transposed, mask=mask, other=0.0)  # a target need not be symmetric
    gram = tl.where(mask, acc, 0.0)
    delta = gram - 0.5 * (target + target_transposed)
    squares = (gram - target) * (gram - target)
    delta_ptr += image * CHANNELS * CHANNELS
    tl.store(delta_ptr + offs, delta, mask=mask)
    if i < j:  # the block below the diagonal is its transpose
        tl.store(delta_ptr + offs_transposed, delta, mask=mask)
        squares += (gram - target_transposed) * (gram - target_transposed)
    tl.store(piece_ptr, tl.sum(squares))
    tl.store(piece_ptr + pieces, tl.max(tl.abs(delta)))


@triton.jit
def gram_deltas_kernel(
    partials_ptrs,  # for each layer: [N, pairs of channel blocks, splits, BLOCK_C, BLOCK_C] fp32
    target_ptrs,  # for each layer: [N or 1, C, C] fp32
    delta_ptrs,  # for each layer: [N, C, C] fp32, symmetric
    pieces_ptr,  # [2, programs] fp32: Σ Δ², max |Δ|
    splits,
    strides_target,  # 0 where one target serves all images
    ends,
    CHANNELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    pid = tl.program_id(0)
    start = 0
    for layer in tl.static_range(len(CHANNELS)):
        if (pid >= start) & (pid < ends[layer]):
            gram_deltas_tile(
                partials_ptrs[layer],
                target_ptrs[layer],
                delta_ptrs[layer],
                pieces_ptr + pid,
                tl.num_programs(0),
                pid - start,
                splits[layer],
                strides_target[layer],
                CHANNELS[layer],
                BLOCK_C[layer],
                BLOCK_R,
            )
        start = ends[layer]


@triton.jit
def gram_finish_tile(
    pieces_ptr,  # [2, pieces] fp32
    pieces,
    first,  # the pieces of this layer
    last,
    delta_ptr,  # [N, C, C] fp32
    halves_ptr,  # [N, 2, C, C] fp16|bf16
    loss_ptr,  # [1] fp32
    scale_ptr,  # [1] fp32
    pid,
    images,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sums = tl.zeros([BLOCK], dtype=tl.float32)
    maxima = tl.zeros([BLOCK], dtype=tl.float32)
    for k in range(first, last, BLOCK):
        offs = k + tl.arange(0, BLOCK)
        sums += tl.load(pieces_ptr + offs, mask=offs < last, other=0.0)
        maxima = tl.maximum(maxima, tl.load(pieces_ptr + pieces + offs, mask=offs < last, other=0.0))
    # The power of two that brings max |Δ| to between 2¹³ and 2¹⁴: nothing overflows float16, and little underflows.
    exponent = tl.max(maxima).to(tl.int32, bitcast=True) >> 23
    up = (tl.minimum(267 - exponent, 254) << 23).to(tl.float32, bitcast=True)
    if pid == 0:
        tl.store(loss_ptr, tl.sum(sums) / images)
        tl.store(scale_ptr, 1.0 / up)

    SIZE: tl.constexpr = CHANNELS * CHANNELS
    programs: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    image = (pid // programs).to(tl.int64)
    offs = pid % programs * BLOCK + tl.arange(0, BLOCK)
    delta = tl.load(delta_ptr + image * SIZE + offs, mask=offs < SIZE, other=0.0) * up
    high = delta.to(halves_ptr.dtype.element_ty)
    low = (delta - high.to(tl.float32)).to(halves_ptr.dtype.element_ty)
    tl.store(halves_ptr + 2 * image * SIZE + offs, high, mask=offs < SIZE)
    tl.store(halves_ptr + (2 * image + 1) * SIZE + offs, low, mask=offs < SIZE)


@triton.jit
def gram_finish_kernel(
    pieces_ptr,  # [2, pieces] fp32: Σ Δ², max |Δ|
    delta_ptrs,  # for each layer: [N, C, C] fp32
    halves_ptrs,  # for each layer: [N, 2, C, C] fp16|bf16: Δ = (high + low) · scale
    losses_ptr,  # [layers] fp32
    scales_ptr,  # [layers] fp32
    images,
    piece_ends,
    ends,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    start = 0
    first = 0
    for layer in tl.static_range(len(CHANNELS)):
        if (pid >= start) & (pid < ends[layer]):
            gram_finish_tile(
                pieces_ptr,
                piece_ends[len(CHANNELS) - 1],
                first,
                piece_ends[layer],
                delta_ptrs[layer],
                halves_ptrs[layer],
                losses_ptr + layer,
                scales_ptr + layer,
                pid - start,
                images,
                CHANNELS[layer],
                BLOCK,
            )
        start = ends[layer]
        first = piece_ends[layer]
