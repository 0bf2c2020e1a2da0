"""The gradient to a convolution's weight: for each tap a product over the pixels, of two maps a tap apart.

    out[d, tap, g] = Σ over images and pixels of dense[pixel, d] · gathered[pixel · stride + tap, g]

One of them is the layer's input, the other the gradient of its output: for a convolution the input is gathered, for a
½-stride one the gradient. At the wide ends a row of taps by three colours lies together in memory: what is gathered
there has 3·k channels, a pixel every third of them. Either may be still to be normalised.

A program takes a tap, a block of out and a part of an image's pixels; the parts are added up afterwards, in order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastperc.kernels.configs import Variant
from fastperc.kernels.conv_bn_relu import mirrored
from fastperc.kernels.deferred import load_deferred
from fastperc.types import Deferred, stride_of

PROGRAMS = 264  # to aim at: two to each multiprocessor of the largest GPUs
FEWEST_STEPS = 4  # of a program, lest the parts outweigh the products


@triton.jit
def weight_gradient_kernel(
    dense_ptr,  # [N, dense_height, dense_width, D] fp16|bf16|fp32
    dense_other_ptr,  # as dense, and
    dense_coefficients_ptr,  # [N or 1, rows, D] fp32: what is to be made of dense; or None
    gathered_ptr,  # [N, gathered_height, gathered_width, G], with strides for all but G
    gathered_other_ptr,
    gathered_coefficients_ptr,
    partials_ptr,  # [N, parts, D, TAPS, G] fp32
    dense_coefficients_stride,
    gathered_coefficients_stride,
    dense_height,
    dense_width,
    height,  # of the pixels summed over: dense's, and `beyond` mirrored ones on each side
    width,
    beyond,
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
    UPSAMPLE: tl.constexpr,  # whether gathered is seen with each pixel four times over
    REFLECT: tl.constexpr,  # whether gathered has a mirrored border
    DENSE_RELU: tl.constexpr,  # in what is to be made of them
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
    down = tap // TAPS_W - top
    right = tap % TAPS_W - left
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
        dense_row = mirrored(row - beyond, dense_height)
        dense_column = mirrored(column - beyond, dense_width)
        pixels = (image * dense_height + dense_row) * dense_width + dense_column
        offs = pixels[:, None] * DENSE_CHANNELS + offs_d[None, :]
        mask = mask_p[:, None] & mask_d[None, :]
        dense = load_deferred(
            dense_ptr, dense_other_ptr, dense_coefficients_ptr, offs, offs_d, mask, DENSE_CHANNELS, DENSE_RELU
        )
        row = row * STRIDE + down
        column = column * STRIDE + right
        if REFLECT:
            row = mirrored(row, gathered_height)
            column = mirrored(column, gathered_width)
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
    """Which pixels of what is gathered meet those of what is dense."""

    taps: tuple[int, int]  # rows and columns of them
    top: int = 0  # padding of what is gathered
    left: int = 0
    stride: int = 1
    upsample: bool = False  # what is gathered has each pixel four times over
    reflect: bool = False  # what is gathered has a mirrored border
    beyond: int = 0  # mirrored pixels on each side of what is dense


def _block(itemsize: int, dense_channels: int, channels: int) -> dict[str, int]:
    """Not measured yet."""
    block_d, block_g = (max(triton.next_power_of_2(c), 16) for c in (dense_channels, channels))
    if itemsize == 4:
        return dict(BLOCK_D=min(block_d, 64), BLOCK_G=min(block_g, 32), BLOCK_P=16, num_warps=8)
    block_d, block_g = min(max(block_d, 64), 128), min(block_g, 128)  # 64 rows, as the tensor cores take them
    return dict(BLOCK_D=block_d, BLOCK_G=block_g, BLOCK_P=32, num_warps=8 if block_d * block_g > 64 * 64 else 4)


def weight_gradient(dense: Deferred, gathered: Deferred, geometry: Geometry) -> Tensor:
    """[D, rows, columns, G] float32, of two maps [N, C, H, W] with their channels innermost."""
    return _sum(dense, gathered, gathered.x.shape[1:], gathered.x.stride(), geometry)


def rgb_weight_gradient(dense: Deferred, picture: Tensor, kernel: int, beyond: int = 0) -> Tensor:
    """[D, k, k, 3] float32: each of the taps of a picture prepared for the stem's kernel, [N, rows, columns, 3]."""
    _, rows, columns, _ = picture.shape
    strides = (rows * columns * 3, 1, columns * 3, 3)
    geometry = Geometry((kernel, 1), beyond=beyond)
    total = _sum(dense, Deferred(picture), (3 * kernel, rows, columns), strides, geometry)
    return total.squeeze(2).unflatten(2, (kernel, 3))


def _sum(
    dense: Deferred, gathered: Deferred, shape: tuple[int, ...], strides: tuple[int, ...], geometry: Geometry
) -> Tensor:
    images, dense_channels, dense_height, dense_width = dense.x.shape
    channels, gathered_height, gathered_width = shape
    height, width = dense_height + 2 * geometry.beyond, dense_width + 2 * geometry.beyond
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
        geometry.beyond,
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


def variants() -> Iterator[Variant]:
    """The paper's networks: the convolutions, the ½-stride ones, and their ends."""
    for dtype in ("bf16", "fp16", "fp32"):
        for channels in ((128, 128), (64, 64), (128, 64), (64, 32)):
            yield _variant(dtype, *channels, (3, 3), "gradient", "plain")
            yield _variant(dtype, *channels, (3, 3), "gradient", "activation")
            yield _variant(dtype, *channels, (3, 3), "activation", "gradient", 2)
        for channel in (16, 32, 64):
            yield _variant(dtype, channel, 27, (9, 1), "gradient", "plain")
            yield _variant(dtype, channel, 27, (9, 1), "activation", "plain")


def _variant(
    dtype: str,
    dense_channels: int,
    channels: int,
    taps: tuple[int, int],
    dense: str,  # "activation" or "gradient", deferred; or "plain"
    gathered: str,
    stride: int = 1,
) -> Variant:
    pointers = dict(partials_ptr="*fp32")
    absent = {}
    for name, kind in (("dense", dense), ("gathered", gathered)):
        pointers[f"{name}_ptr"] = f"*{dtype}"
        wanted = {f"{name}_other_ptr": kind == "gradient", f"{name}_coefficients_ptr": kind != "plain"}
        pointers |= {key: "*fp32" if "coefficients" in key else f"*{dtype}" for key, there in wanted.items() if there}
        absent |= {key: None for key, there in wanted.items() if not there}
    sizes = ("dense_height", "dense_width", "height", "width", "beyond", "gathered_height", "gathered_width")
    strides = ("dense_coefficients_stride", "gathered_coefficients_stride", "stride_image", "stride_row")
    block = _block(4 if dtype == "fp32" else 2, dense_channels, channels)
    num_warps = block.pop("num_warps")
    return Variant(
        weight_gradient_kernel,
        f"{dtype} {dense_channels}x{channels} s{stride} {dense} {gathered}",
        dict(
            **pointers,
            **dict.fromkeys((*sizes, *strides, "stride_column", "left", "top", "parts", "part_pixels"), "i32"),
        ),
        dict(
            DENSE_CHANNELS=dense_channels,
            CHANNELS=channels,
            TAPS_H=taps[0],
            TAPS_W=taps[1],
            STRIDE=stride,
            UPSAMPLE=False,
            REFLECT=False,
            DENSE_RELU=dense == "activation",
            GATHERED_RELU=gathered == "activation",
            **block,
            **absent,
        ),
        num_warps=num_warps,
        num_stages=3,
        aligned=(*pointers, *strides, *(("stride_column",) if taps[1] > 1 else ()), "part_pixels"),
        matrix=dtype != "fp32",
    )
