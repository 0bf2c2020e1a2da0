"""Instance norm from statistics by tiles: each (count, mean, M2 about that mean), as the convolutions leave them.

    statistics      the tiles of a tensor that a library's convolution made; reads it once
    scale_shift     weight / σ and bias − μ · weight / σ, from an image's tiles by Chan's formula, in fixed order
    instance_norm   x · scale + shift, the skip, ReLU; in one pass

All tensors are NHWC; a skip may be a window of a larger map. No atomics: the result is the same bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

import torch
import triton
import triton.language as tl
from fastperc.kernels.configs import Variant
from fastperc.kernels.conv_bn_relu import store_partials
from torch import Tensor

BLOCK = 8192  # elements to a program of the passes over memory
MAX_BLOCK_CHANNELS = 64  # of them: 128 bytes in half precision
BLOCK_TILES, BLOCK_CHANNELS = 512, 8  # of scale_shift: 32 bytes of a tile's line
PASS_OPTIONS = dict(num_warps=8, num_stages=1)
SCALE_SHIFT_OPTIONS = dict(num_warps=8, num_stages=1)


@triton.jit
def place(pid, pixels, CHANNELS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """The image, the tile, and the tile's pixels and channels, of a program that takes [BLOCK_P, BLOCK_C] elements."""
    BLOCKS: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    tiles = tl.cdiv(pixels, BLOCK_P)
    tile = pid // BLOCKS % tiles
    offs_p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    offs_c = pid % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    return (pid // BLOCKS // tiles).to(tl.int64), tile, offs_p, offs_c


@triton.jit
def statistics_kernel(
    x_ptr,  # [N, pixels, C] fp16|bf16|fp32
    partials_ptr,  # [N, tiles, 3, C] fp32
    pixels,
    CHANNELS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    image, tile, offs_p, offs_c = place(tl.program_id(0), pixels, CHANNELS, BLOCK_P, BLOCK_C)
    mask = (offs_p[:, None] < pixels) & (offs_c[None, :] < CHANNELS)
    offs = (image * pixels + offs_p[:, None]) * CHANNELS + offs_c[None, :]
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    partials_ptr += (image * tl.cdiv(pixels, BLOCK_P) + tile) * 3 * CHANNELS
    store_partials(partials_ptr, x.T, offs_c, offs_p < pixels, CHANNELS)


@triton.jit
def scale_shift_kernel(
    partials_ptr,  # [N, tiles, 3, C] fp32
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    scale_ptr,  # [N, C] fp32
    shift_ptr,  # [N, C] fp32
    tiles,
    eps,
    CHANNELS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    BLOCKS: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    image = (pid // BLOCKS).to(tl.int64)
    offs_c = pid % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < CHANNELS
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
        total = count + tile_count
        share = tile_count / tl.maximum(total, 1.0)  # 0 beyond the tiles
        mean += difference * share
        m2 += tl.load(partial_ptrs + 2 * CHANNELS, mask=mask, other=0.0) + difference * difference * count * share
        count = total
    total = tl.sum(count, axis=0)
    center = tl.sum(count * mean, axis=0) / total
    difference = mean - center[None, :]
    variance = tl.sum(m2 + difference * difference * count, axis=0) / total
    weight = tl.load(weight_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    scale = weight / tl.sqrt(variance + eps)
    offs = image * CHANNELS + offs_c
    tl.store(scale_ptr + offs, scale, mask=mask_c)
    tl.store(shift_ptr + offs, bias - center * scale, mask=mask_c)


@triton.jit
def instance_norm_kernel(
    x_ptr,  # [N, H, W, C] fp16|bf16|fp32
    scale_ptr,  # [N, C] fp32
    shift_ptr,  # [N, C] fp32
    skip_ptr,  # [N, H, W, C] with strides for all but C; or None
    out_ptr,  # [N, H, W, C]; may be x_ptr
    height,
    width,
    skip_stride_image,
    skip_stride_row,
    skip_stride_column,
    CHANNELS: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    pixels = height * width
    image, _, offs_p, offs_c = place(tl.program_id(0), pixels, CHANNELS, BLOCK_P, BLOCK_C)
    mask_c = offs_c < CHANNELS
    mask = (offs_p[:, None] < pixels) & mask_c[None, :]
    scale = tl.load(scale_ptr + image * CHANNELS + offs_c, mask=mask_c, other=0.0)
    shift = tl.load(shift_ptr + image * CHANNELS + offs_c, mask=mask_c, other=0.0)
    offs = (image * pixels + offs_p[:, None]) * CHANNELS + offs_c[None, :]
    y = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32) * scale[None, :] + shift[None, :]
    if skip_ptr is not None:
        offs_skip = image * skip_stride_image + (offs_p // width).to(tl.int64) * skip_stride_row
        offs_skip += (offs_p % width).to(tl.int64) * skip_stride_column
        y += tl.load(skip_ptr + offs_skip[:, None] + offs_c[None, :], mask=mask, other=0.0).to(tl.float32)
    if RELU:
        y = tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out_ptr + offs, y.to(out_ptr.dtype.element_ty), mask=mask)


def _block(channels: int) -> dict[str, int]:
    block_c = min(triton.next_power_of_2(channels), MAX_BLOCK_CHANNELS)
    return dict(BLOCK_P=BLOCK // block_c, BLOCK_C=block_c)


def _programs(shape: Sequence[int]) -> int:
    return shape[0] * statistics_tiles(shape) * triton.cdiv(shape[1], _block(shape[1])["BLOCK_C"])


def statistics_tiles(x_shape: Sequence[int]) -> int:
    """How many tiles an image of ``x_shape`` [N, C, H, W] is made of: the second size of ``partials``."""
    return triton.cdiv(prod(x_shape[2:]), _block(x_shape[1])["BLOCK_P"])


def statistics_fwd(x: Tensor, partials: Tensor) -> None:
    """Fills ``partials`` [N, tiles, 3, C] with the count, mean and M2 of each tile of ``x`` [N, C, H, W]."""
    _, channels, height, width = x.shape
    statistics_kernel[(_programs(x.shape),)](
        x, partials, height * width, CHANNELS=channels, **_block(channels), **PASS_OPTIONS
    )


def instance_norm_fwd(
    x: Tensor,
    partials: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    skip: Tensor | None,
    relu: bool,
    out: Tensor,
) -> None:
    """Fills ``out``, which may be ``x`` [N, C, H, W], with relu(norm(``x``) + ``skip``), given the partials of x."""
    images, channels, height, width = x.shape
    scale, shift = torch.empty(2, images, channels, device=x.device)
    scale_shift_kernel[(images * triton.cdiv(channels, BLOCK_CHANNELS),)](
        partials,
        weight,
        bias,
        scale,
        shift,
        partials.shape[1],
        eps,
        CHANNELS=channels,
        BLOCK_T=BLOCK_TILES,
        BLOCK_C=BLOCK_CHANNELS,
        **SCALE_SHIFT_OPTIONS,
    )
    skip_strides = (0, 0, 0) if skip is None else (skip.stride(0), skip.stride(2), skip.stride(3))
    instance_norm_kernel[(_programs(x.shape),)](
        x,
        scale,
        shift,
        skip,
        out,
        height,
        width,
        *skip_strides,
        CHANNELS=channels,
        RELU=relu,
        **_block(channels),
        **PASS_OPTIONS,
    )


def variants() -> Iterator[Variant]:
    """The channels of the paper's networks."""
    strides = ("skip_stride_image", "skip_stride_row", "skip_stride_column")
    for channels in (16, 32, 64, 128):
        constants = dict(CHANNELS=channels, **_block(channels))
        for dtype in ("bf16", "fp16", "fp32"):
            x = f"*{dtype}"
            yield Variant(
                statistics_kernel,
                f"{dtype} C{channels}",
                dict(x_ptr=x, partials_ptr="*fp32", pixels="i32"),
                constants,
                **PASS_OPTIONS,
                aligned=("x_ptr", "partials_ptr", "pixels"),
            )
            for skip in (dict(skip_ptr=x), {}):
                pointers = dict(x_ptr=x, scale_ptr="*fp32", shift_ptr="*fp32", out_ptr=x, **skip)
                yield Variant(
                    instance_norm_kernel,
                    f"{dtype} C{channels} {'skip' if skip else 'relu'}",
                    dict(height="i32", width="i32", **pointers, **dict.fromkeys(strides, "i32")),
                    dict(RELU=not skip, **constants, **({} if skip else dict(skip_ptr=None))),
                    **PASS_OPTIONS,
                    aligned=(*pointers, *strides),
                )
        pointers = dict.fromkeys(("partials_ptr", "weight_ptr", "bias_ptr", "scale_ptr", "shift_ptr"), "*fp32")
        yield Variant(
            scale_shift_kernel,
            f"fp32 C{channels}",
            dict(tiles="i32", eps="fp32", **pointers),
            dict(CHANNELS=channels, BLOCK_T=BLOCK_TILES, BLOCK_C=BLOCK_CHANNELS),
            **SCALE_SHIFT_OPTIONS,
            aligned=tuple(pointers),
        )
