"""The gradient of a convolution's weight: for each tap a product over the pixels, of two maps shifted by the tap.

    out[d, tap, g] = Σ over images and pixels of dense[pixel, d] · gathered[pixel · stride + tap, g]

One of the maps is the layer's input, the other the gradient of its output. A convolution gathers the input, a ½-stride
convolution the gradient. A program takes a tap, a block of out and a part of an image's pixels. The parts are added up
afterwards, in order: by ``fastperc.kernels.sum_parts``. ``rgb_weight_gradient`` beside it serves a network's two ends.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fastperc.kernels.configs import register_options, shared_memory
from fastperc.kernels.conv_bn_relu import reflect_once
from fastperc.kernels.sum_parts import SumOf

PROGRAMS = 264  # to aim at: two per multiprocessor of the largest GPUs
FEWEST_STEPS = 4  # of a program, so that adding up the parts does not outweigh the products


@triton.jit(
    do_not_specialize=["height", "width", "gathered_height", "gathered_width", "left", "top", "parts", "part_pixels"]
)
def weight_gradient_kernel(
    dense_ptr,  # [N, H, W, D] fp16|bf16|fp32
    gathered_ptr,  # [N, gathered_height, gathered_width, G] as dense
    partials_ptr,  # [N, parts, D, TAPS, G] fp32
    height,  # of dense
    width,
    gathered_height,  # after the upsampling
    gathered_width,
    left,  # padding
    top,
    parts,
    part_pixels,
    DENSE_CHANNELS: tl.constexpr,
    CHANNELS: tl.constexpr,  # of gathered
    TAPS_H: tl.constexpr,
    TAPS_W: tl.constexpr,
    STRIDE: tl.constexpr,
    UPSAMPLE: tl.constexpr,  # 2: each pixel of gathered counts as four
    REFLECT: tl.constexpr,  # whether gathered has a reflected border
    BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    BLOCKS_D: tl.constexpr = (DENSE_CHANNELS + BLOCK_D - 1) // BLOCK_D
    BLOCKS_G: tl.constexpr = (CHANNELS + BLOCK_G - 1) // BLOCK_G
    TAPS: tl.constexpr = TAPS_H * TAPS_W
    pid = tl.program_id(0)
    offs_g = pid % BLOCKS_G * BLOCK_G + tl.arange(0, BLOCK_G)
    offs_d = pid // BLOCKS_G % BLOCKS_D * BLOCK_D + tl.arange(0, BLOCK_D)
    tap = pid // BLOCKS_G // BLOCKS_D % TAPS
    part = pid // BLOCKS_G // BLOCKS_D // TAPS
    image = (part // parts).to(tl.int64)
    row_offset = tap // TAPS_W - top
    column_offset = tap % TAPS_W - left
    mask_d = offs_d < DENSE_CHANNELS
    mask_g = offs_g < CHANNELS
    dense_ptr += image * height * width * DENSE_CHANNELS
    gathered_width_in_memory = gathered_width // UPSAMPLE
    gathered_ptr += image * (gathered_height // UPSAMPLE) * gathered_width_in_memory * CHANNELS
    first = part % parts * part_pixels
    last = tl.minimum(first + part_pixels, height * width)

    acc = tl.zeros([BLOCK_D, BLOCK_G], dtype=tl.float32)
    for start in tl.range(first, last, BLOCK_P):
        offs_p = start + tl.arange(0, BLOCK_P)
        mask_p = offs_p < last
        dense_ptrs = dense_ptr + offs_p.to(tl.int64)[:, None] * DENSE_CHANNELS + offs_d[None, :]
        dense = tl.load(dense_ptrs, mask=mask_p[:, None] & mask_d[None, :], other=0.0)
        row = offs_p // width * STRIDE + row_offset
        column = offs_p % width * STRIDE + column_offset
        if REFLECT:
            row = reflect_once(row, gathered_height)
            column = reflect_once(column, gathered_width)
        mask_p = mask_p & (row >= 0) & (row < gathered_height) & (column >= 0) & (column < gathered_width)
        pixels = (row // UPSAMPLE).to(tl.int64) * gathered_width_in_memory + column // UPSAMPLE
        gathered_ptrs = gathered_ptr + pixels[:, None] * CHANNELS + offs_g[None, :]
        gathered = tl.load(gathered_ptrs, mask=mask_p[:, None] & mask_g[None, :], other=0.0)
        acc = tl.dot(dense.T, gathered, acc, input_precision="ieee")
    offs = ((part.to(tl.int64) * DENSE_CHANNELS + offs_d[:, None]) * TAPS + tap) * CHANNELS + offs_g[None, :]
    tl.store(partials_ptr + offs, acc, mask=mask_d[:, None] & mask_g[None, :])


class Geometry(NamedTuple):
    """Which pixels of the gathered map are multiplied with a pixel of the dense one."""

    taps: tuple[int, int]  # rows and columns
    top: int = 0  # padding of the gathered map
    left: int = 0
    stride: int = 1
    upsample: int = 1  # 2: each pixel of the gathered map counts as four
    reflect: bool = False  # the gathered map has a reflected border


def _block(itemsize: int, dense_channels: int, channels: int) -> dict[str, int]:
    """Block sizes, warps and stages."""
    block_d, block_g = (max(triton.next_power_of_2(c), 16) for c in (dense_channels, channels))
    if itemsize == 4:
        return dict(BLOCK_D=min(block_d, 64), BLOCK_G=min(block_g, 32), BLOCK_P=16, num_warps=8, num_stages=3)
    block_d, block_g = min(max(block_d, 64), 128), min(block_g, 64)  # 64 rows, as the tensor cores take them
    return dict(BLOCK_D=block_d, BLOCK_G=block_g, BLOCK_P=64, num_warps=4, num_stages=3)


def parts_of(pixels: int, images: int, blocks: int, step: int) -> tuple[int, int]:
    """Into how many parts each image's sum over ``pixels`` is split, and the pixels of a part: enough for
    :data:`PROGRAMS` programs, of which ``blocks`` share a part, and whole steps of ``step`` pixels."""
    most = max(pixels // (FEWEST_STEPS * step), 1)
    parts = min(triton.cdiv(PROGRAMS, blocks * images), most)
    part_pixels = triton.cdiv(pixels, parts * step) * step
    return triton.cdiv(pixels, part_pixels), part_pixels


def weight_gradient(dense: Tensor, gathered: Tensor, geometry: Geometry, destination: SumOf) -> None:
    """Makes ``destination`` [D, rows, columns, G] from two maps [N, C, H, W] that are dense in NHWC."""
    images, dense_channels, height, width = dense.shape
    _, channels, gathered_height, gathered_width = gathered.shape
    block = _block(dense.element_size(), dense_channels, channels)
    taps_h, taps_w = geometry.taps
    blocks = triton.cdiv(dense_channels, block["BLOCK_D"]) * triton.cdiv(channels, block["BLOCK_G"]) * taps_h * taps_w
    parts, part_pixels = parts_of(height * width, images, blocks, block["BLOCK_P"])
    shape = (dense_channels, taps_h, taps_w, channels)
    partials = destination.empty(images * parts, shape, shape)
    weight_gradient_kernel[(images * parts * blocks,)](
        dense,
        gathered,
        partials,
        height,
        width,
        gathered_height * geometry.upsample,
        gathered_width * geometry.upsample,
        geometry.left,
        geometry.top,
        parts,
        part_pixels,
        DENSE_CHANNELS=dense_channels,
        CHANNELS=channels,
        TAPS_H=taps_h,
        TAPS_W=taps_w,
        STRIDE=geometry.stride,
        UPSAMPLE=geometry.upsample,
        REFLECT=geometry.reflect,
        **block,
        **register_options(shared_memory(dense.device)),
    )
