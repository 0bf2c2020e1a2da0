"""The gradient of a convolution's weight: for each tap a product over the pixels, of two maps shifted by the tap.

    out[d, tap, g] = Σ over images and pixels of dense[pixel, d] · gathered[pixel · stride + tap, g]

One of the maps is the layer's input, the other the gradient of its output. A convolution gathers the input, a ½-stride
convolution the gradient. At a network's two ends the k taps of a row and their three colours are consecutive in memory:
the gathered map has 3·k channels there, and a pixel begins at every third. Both maps may be normalised as they are
loaded.

A program takes a tap, a block of out and a part of an image's pixels. The parts are added up afterwards, in order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastperc.kernels.conv_bn_relu import reflect_once
from fastperc.kernels.deferred import load_deferred
from fastperc.types import Deferred, stride_of

PROGRAMS = 264  # to aim at: two per multiprocessor of the largest GPUs
FEWEST_STEPS = 4  # of a program, so that adding up the parts does not outweigh the products


@triton.jit(
    do_not_specialize=[
        "dense_height",
        "dense_width",
        "height",
        "width",
        "border",
        "gathered_height",
        "gathered_width",
        "left",
        "top",
        "parts",
        "part_pixels",
    ]
)
def weight_gradient_kernel(
    dense_ptr,  # [N, dense_height, dense_width, D] fp16|bf16|fp32
    dense_other_ptr,  # as dense; or None
    dense_coefficients_ptr,  # [N or 1, rows, D] fp32: how dense is normalised as it is loaded; or None
    gathered_ptr,  # [N, gathered_height, gathered_width, G] as dense, with strides for all but G
    gathered_other_ptr,  # as gathered; or None
    gathered_coefficients_ptr,  # [N or 1, rows, G] fp32: how gathered is normalised; or None
    partials_ptr,  # [N, parts, D, TAPS, G] fp32
    dense_coefficients_stride,
    gathered_coefficients_stride,
    dense_height,
    dense_width,
    height,  # of the pixels summed over: those of dense, and a reflected border of `border` pixels on each side
    width,
    border,
    gathered_height,
    gathered_width,
    stride_image,  # of gathered
    stride_row,
    stride_column,
    left,  # padding
    top,
    parts,
    part_pixels,
    DENSE_CHANNELS: tl.constexpr,
    CHANNELS: tl.constexpr,  # of gathered
    TAPS_H: tl.constexpr,
    TAPS_W: tl.constexpr,
    STRIDE: tl.constexpr,
    UPSAMPLE: tl.constexpr,  # whether gathered is upsampled by 2, each pixel repeated four times
    REFLECT: tl.constexpr,  # whether gathered has a reflected border
    DENSE_RELU: tl.constexpr,  # as dense is loaded
    GATHERED_RELU: tl.constexpr,
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
    if dense_coefficients_ptr is not None:
        dense_coefficients_ptr += image * dense_coefficients_stride
    if gathered_coefficients_ptr is not None:
        gathered_coefficients_ptr += image * gathered_coefficients_stride
    first = part % parts * part_pixels
    last = tl.minimum(first + part_pixels, height * width)

    acc = tl.zeros([BLOCK_D, BLOCK_G], dtype=tl.float32)
    for start in tl.range(first, last, BLOCK_P):
        offs_p = start + tl.arange(0, BLOCK_P)
        mask_p = offs_p < last
        row = offs_p // width
        column = offs_p % width
        dense_row = reflect_once(row - border, dense_height)
        dense_column = reflect_once(column - border, dense_width)
        pixels = (image * dense_height + dense_row) * dense_width + dense_column
        offs = pixels[:, None] * DENSE_CHANNELS + offs_d[None, :]
        mask = mask_p[:, None] & mask_d[None, :]
        dense = load_deferred(
            dense_ptr, dense_other_ptr, dense_coefficients_ptr, offs, offs_d, mask, DENSE_CHANNELS, DENSE_RELU
        )
        row = row * STRIDE + row_offset
        column = column * STRIDE + column_offset
        if REFLECT:
            row = reflect_once(row, gathered_height)
            column = reflect_once(column, gathered_width)
        mask_p = mask_p & (row >= 0) & (row < gathered_height) & (column >= 0) & (column < gathered_width)
        if UPSAMPLE:
            row = row // 2
            column = column // 2
        pixels = image * stride_image + row.to(tl.int64) * stride_row + column * stride_column
        offs = pixels[:, None] + offs_g[None, :]
        mask = mask_p[:, None] & mask_g[None, :]
        gathered = load_deferred(
            gathered_ptr, gathered_other_ptr, gathered_coefficients_ptr, offs, offs_g, mask, CHANNELS, GATHERED_RELU
        )
        acc = tl.dot(dense.T, gathered, acc, input_precision="ieee")
    offs = ((part.to(tl.int64) * DENSE_CHANNELS + offs_d[:, None]) * TAPS + tap) * CHANNELS + offs_g[None, :]
    tl.store(partials_ptr + offs, acc, mask=mask_d[:, None] & mask_g[None, :])


class Geometry(NamedTuple):
    """Which pixels of the gathered map are multiplied with a pixel of the dense one."""

    taps: tuple[int, int]  # rows and columns
    top: int = 0  # padding of the gathered map
    left: int = 0
    stride: int = 1
    upsample: bool = False  # the gathered map is upsampled by 2, each pixel repeated four times
    reflect: bool = False  # the gathered map has a reflected border
    border: int = 0  # reflected pixels on each side of the dense map


def _block(itemsize: int, dense_channels: int, channels: int) -> dict[str, int]:
    """Block sizes and warps; not measured yet."""
    block_d, block_g = (max(triton.next_power_of_2(c), 16) for c in (dense_channels, channels))
    if itemsize == 4:
        return dict(BLOCK_D=min(block_d, 64), BLOCK_G=min(block_g, 32), BLOCK_P=16, num_warps=8)
    block_d, block_g = min(max(block_d, 64), 128), min(block_g, 128)  # 64 rows, as the tensor cores take them
    return dict(BLOCK_D=block_d, BLOCK_G=block_g, BLOCK_P=32, num_warps=8 if block_d * block_g > 64 * 64 else 4)


def weight_gradient(dense: Deferred, gathered: Deferred, geometry: Geometry) -> Tensor:
    """[D, rows, columns, G] float32 from two maps [N, C, H, W], channels innermost."""
    return _sum(dense, gathered, gathered.x.shape[1:], gathered.x.stride(), geometry)


def rgb_weight_gradient(dense: Deferred, picture: Tensor, kernel: int, border: int = 0) -> Tensor:
    """[D, k, k, 3] float32 from ``dense`` and a ``picture`` prepared for the stem's kernel, [N, rows, columns, 3].

    ``border`` is how many reflected pixels ``dense`` has on each side.
    """
    _, rows, columns, _ = picture.shape
    strides = (rows * columns * 3, 1, columns * 3, 3)
    geometry = Geometry((kernel, 1), border=border)
    total = _sum(dense, Deferred(picture), (3 * kernel, rows, columns), strides, geometry)
    return total.squeeze(2).unflatten(2, (kernel, 3))


def _sum(
    dense: Deferred, gathered: Deferred, shape: tuple[int, ...], strides: tuple[int, ...], geometry: Geometry
) -> Tensor:
    images, dense_channels, dense_height, dense_width = dense.x.shape
    channels, gathered_height, gathered_width = shape
    height, width = dense_height + 2 * geometry.border, dense_width + 2 * geometry.border
    doubled = 2 if geometry.upsample else 1
    block = _block(dense.x.element_size(), dense_channels, channels)
    taps_h, taps_w = geometry.taps
    blocks = triton.cdiv(dense_channels, block["BLOCK_D"]) * triton.cdiv(channels, block["BLOCK_G"])
    most = max(height * width // (FEWEST_STEPS * block["BLOCK_P"]), 1)
    parts = min(triton.cdiv(PROGRAMS, blocks * taps_h * taps_w * images), most)
    part_pixels = triton.cdiv(height * width, parts * block["BLOCK_P"]) * block["BLOCK_P"]
    parts = triton.cdiv(height * width, part_pixels)
    partials = torch.empty(images * parts, dense_channels, taps_h, taps_w, channels, device=dense.x.device)
    weight_gradient_kernel[(images * parts * blocks * taps_h * taps_w,)](
        dense.x,
        dense.other,
        dense.coefficients,
        gathered.x,
        gathered.other,
        gathered.coefficients,
        partials,
        stride_of(dense.coefficients),
        stride_of(gathered.coefficients),
        dense_height,
        dense_width,
        height,
        width,
        geometry.border,
        gathered_height * doubled,
        gathered_width * doubled,
        strides[0],
        strides[2],
        strides[3],
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
        DENSE_RELU=dense.relu,
        GATHERED_RELU=gathered.relu,
        **block,
        num_stages=3,
    )
    return partials.sum(0)
