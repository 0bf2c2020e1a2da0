"""The gradient of a convolution's weight: for each tap a product over the pixels, of two maps shifted by the tap.

    out[d, tap, g] = Σ over images and pixels of dense[pixel, d] · gathered[pixel · stride + tap, g]

One of the maps is the layer's input, the other the gradient of its output. A convolution gathers the input, a ½-stride
convolution the gradient. The taps and channels of the gathered map are the columns of one product: a program takes a
block of it, which may have several taps, and a part of the pixels, tile by tile through all images. The parts are added
up afterwards, in order: by ``fastperc.kernels.sum_parts``. ``rgb_weight_gradient`` beside it serves a network's two
ends.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fastperc.kernels.configs import multiprocessors, register_options
from fastperc.kernels.sum_parts import SumOf

FEWEST_STEPS = 4  # of a program, so that adding up the parts does not outweigh the products


@triton.jit
def reflected(i, size):
    """What ``reflect_once`` gives, in operations by which Triton sees that neighbouring columns have the same i."""
    i = tl.where(i < 0, -i, i)
    return tl.where(i < size, i, 2 * (size - 1) - i)


@triton.jit(
    do_not_specialize=[
        "images",
        "height",
        "width",
        "gathered_height",
        "gathered_width",
        "left",
        "top",
        "part_tiles",
    ]
)
def weight_gradient_kernel(
    dense_ptr,  # [N, H, W, D] fp16|bf16|fp32
    gathered_ptr,  # [N, gathered_height, gathered_width, G] as dense
    partials_ptr,  # [parts, D, TAPS_H, TAPS_W, G] fp32
    images,
    height,  # of dense
    width,
    gathered_height,  # after the upsampling
    gathered_width,
    left,  # padding
    top,
    part_tiles,  # tiles of a part
    DENSE_CHANNELS: tl.constexpr,
    CHANNELS: tl.constexpr,  # of gathered
    TAPS_H: tl.constexpr,
    TAPS_W: tl.constexpr,
    STRIDE: tl.constexpr,
    UPSAMPLE: tl.constexpr,  # 2: each pixel of gathered counts as four
    REFLECT: tl.constexpr,  # whether gathered has a reflected border
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,  # columns of the product: taps and channels of gathered
    TILE_H: tl.constexpr,  # of the pixels of dense
    TILE_W: tl.constexpr,
):
    COLUMNS: tl.constexpr = TAPS_H * TAPS_W * CHANNELS
    BLOCKS_D: tl.constexpr = (DENSE_CHANNELS + BLOCK_D - 1) // BLOCK_D
    BLOCKS_N: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    first_n = pid % BLOCKS_N * BLOCK_N
    offs_n = first_n + tl.arange(0, BLOCK_N)
    offs_d = pid // BLOCKS_N % BLOCKS_D * BLOCK_D + tl.arange(0, BLOCK_D)
    part = pid // BLOCKS_N // BLOCKS_D
    mask_d = (offs_d < DENSE_CHANNELS)[None, :]
    mask_n = (offs_n < COLUMNS)[None, :]
    if CHANNELS % BLOCK_N == 0:
        tap = first_n // CHANNELS
    else:
        tap = (offs_n // CHANNELS)[None, :]
    row_offset = tap // TAPS_W - top
    column_offset = tap % TAPS_W - left
    offs_p = tl.arange(0, TILE_H * TILE_W)
    rows = (offs_p // TILE_W)[:, None]
    columns = (offs_p % TILE_W)[:, None]
    offs_dense = (rows * width + columns) * DENSE_CHANNELS + offs_d[None, :]
    gathered_width_in_memory = gathered_width // UPSAMPLE
    tiles_w = tl.cdiv(width, TILE_W)
    tiles = tl.cdiv(height, TILE_H) * tiles_w  # of an image
    first_tile = part * part_tiles
    image = (first_tile // tiles).to(tl.int64)
    first_row = first_tile % tiles // tiles_w * TILE_H
    first_column = first_tile % tiles_w * TILE_W

    acc = tl.zeros([BLOCK_D, BLOCK_N], dtype=tl.float32)
    for _ in tl.range(tl.minimum(part_tiles, images * tiles - first_tile)):
        # 64 bits for the first pixel and the first row only: in a tile 32 are enough.
        first_pixel = (image * height + first_row) * width + first_column
        mask = (first_row + rows < height) & (first_column + columns < width)
        if DENSE_CHANNELS % BLOCK_D != 0:
            mask = mask & mask_d
        mask = tl.broadcast_to(mask, [TILE_H * TILE_W, BLOCK_D])
        dense = tl.load(dense_ptr + first_pixel * DENSE_CHANNELS + offs_dense, mask=mask, other=0.0)

        row = (first_row + rows) * STRIDE + row_offset
        column = (first_column + columns) * STRIDE + column_offset
        if REFLECT:
            row = reflected(row, gathered_height)
            column = reflected(column, gathered_width)
        mask = (row.to(tl.uint32) < gathered_height.to(tl.uint32)) & (
            column.to(tl.uint32) < gathered_width.to(tl.uint32)
        )
        if COLUMNS % BLOCK_N != 0:
            mask = mask & mask_n
        mask = tl.broadcast_to(mask, [TILE_H * TILE_W, BLOCK_N])
        first_row_in_memory = first_row * STRIDE // UPSAMPLE
        first_pixel = (image * (gathered_height // UPSAMPLE) + first_row_in_memory) * gathered_width_in_memory
        pixels = (row // UPSAMPLE - first_row_in_memory) * gathered_width_in_memory + column // UPSAMPLE
        offs_gathered = pixels * CHANNELS + (offs_n % CHANNELS)[None, :]
        gathered = tl.load(gathered_ptr + first_pixel * CHANNELS + offs_gathered, mask=mask, other=0.0)
        acc = tl.dot(dense.T, gathered, acc, input_precision="ieee")

        first_column += TILE_W  # the next tile, without a division
        ends = first_column >= width
        first_column = tl.where(ends, 0, first_column)
        first_row += tl.where(ends, TILE_H, 0)
        ends = first_row >= height
        first_row = tl.where(ends, 0, first_row)
        image += ends.to(tl.int64)
    offs = (part.to(tl.int64) * DENSE_CHANNELS + offs_d[:, None]) * COLUMNS + offs_n[None, :]
    tl.store(partials_ptr + offs, acc, mask=(offs_d < DENSE_CHANNELS)[:, None] & mask_n)


class Geometry(NamedTuple):
    """Which pixels of the gathered map are multiplied with a pixel of the dense one."""

    taps: tuple[int, int]  # rows and columns
    top: int = 0  # padding of the gathered map
    left: int = 0
    stride: int = 1
    upsample: int = 1  # 2: each pixel of the gathered map counts as four
    reflect: bool = False  # the gathered map has a reflected border


def _block(itemsize: int, dense_channels: int, columns: int) -> tuple[dict[str, int], int]:
    """Block sizes, warps and stages; and programs a multiprocessor."""
    block_d, block_n = (max(triton.next_power_of_2(c), 16) for c in (dense_channels, columns))
    if itemsize == 4:
        block = dict(BLOCK_D=min(block_d, 64), BLOCK_N=min(block_n, 32), TILE_H=4, TILE_W=4, num_warps=8, num_stages=3)
        return block, 2
    block_d = min(max(block_d, 64), 128)  # 64 rows, as the tensor cores take them
    block_n = min(block_n, 128 if columns > 512 else 64)  # so that few columns are left empty
    num_warps = 8 if block_d * block_n == 128 * 128 else 4
    block = dict(BLOCK_D=block_d, BLOCK_N=block_n, TILE_H=8, TILE_W=8, num_warps=num_warps, num_stages=3)
    return block, 2 if block_n < 128 else 1  # more programs would leave more parts to add up


def parts_of(steps: int, blocks: int, programs: int) -> tuple[int, int]:
    """Into how many parts a sum of ``steps`` is split, and the steps of a part. ``blocks`` programs share a part, and
    all are no more than ``programs``, which the GPU runs at a time: no second wave is left half empty."""
    parts = max(min(programs // blocks, steps // FEWEST_STEPS), 1)
    part_steps = triton.cdiv(steps, parts)
    return triton.cdiv(steps, part_steps), part_steps


def weight_gradient(dense: Tensor, gathered: Tensor, geometry: Geometry, destination: SumOf) -> None:
    """Makes ``destination`` [D, rows, columns, G] from two maps [N, C, H, W] that are dense in NHWC."""
    images, dense_channels, height, width = dense.shape
    _, channels, gathered_height, gathered_width = gathered.shape
    shape = (dense_channels, *geometry.taps, channels)
    columns = prod(shape[1:])
    block, per_multiprocessor = _block(dense.element_size(), dense_channels, columns)
    blocks = triton.cdiv(dense_channels, block["BLOCK_D"]) * triton.cdiv(columns, block["BLOCK_N"])
    tiles = images * triton.cdiv(height, block["TILE_H"]) * triton.cdiv(width, block["TILE_W"])
    parts, part_tiles = parts_of(tiles, blocks, per_multiprocessor * multiprocessors(dense.device))
    partials = destination.empty(parts, shape, shape)
    weight_gradient_kernel[(parts * blocks,)](
        dense,
        gathered,
        partials,
        images,
        height,
        width,
        gathered_height * geometry.upsample,
        gathered_width * geometry.upsample,
        geometry.left,
        geometry.top,
        part_tiles,
        DENSE_CHANNELS=dense_channels,
        CHANNELS=channels,
        TAPS_H=geometry.taps[0],
        TAPS_W=geometry.taps[1],
        STRIDE=geometry.stride,
        UPSAMPLE=geometry.upsample,
        REFLECT=geometry.reflect,
        **block,
        **register_options(0),  # on the largest GPUs too: with fewer registers it spills on sm_100
    )
