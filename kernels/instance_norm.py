"""Instance norm from statistics by tile: each is (count, mean, M2 about that mean), as the convolutions store them.

    statistics        those of a tensor that a library's convolution computed; reads it once
    instance_norm     x · scale + shift, the skip, ReLU, or the gradient before the norm; in one pass

``norm_coefficients`` beside it computes scale and shift from the statistics.
In training they serve batch norm too, which treats all images as one. All tensors are NHWC; a skip may be a window of a
larger map. The tiles are added up in a fixed order, without atomics: the result is the same bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import triton
import triton.language as tl
from torch import Tensor

from fastperc.kernels.conv_bn_relu import activate, slopes_of, store_partials
from fastperc.kernels.deferred import coefficient
from fastperc.types import RELU, Activation, Deferred, stride_of

BLOCK = 8192  # elements per program of the passes over memory
MAX_BLOCK_CHANNELS = 64  # of them: 128 bytes in half precision
PASS_OPTIONS = dict(num_warps=8, num_stages=1)


@triton.jit
def place(pid, pixels, CHANNELS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """The image, the tile, and the tile's pixels and channels, of a program for [BLOCK_P, BLOCK_C] elements."""
    BLOCKS: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    tiles = tl.cdiv(pixels, BLOCK_P)
    tile = pid // BLOCKS % tiles
    offs_p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    offs_c = pid % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    return (pid // BLOCKS // tiles).to(tl.int64), tile, offs_p, offs_c


@triton.jit(do_not_specialize=["pixels"])
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
def instance_norm_tile(
    x_ptr,
    other_ptr,
    coefficients_ptr,
    skip_ptr,
    out_ptr,
    pid,
    coefficients_stride,
    height,
    width,
    skip_stride_image,
    skip_stride_row,
    skip_stride_column,
    slopes,
    CHANNELS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """What program ``pid`` of :func:`instance_norm_kernel` does."""
    pixels = height * width
    image, _, offs_p, offs_c = place(pid, pixels, CHANNELS, BLOCK_P, BLOCK_C)
    mask = (offs_p[:, None] < pixels) & (offs_c[None, :] < CHANNELS)
    coefficients_ptr += image * coefficients_stride
    scale = coefficient(coefficients_ptr, 0, offs_c, CHANNELS)
    shift = coefficient(coefficients_ptr, 1, offs_c, CHANNELS)
    offs = (image * pixels + offs_p[:, None]) * CHANNELS + offs_c[None, :]
    y = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32) * scale[None, :] + shift[None, :]
    if other_ptr is not None:
        factor = coefficient(coefficients_ptr, 2, offs_c, CHANNELS)
        y += tl.load(other_ptr + offs, mask=mask, other=0.0).to(tl.float32) * factor[None, :]
    if skip_ptr is not None:
        offs_skip = image * skip_stride_image + (offs_p // width).to(tl.int64) * skip_stride_row
        offs_skip += (offs_p % width).to(tl.int64) * skip_stride_column
        y += tl.load(skip_ptr + offs_skip[:, None] + offs_c[None, :], mask=mask, other=0.0).to(tl.float32)
    slope = slopes
    if ACTIVATION == "prelu":
        slope = tl.load(slopes + offs_c, mask=offs_c < CHANNELS, other=0.0)[None, :]
    y = activate(y, slope, ACTIVATION)
    tl.store(out_ptr + offs, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["height", "width"])
def instance_norm_kernel(
    x_ptr,  # [N, H, W, C] fp16|bf16|fp32
    other_ptr,  # as x; or None
    coefficients_ptr,  # [N or 1, rows, C] fp32
    skip_ptr,  # [N, H, W, C] with strides for all but C; or None
    out_ptr,  # [N, H, W, C]; may be x_ptr
    coefficients_stride,
    height,
    width,
    skip_stride_image,
    skip_stride_row,
    skip_stride_column,
    slopes,  # [C] fp32 of "prelu", a number of "leaky_relu", or None
    CHANNELS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    instance_norm_tile(
        x_ptr,
        other_ptr,
        coefficients_ptr,
        skip_ptr,
        out_ptr,
        tl.program_id(0),
        coefficients_stride,
        height,
        width,
        skip_stride_image,
        skip_stride_row,
        skip_stride_column,
        slopes,
        CHANNELS,
        ACTIVATION,
        BLOCK_P,
        BLOCK_C,
    )


def block_of(channels: int, elements: int = BLOCK) -> dict[str, int]:
    """BLOCK_P and BLOCK_C of a pass, for so many elements per program."""
    block_c = min(triton.next_power_of_2(channels), MAX_BLOCK_CHANNELS)
    return dict(BLOCK_P=elements // block_c, BLOCK_C=block_c)


def programs_of(shape: Sequence[int]) -> int:
    """How many programs a pass over maps of ``shape`` [N, C, H, W] has."""
    return shape[0] * statistics_tiles(shape) * triton.cdiv(shape[1], block_of(shape[1])["BLOCK_C"])


def statistics_tiles(x_shape: Sequence[int]) -> int:
    """How many tiles an image of ``x_shape`` [N, C, H, W] has: the second size of ``partials``."""
    return triton.cdiv(prod(x_shape[2:]), block_of(x_shape[1])["BLOCK_P"])


def statistics_fwd(x: Tensor, partials: Tensor) -> None:
    """Fills ``partials`` [N, tiles, 3, C] with the count, mean and M2 of each tile of ``x`` [N, C, H, W]."""
    _, channels, height, width = x.shape
    statistics_kernel[(programs_of(x.shape),)](
        x, partials, height * width, CHANNELS=channels, **block_of(channels), **PASS_OPTIONS
    )


def instance_norm_fwd(x: Deferred, skip: Tensor | None, out: Tensor, activation: Activation | None = None) -> None:
    """Fills ``out`` [N, C, H, W], which may be ``x.x``, with ``x`` + ``skip``, then its ReLU or ``activation``."""
    activation = RELU if x.relu else activation
    _, channels, height, width = x.x.shape
    skip_strides = (0, 0, 0) if skip is None else (skip.stride(0), skip.stride(2), skip.stride(3))
    instance_norm_kernel[(programs_of(x.x.shape),)](
        x.x,
        x.other,
        x.coefficients,
        skip,
        out,
        stride_of(x.coefficients),
        height,
        width,
        *skip_strides,
        slopes_of(activation, channels),
        CHANNELS=channels,
        ACTIVATION=activation and activation.name,
        **block_of(channels),
        **PASS_OPTIONS,
    )
