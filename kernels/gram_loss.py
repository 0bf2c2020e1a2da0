"""The style loss of several feature maps at once: Gram matrices split over pixels, and the gradient.

All layers share each launch: a program finds its layer by its number, and each layer brings its own block sizes.

    gram_partials   Σ over a range of pixels of F_i F_jᵀ, for a pair of channel blocks i ≤ j    reads the features once
    gram_deltas     the ranges added up in order, scaled, minus the target: Δ = G − A; ‖Δ‖² and max |Δ| by pieces
    gram_finish     the pieces added up in order, a loss a layer; Δ as two half-precision numbers for the backward
    gram_loss_bwd   F · Δ, scaled

Products accumulate in float32 and nothing is narrowed before it is scaled: no Gram matrix overflows. No atomics:
the result is the same bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fastperc.kernels.configs import Variant

BLOCK_PIXELS_FWD = 64
BLOCK_PIXELS_BWD = 128
BLOCK_ROWS = 16  # of a Gram matrix, to a program of gram_deltas
PIXELS_PER_PROGRAM = 2048
BLOCK_FINISH = 512  # elements of a Gram matrix, to a program of gram_finish
MAX_BLOCK_CHANNELS = 128
OPTIONS = {
    "gram_partials_kernel": dict(num_warps=8, num_stages=4),
    "gram_deltas_kernel": dict(num_warps=4, num_stages=1),
    "gram_finish_kernel": dict(num_warps=4, num_stages=1),
    "gram_loss_bwd_kernel": dict(num_warps=8, num_stages=2),
}


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
    """The tile [pixels, channels], read along whichever of the two is contiguous; zero beyond either."""
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
        beyond = pair >= column * (column + 1) // 2
        i = tl.where(beyond, pair - column * (column + 1) // 2, i)
        j = tl.where(beyond, column, j)
    return i, j


@triton.jit
def gram_partials_tile(
    x_ptr,
    partials_ptr,
    pid,
    pixels,
    splits,
    stride_image,
    stride,
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
        acc = tl.dot(tl.trans(left), right, acc, input_precision="ieee")
    offs = offs_c[:, None] * BLOCK_C + offs_c[None, :]
    tl.store(partials_ptr + pid.to(tl.int64) * BLOCK_C * BLOCK_C + offs, acc)


@triton.jit
def gram_partials_kernel(
    x_ptrs,  # a layer each: [N, C, H, W] fp16|bf16|fp32
    partials_ptrs,  # a layer each: [N, pairs of channel blocks, splits, BLOCK_C, BLOCK_C] fp32
    pixels,
    splits,
    strides_image,
    strides,
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
                CHANNELS[layer],
                CHANNELS_LAST[layer],
                BLOCK_C[layer],
                BLOCK_P,
                PIXELS_PER_PROGRAM,
            )
        start = ends[layer]


@triton.jit
def gram_deltas_tile(
    partials_ptr,
    target_ptr,
    delta_ptr,
    piece_ptr,
    pieces,
    pid,
    splits,
    stride_target,
    scale,
    CHANNELS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    BLOCKS: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    PAIRS: tl.constexpr = BLOCKS * (BLOCKS + 1) // 2
    BANDS: tl.constexpr = BLOCK_C // BLOCK_R
    band = pid % BANDS
    pair = pid // BANDS % PAIRS
    image = (pid // BANDS // PAIRS).to(tl.int64)
    i, j = channel_blocks(pair, BLOCKS)

    rows = band * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = tl.arange(0, BLOCK_C)
    partial_ptr = partials_ptr + (image * PAIRS + pair) * splits * BLOCK_C * BLOCK_C
    acc = tl.zeros([BLOCK_R, BLOCK_C], dtype=tl.float32)
    for split in range(splits):
        acc += tl.load(partial_ptr + split * BLOCK_C * BLOCK_C + rows[:, None] * BLOCK_C + columns[None, :])

    rows += i * BLOCK_C
    columns += j * BLOCK_C
    mask = (rows[:, None] < CHANNELS) & (columns[None, :] < CHANNELS)
    offs = rows[:, None] * CHANNELS + columns[None, :]
    offs_mirrored = columns[None, :] * CHANNELS + rows[:, None]
    target_ptr += image * stride_target
    target = tl.load(target_ptr + offs, mask=mask, other=0.0)
    mirrored = tl.load(target_ptr + offs_mirrored, mask=mask, other=0.0)  # a target need not be symmetric
    gram = tl.where(mask, acc * scale, 0.0)
    delta = gram - 0.5 * (target + mirrored)
    squares = (gram - target) * (gram - target)
    delta_ptr += image * CHANNELS * CHANNELS
    tl.store(delta_ptr + offs, delta, mask=mask)
    if i < j:  # stands for the block below the diagonal too
        tl.store(delta_ptr + offs_mirrored, delta, mask=mask)
        squares += (gram - mirrored) * (gram - mirrored)
    tl.store(piece_ptr, tl.sum(squares))
    tl.store(piece_ptr + pieces, tl.max(tl.abs(delta)))


@triton.jit
def gram_deltas_kernel(
    partials_ptrs,  # a layer each: [N, pairs of channel blocks, splits, BLOCK_C, BLOCK_C] fp32
    target_ptrs,  # a layer each: [N or 1, C, C] fp32
    delta_ptrs,  # a layer each: [N, C, C] fp32, symmetric
    pieces_ptr,  # [2, programs] fp32: Σ Δ², max |Δ|
    splits,
    strides_target,  # 0 where one target serves all images
    scales,  # 1 / CHW
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
                scales[layer],
                CHANNELS[layer],
                BLOCK_C[layer],
                BLOCK_R,
            )
        start = ends[layer]


@triton.jit
def gram_finish_tile(
    pieces_ptr,
    pieces,
    first,
    last,
    delta_ptr,
    halves_ptr,
    loss_ptr,
    scale_ptr,
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
    # The power of two that brings max |Δ| to 2¹³ or a little more: nothing overflows float16, little underflows.
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
    delta_ptrs,  # a layer each: [N, C, C] fp32
    halves_ptrs,  # a layer each: [N, 2, C, C] fp16|bf16: Δ = (high + low) · scale
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


@triton.jit
def times_delta(
    x_ptr,  # [pixels, channels] of one image
    halves_ptr,  # [2, channels, channels] of that image
    offs_p,
    offs_c,
    pixels,
    stride,
    CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The tile [offs_p, offs_c] of F · (high + low) in float32: a product as exact as F is."""
    acc = tl.zeros([offs_p.shape[0], offs_c.shape[0]], dtype=tl.float32)
    for k in tl.range(0, CHANNELS, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        x = load_pixels(x_ptr, offs_p, offs_k, pixels, stride, CHANNELS, CHANNELS_LAST)
        high_ptrs = halves_ptr + offs_k[:, None] * CHANNELS + offs_c[None, :]
        mask = (offs_k[:, None] < CHANNELS) & (offs_c[None, :] < CHANNELS)
        acc = tl.dot(x, tl.load(high_ptrs, mask=mask, other=0.0), acc, input_precision="ieee")
        low = tl.load(high_ptrs + CHANNELS * CHANNELS, mask=mask, other=0.0)
        acc = tl.dot(x, low, acc, input_precision="ieee")
    return acc


@triton.jit
def gram_loss_bwd_tile(
    x_ptr,
    halves_ptr,
    grad_ptr,
    pid,
    pixels,
    stride_image,
    stride,
    grad_stride_image,
    grad_stride,
    scale,
    CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    GRAD_CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    BLOCKS: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    tiles = tl.cdiv(pixels, BLOCK_P)
    offs_c = pid % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_p = pid // BLOCKS % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    image = (pid // BLOCKS // tiles).to(tl.int64)
    acc = times_delta(
        x_ptr + image * stride_image,
        halves_ptr + image * 2 * CHANNELS * CHANNELS,
        offs_p,
        offs_c,
        pixels,
        stride,
        CHANNELS,
        CHANNELS_LAST,
        BLOCK_K,
    )
    grad = (acc * scale).to(grad_ptr.dtype.element_ty)
    grad_ptr += image * grad_stride_image
    mask = (offs_p[:, None] < pixels) & (offs_c[None, :] < CHANNELS)
    if GRAD_CHANNELS_LAST:
        tl.store(grad_ptr + offs_p[:, None].to(tl.int64) * grad_stride + offs_c[None, :], grad, mask=mask)
    else:
        tl.store(grad_ptr + offs_c[None, :].to(tl.int64) * grad_stride + offs_p[:, None], grad, mask=mask)


@triton.jit
def gram_loss_bwd_kernel(
    x_ptrs,  # a layer each: [N, C, H, W] fp16|bf16|fp32
    halves_ptrs,  # a layer each: [N, 2, C, C] fp16|bf16
    grad_ptrs,  # a layer each: as x
    scales_ptr,  # [layers] fp32, of the halves
    grad_losses_ptr,  # [layers] fp32
    pixels,
    strides_image,
    strides,
    grad_strides_image,
    grad_strides,
    coefficients,  # 4 / NCHW
    ends,
    CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    GRAD_CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    pid = tl.program_id(0)
    start = 0
    for layer in tl.static_range(len(CHANNELS)):
        if (pid >= start) & (pid < ends[layer]):
            gram_loss_bwd_tile(
                x_ptrs[layer],
                halves_ptrs[layer],
                grad_ptrs[layer],
                pid - start,
                pixels[layer],
                strides_image[layer],
                strides[layer],
                grad_strides_image[layer],
                grad_strides[layer],
                coefficients[layer] * tl.load(scales_ptr + layer) * tl.load(grad_losses_ptr + layer),
                CHANNELS[layer],
                CHANNELS_LAST[layer],
                GRAD_CHANNELS_LAST[layer],
                BLOCK_C[layer],
                BLOCK_P,
                BLOCK_K[layer],
            )
        start = ends[layer]


class Layer(NamedTuple):
    """A feature map as the kernels see it."""

    x: Tensor  # [N, C, H, W]
    channels_last: bool
    stride_image: int
    stride: int  # between pixels if channels_last, else between channels

    @property
    def images(self) -> int:
        return self.x.shape[0]

    @property
    def channels(self) -> int:
        return self.x.shape[1]

    @property
    def pixels(self) -> int:
        return self.x.shape[2] * self.x.shape[3]

    @property
    def block(self) -> int:
        return min(max(triton.next_power_of_2(self.channels), 16), MAX_BLOCK_CHANNELS)

    @property
    def blocks(self) -> int:
        return triton.cdiv(self.channels, self.block)

    @property
    def pairs(self) -> int:
        return self.blocks * (self.blocks + 1) // 2

    @property
    def splits(self) -> int:
        return triton.cdiv(self.pixels, PIXELS_PER_PROGRAM)


def as_layer(x: Tensor) -> Layer:
    """``x`` [N, C, H, W], copied if its pixels are not evenly spaced."""
    height, width = x.shape[2:]
    if x.stride(1) == 1 and (x.stride(2) == width * x.stride(3) or height == 1):
        return Layer(x, True, x.stride(0), x.stride(3))
    if x.stride(3) != 1 or (x.stride(2) != width and height > 1):
        x = x.contiguous()
    return Layer(x, False, x.stride(0), x.stride(1))


def ends(programs: Sequence[int]) -> tuple[int, ...]:
    """Where each layer's programs end."""
    return tuple(sum(programs[: i + 1]) for i in range(len(programs)))


def gram_loss_fwd(
    features: Sequence[Tensor], targets: Sequence[Tensor], losses: Tensor, scales: Tensor, halves: Sequence[Tensor]
) -> None:
    """Fills ``losses`` [layers], and for the backward ``scales`` [layers] and ``halves``, [N, 2, C, C] a layer.

    ``features``: [N, C, H, W] a layer, float16 or bfloat16, as the halves are. ``targets``: [N or 1, C, C] a layer,
    float32, contiguous.
    """
    layers = [as_layer(x) for x in features]
    shapes = [(layer.images, layer.pairs, layer.splits, layer.block, layer.block) for layer in layers]
    partials = [losses.new_empty(shape) for shape in shapes]
    partial_ends = ends([layer.images * layer.pairs * layer.splits for layer in layers])
    channels, block = tuple(layer.channels for layer in layers), tuple(layer.block for layer in layers)
    splits = tuple(layer.splits for layer in layers)
    gram_partials_kernel[(partial_ends[-1],)](
        tuple(layer.x for layer in layers),
        tuple(partials),
        tuple(layer.pixels for layer in layers),
        splits,
        tuple(layer.stride_image for layer in layers),
        tuple(layer.stride for layer in layers),
        partial_ends,
        CHANNELS=channels,
        CHANNELS_LAST=tuple(layer.channels_last for layer in layers),
        BLOCK_C=block,
        BLOCK_P=BLOCK_PIXELS_FWD,
        PIXELS_PER_PROGRAM=PIXELS_PER_PROGRAM,
        **OPTIONS["gram_partials_kernel"],
    )
    piece_ends = ends([layer.images * layer.pairs * (layer.block // BLOCK_ROWS) for layer in layers])
    pieces = losses.new_empty(2, piece_ends[-1])
    deltas = tuple(losses.new_empty(layer.images, layer.channels, layer.channels) for layer in layers)
    gram_deltas_kernel[(piece_ends[-1],)](
        tuple(partials),
        tuple(targets),
        deltas,
        pieces,
        splits,
        tuple(target.stride(0) if target.shape[0] > 1 else 0 for target in targets),
        tuple(1 / (layer.channels * layer.pixels) for layer in layers),
        piece_ends,
        CHANNELS=channels,
        BLOCK_C=block,
        BLOCK_R=BLOCK_ROWS,
        **OPTIONS["gram_deltas_kernel"],
    )
    finish_ends = ends([layer.images * triton.cdiv(layer.channels**2, BLOCK_FINISH) for layer in layers])
    gram_finish_kernel[(finish_ends[-1],)](
        pieces,
        deltas,
        tuple(halves),
        losses,
        scales,
        layers[0].images,
        piece_ends,
        finish_ends,
        CHANNELS=channels,
        BLOCK=BLOCK_FINISH,
        **OPTIONS["gram_finish_kernel"],
    )


def gram_loss_bwd(
    features: Sequence[Tensor], scales: Tensor, halves: Sequence[Tensor], grad_losses: Tensor, grads: Sequence[Tensor]
) -> None:
    """Fills ``grads``, each as its feature map, given ``grad_losses`` [layers] float32 and what the forward left."""
    layers, outs = [as_layer(x) for x in features], [as_layer(grad) for grad in grads]
    bwd_ends = ends([layer.images * layer.blocks * triton.cdiv(layer.pixels, BLOCK_PIXELS_BWD) for layer in layers])
    gram_loss_bwd_kernel[(bwd_ends[-1],)](
        tuple(layer.x for layer in layers),
        tuple(halves),
        tuple(out.x for out in outs),
        scales,
        grad_losses,
        tuple(layer.pixels for layer in layers),
        tuple(layer.stride_image for layer in layers),
        tuple(layer.stride for layer in layers),
        tuple(out.stride_image for out in outs),
        tuple(out.stride for out in outs),
        tuple(4 / layer.x.numel() for layer in layers),
        bwd_ends,
        CHANNELS=tuple(layer.channels for layer in layers),
        CHANNELS_LAST=tuple(layer.channels_last for layer in layers),
        GRAD_CHANNELS_LAST=tuple(out.channels_last for out in outs),
        BLOCK_C=tuple(layer.block for layer in layers),
        BLOCK_P=BLOCK_PIXELS_BWD,
        BLOCK_K=tuple(min(layer.block, 64) for layer in layers),
        **OPTIONS["gram_loss_bwd_kernel"],
    )


def variants() -> Iterator[Variant]:
    """The paper's four style layers, in both half precisions and layouts."""
    channels = (64, 128, 256, 512)
    block = tuple(min(c, MAX_BLOCK_CHANNELS) for c in channels)
    fp32, ints, floats = ("*fp32",) * 4, ("i32",) * 4, ("fp32",) * 4
    for dtype in ("bf16", "fp16"):
        yield Variant(
            gram_finish_kernel,
            dtype,
            dict(
                pieces_ptr="*fp32",
                delta_ptrs=fp32,
                halves_ptrs=(f"*{dtype}",) * 4,
                losses_ptr="*fp32",
                scales_ptr="*fp32",
                images="i32",
                piece_ends=ints,
                ends=ints,
            ),
            dict(CHANNELS=channels, BLOCK=BLOCK_FINISH),
            **OPTIONS["gram_finish_kernel"],
            aligned=("pieces_ptr", "delta_ptrs", "halves_ptrs"),
        )
        for channels_last in (True, False):
            config = f"{dtype} {'NHWC' if channels_last else 'NCHW'}"
            x = (f"*{dtype}",) * 4
            layout = (channels_last,) * 4
            yield Variant(
                gram_partials_kernel,
                config,
                dict(
                    x_ptrs=x, partials_ptrs=fp32, pixels=ints, splits=ints, strides_image=ints, strides=ints, ends=ints
                ),
                dict(
                    CHANNELS=channels,
                    CHANNELS_LAST=layout,
                    BLOCK_C=block,
                    BLOCK_P=BLOCK_PIXELS_FWD,
                    PIXELS_PER_PROGRAM=PIXELS_PER_PROGRAM,
                ),
                **OPTIONS["gram_partials_kernel"],
                aligned=("x_ptrs", "partials_ptrs", "strides_image", "strides"),
                matrix=True,
            )
            yield Variant(
                gram_loss_bwd_kernel,
                config,
                dict(
                    x_ptrs=x,
                    halves_ptrs=x,
                    grad_ptrs=x,
                    scales_ptr="*fp32",
                    grad_losses_ptr="*fp32",
                    pixels=ints,
                    strides_image=ints,
                    strides=ints,
                    grad_strides_image=ints,
                    grad_strides=ints,
                    coefficients=floats,
                    ends=ints,
                ),
                dict(
                    CHANNELS=channels,
                    CHANNELS_LAST=layout,
                    GRAD_CHANNELS_LAST=layout,
                    BLOCK_C=block,
                    BLOCK_P=BLOCK_PIXELS_BWD,
                    BLOCK_K=(64,) * 4,
                ),
                **OPTIONS["gram_loss_bwd_kernel"],
                aligned=(
                    "x_ptrs",
                    "halves_ptrs",
                    "grad_ptrs",
                    "strides_image",
                    "strides",
                    "grad_strides_image",
                    "grad_strides",
                ),
                matrix=True,
            )
    yield Variant(
        gram_deltas_kernel,
        "fp32",
        dict(
            partials_ptrs=fp32,
            target_ptrs=fp32,
            delta_ptrs=fp32,
            pieces_ptr="*fp32",
            splits=ints,
            strides_target=ints,
            scales=floats,
            ends=ints,
        ),
        dict(CHANNELS=channels, BLOCK_C=block, BLOCK_R=BLOCK_ROWS),
        **OPTIONS["gram_deltas_kernel"],
        aligned=("partials_ptrs", "target_ptrs", "delta_ptrs", "pieces_ptr", "strides_target"),
    )
