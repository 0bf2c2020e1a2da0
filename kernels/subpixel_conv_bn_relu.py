"""The convolutions that double the size of a map: ½-stride, or nearest-neighbour upsampling and 3×3.

Both compute a 2×2 block of outputs, the four phases, from a 2×2 patch of the small map. Along each axis:

                  patch          outputs      first phase                second phase
    transposed    x[i], x[i+1]   2i, 2i+1     w₁·x[i]                    w₂·x[i] + w₀·x[i+1]
    nearest       x[i-1], x[i]   2i-1, 2i     (w₀+w₁)·x[i-1] + w₂·x[i]   w₀·x[i-1] + (w₁+w₂)·x[i]

So both are a convolution with 2×2 taps and phases × output channels as columns: 16 products for a block of outputs,
where a convolution of the upsampled map takes 36. A program computes a tile of patches × columns, for the two phases of
one row of outputs, which are neighbours in memory. The epilogue adds the bias and applies ReLU, or takes statistics.

7 products of the transposed kind have a weight of zero. The 4 of the patch's second row for the first row of outputs
are left out; the other 3 are not. An accumulator for each phase would save all 7, but its narrow products wait for each
other on sm_90.

In training, the transposed kind also gives the gradient of the input of a convolution of stride 2. Where that
convolution reflects its border, the gradient is of the padded map and begins a pixel further out.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastperc.kernels.configs import LARGEST, PROGRAMS, ConvTile, channel_step, shared_memory
from fastperc.kernels.conv_bn_relu import registers_for, slopes_of, store_output
from fastperc.types import RELU, Activation, Deferred, Destination

PHASES = tl.constexpr(2)  # of the four, that a program computes


def _tile(itemsize: int, channels_in: int, channels_out: int, patches: int, limit: int) -> ConvTile:
    """The largest tile that still gives enough programs for the ``patches`` of a batch: the fastest of those measured
    on an H200. A GPU with a smaller ``limit`` of shared memory takes smaller tiles: the larger ones spill there."""
    block = max(16, triton.next_power_of_2(channels_out))
    if itemsize == 4:
        return ConvTile(4, 8, min(block, 32), 16, 4, 2)
    if limit < LARGEST:  # steps of 32 channels: the assembler unrolls a short loop of longer ones, and spills
        return ConvTile(4, 16, min(block, 64), min(channel_step(channels_in), 32), 4, 3)
    height = 8 if patches * block * 4 >= 128 * 128 * PROGRAMS else 4
    stages = 3 if channels_in > 64 else 2
    num_warps = 8 if height == 8 and block > 32 else 4  # with 4, sums for 64 channels spill with Triton 3.9
    return ConvTile(height, 16, min(block, 64), channel_step(channels_in), num_warps, stages)


@triton.jit(do_not_specialize=["height", "width", "out_height", "out_width"])
def subpixel_conv_bn_relu_kernel(
    x_ptr,  # [N, H, W, I] fp16|bf16|fp32
    weight_ptr,  # [2, 2, 4, O, I] as x: row and column in the patch, phase
    bias_ptr,  # [O] fp32; or None
    saved_ptr,  # as out: the deferred activation whose gradient out is; or None
    saved_coefficients_ptr,  # [N or 1, NORM_ROWS, O] fp32: those of saved; or None
    out_ptr,  # [N, H', W', O]
    partials_ptr,  # [N, tiles, 3, O] fp32: count, mean, M2 of out; of a gradient, [N, tiles, 2, O]; or None
    saved_coefficients_stride,
    height,
    width,
    out_height,
    out_width,
    slopes,  # [O] fp32 of "prelu", a number of "leaky_relu", or None
    CHANNELS_IN: tl.constexpr,
    CHANNELS_OUT: tl.constexpr,
    NEAREST: tl.constexpr,
    BACK: tl.constexpr,  # pixels before the border where the first patch begins
    REFLECT: tl.constexpr,
    ACTIVATION: tl.constexpr,  # in the epilogue; of a gradient, in the saved activation: "relu" or None
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    BLOCKS_O: tl.constexpr = (CHANNELS_OUT + BLOCK_O - 1) // BLOCK_O
    BLOCKS_I: tl.constexpr = (CHANNELS_IN + BLOCK_I - 1) // BLOCK_I
    tiles_w = tl.cdiv(out_width + BACK, 2 * TILE_W)
    tiles = tl.cdiv(out_height + BACK // 2, 2 * TILE_H) * tiles_w
    pid = tl.program_id(0)
    out_row = pid % 2  # of the block
    first_o = pid // 2 % BLOCKS_O * BLOCK_O
    tile = pid // 2 // BLOCKS_O % tiles
    image = (pid // 2 // BLOCKS_O // tiles).to(tl.int64)

    offs_p = tl.arange(0, TILE_H * TILE_W)
    up = BACK * out_row  # the first row of outputs has none before the border
    first_row = tile // tiles_w * TILE_H
    rows = first_row + offs_p // TILE_W - up
    columns = tile % tiles_w * TILE_W + offs_p % TILE_W - BACK
    x_ptr += (image * height + first_row) * width * CHANNELS_IN  # 64 bits for the tile's first row only
    offs_n = tl.arange(0, PHASES * BLOCK_O)
    phases = out_row * PHASES + offs_n // BLOCK_O
    offs_o = first_o + offs_n % BLOCK_O
    mask_o = offs_o < CHANNELS_OUT
    taps = 4 if NEAREST else 2 + 2 * out_row  # the first row of outputs takes the first row of the patch
    acc = tl.zeros([TILE_H * TILE_W, PHASES * BLOCK_O], dtype=tl.float32)
    for step in tl.range(taps * BLOCKS_I):
        tap = step // BLOCKS_I
        row = rows + tap // 2
        column = columns + tap % 2
        if REFLECT:  # reflected, the upsampled map repeats the pixel at the border
            row = tl.minimum(tl.maximum(row, 0), height - 1)
            column = tl.minimum(tl.maximum(column, 0), width - 1)
        mask_p = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        offs_i = step % BLOCKS_I * BLOCK_I + tl.arange(0, BLOCK_I)
        mask_i = offs_i < CHANNELS_IN
        offs_x = ((row - first_row) * width + column)[:, None] * CHANNELS_IN + offs_i[None, :]
        x = tl.load(x_ptr + offs_x, mask=mask_p[:, None] & mask_i[None, :], other=0.0)
        filters = (tap * 4 + phases) * CHANNELS_OUT + offs_o
        weight_ptrs = weight_ptr + filters[:, None] * CHANNELS_IN + offs_i[None, :]
        weight = tl.load(weight_ptrs, mask=mask_o[:, None] & mask_i[None, :], other=0.0)
        acc = tl.dot(x, weight.T, acc, input_precision="ieee")

    offs_q = tl.arange(0, TILE_H * TILE_W * PHASES)  # pixels of the output
    phases = out_row * PHASES + offs_q % PHASES
    rows = first_row + offs_q // PHASES // TILE_W - up
    columns = tile % tiles_w * TILE_W + offs_q // PHASES % TILE_W - BACK
    rows = 2 * rows + BACK + phases // 2
    columns = 2 * columns + BACK + phases % 2
    mask_q = (rows >= 0) & (rows < out_height) & (columns >= 0) & (columns < out_width)
    offs_o = first_o + tl.arange(0, BLOCK_O)
    if saved_ptr is not None:
        saved_coefficients_ptr += image * saved_coefficients_stride
    store_output(
        acc.reshape(TILE_H * TILE_W * PHASES, BLOCK_O).T,
        out_ptr,
        bias_ptr,
        saved_ptr,
        saved_coefficients_ptr,
        partials_ptr,
        (image * tiles + tile) * 2 + out_row,
        (image * out_height + rows) * out_width + columns,
        offs_o,
        mask_q,
        slopes,
        CHANNELS_OUT,
        ACTIVATION,
    )


def pack(weight: Tensor, upsample: str) -> Tensor:
    """The kernel's weights [2, 2, 4, O, I], from a ``weight`` [I, O, 3, 3] (``"transposed"``) or [O, I, 3, 3]
    (``"nearest"``)."""
    filters = weight.transpose(0, 1) if upsample == "transposed" else weight
    packed = _phases(_phases(filters, 2, upsample), 3, upsample)  # [columns, rows, O, I], patch × phase each
    packed = packed.unflatten(1, (2, 2)).unflatten(0, (2, 2))
    return packed.permute(2, 0, 3, 1, 4, 5).flatten(2, 3).contiguous()


def _phases(weight: Tensor, axis: int, upsample: str) -> Tensor:
    """The weights along one axis for each pixel of the patch × phase, in front. They are computed without constants
    from memory, which a CUDA graph could not copy to the GPU."""
    first, middle, last = weight.unbind(axis)
    if upsample == "transposed":
        return torch.stack((middle, last, torch.zeros_like(first), first))
    return torch.stack((first + middle, first, last, middle + last))


def _tile_of(x: Tensor, out: Tensor) -> ConvTile:
    images, channels_in, height, width = x.shape
    return _tile(x.element_size(), channels_in, out.shape[1], images * height * width, shared_memory(x.device))


def _tiles(x: Tensor, out: Tensor, back: int) -> int:
    tile, (height, width) = _tile_of(x, out), out.shape[2:]
    return 2 * triton.cdiv(height + back // 2, 2 * tile.height) * triton.cdiv(width + back, 2 * tile.width)


def subpixel_conv_bn_relu_tiles(x: Tensor, out: Tensor, upsample: str) -> int:
    """How many tiles an image has: the second size of ``partials``."""
    return _tiles(x, out, int(upsample == "nearest"))


def strided_conv_bwd_tiles(grad: Tensor, out: Tensor, border: int) -> int:
    """How many tiles the gradient of an image has: the second size of ``partials``."""
    return _tiles(grad, out, border)


def subpixel_conv_bn_relu_fwd(
    x: Tensor,
    packed: Tensor,
    bias: Tensor,
    out: Tensor,
    upsample: str,
    padding_mode: str,
    activation: Activation | None,
    partials: Tensor | None = None,
) -> None:
    """Fills ``out`` [N, O, 2H, 2W] with activation(up(``x``) + ``bias``), and ``partials`` [N, tiles, 3, O].

    ``x`` and ``out`` have their channels innermost; ``packed`` is what :func:`pack` returns, in their dtype.
    """
    nearest = upsample == "nearest"
    phases = Phases(nearest, int(nearest), padding_mode == "reflect")
    _launch(x, packed, bias, Destination(out, partials), phases, activation)


def strided_conv_bwd(
    grad: Tensor, packed: Tensor, saved: Deferred | None, out: Tensor, border: int, partials: Tensor | None
) -> None:
    """Fills ``out`` [N, O, H', W'] with the gradient of ``saved``, and ``partials`` [N, tiles, 2, O].

    ``saved`` is the input of a 3×3 convolution of stride 2 and padding 1, ``grad`` the gradient of its output. Without
    ``saved`` it is the gradient of a plain map with a border of 0 or 1 more pixels on each side.
    ``packed`` is what :func:`pack` gives of the convolution's weight, taken as a transposed one's.
    """
    destination = Destination(out, partials, saved)
    _launch(grad, packed, None, destination, Phases(False, border, False), RELU if destination.saved_relu else None)


class Phases(NamedTuple):
    """How each pixel of the input becomes four of the output."""

    nearest: bool  # by nearest-neighbour upsampling and a convolution, rather than a transposed one
    back: int  # pixels of the input before the first that an output pixel reads
    reflect: bool


def _launch(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    destination: Destination,
    phases: Phases,
    activation: Activation | None,
) -> None:
    out = destination.out
    images, channels_in, height, width = x.shape
    _, channels_out, out_height, out_width = out.shape
    tile = _tile_of(x, out)
    programs = images * _tiles(x, out, phases.back) * triton.cdiv(channels_out, tile.channels_out)
    subpixel_conv_bn_relu_kernel[(programs,)](
        x,
        packed,
        bias,
        *destination.saved_arguments,
        out,
        destination.partials,
        destination.saved_stride,
        height,
        width,
        out_height,
        out_width,
        slopes_of(activation, channels_out),
        CHANNELS_IN=channels_in,
        CHANNELS_OUT=channels_out,
        NEAREST=phases.nearest,
        BACK=phases.back,
        REFLECT=phases.reflect,
        ACTIVATION=activation and activation.name,
        **tile.constants,
        **tile.options,
        **registers_for(activation, x.device),
    )
