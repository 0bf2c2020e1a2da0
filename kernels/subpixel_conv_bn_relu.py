"""The convolutions that double a map: ½-stride, or nearest-neighbour upsampling and 3×3; bias and ReLU, or statistics.

Either makes a 2×2 block of outputs, of four phases, from a 2×2 patch of the small map. Along each axis:

                  patch          outputs      first phase                second phase
    transposed    x[i], x[i+1]   2i, 2i+1     w₁·x[i]                    w₂·x[i] + w₀·x[i+1]
    nearest       x[i-1], x[i]   2i-1, 2i     (w₀+w₁)·x[i-1] + w₂·x[i]   w₀·x[i-1] + (w₁+w₂)·x[i]

So it is one convolution of 2×2 taps whose columns are phases × output channels: 16 products for a block of outputs
where the upsampled map takes 36. A program makes a tile of patches × columns: all phases of few channels, or, of many,
those of one row, which are neighbours in memory. Of the transposed kind's products 7 have no weight: the 4 of the
patch's second row for the first row of outputs are left out where a program makes one row, the others are not. An
accumulator for each phase would spare them all, and makes narrow products that wait for each other on sm_90.

In training the transposed kind is the gradient to the input of a convolution of stride 2 as well; of one with mirrored
borders on the padded map, a pixel further out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastperc.kernels.configs import PROGRAMS, ConvTile, Variant, channel_step
from fastperc.kernels.conv_bn_relu import store_output
from fastperc.kernels.deferred import load_deferred
from fastperc.types import Deferred, Destination, stride_of

TAPS = {  # how much of which weight [k] a pixel of the patch [2] has for a phase [2]
    "transposed": [[[0, 1, 0], [0, 0, 1]], [[0, 0, 0], [1, 0, 0]]],
    "nearest": [[[1, 1, 0], [1, 0, 0]], [[0, 0, 1], [0, 1, 1]]],
}


def _tile(itemsize: int, channels_in: int, channels_out: int, patches: int) -> tuple[ConvTile, int]:
    """The largest tile of patches that leaves enough programs for those of a batch, and how many of the four phases a
    program makes; not measured yet."""
    block = max(16, triton.next_power_of_2(channels_out))
    if itemsize == 4:
        return ConvTile(8 if block > 16 else 4, 8, min(block, 32), 16, 4, 2), 2
    height = 8 if patches * block * 4 >= 128 * 128 * PROGRAMS else 4
    num_warps = 8 if height == 8 and block > 16 else 4
    tile = ConvTile(height, 16, min(block, 64), channel_step(channels_in), num_warps, 3)
    return tile, 4 if block <= 32 else 2


@triton.jit
def subpixel_conv_bn_relu_kernel(
    x_ptr,  # [N, H, W, I] fp16|bf16|fp32
    other_ptr,  # as x, and
    coefficients_ptr,  # [N or 1, rows, I] fp32: what is to be made of x; or None
    weight_ptr,  # [2, 2, 4, O, I]: row and column in the patch, phase
    bias_ptr,  # [O] fp32; or None
    saved_ptr,  # as out, and
    saved_coefficients_ptr,  # [N or 1, NORM_ROWS, O] fp32: the activation whose gradient out is; or None
    out_ptr,  # [N, H', W', O]
    partials_ptr,  # [N, tiles, 3, O] fp32: count, mean, M2 of what is stored; of a gradient, [N, tiles, 2, O]; or None
    coefficients_stride,
    saved_coefficients_stride,
    height,
    width,
    out_height,
    out_width,
    CHANNELS_IN: tl.constexpr,
    CHANNELS_OUT: tl.constexpr,
    NEAREST: tl.constexpr,
    BACK: tl.constexpr,  # pixels before the border where the first patch begins
    REFLECT: tl.constexpr,
    X_RELU: tl.constexpr,  # in what is to be made of x
    RELU: tl.constexpr,  # last, or in the activation whose gradient out is
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    PHASES: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    BLOCKS_O: tl.constexpr = (CHANNELS_OUT + BLOCK_O - 1) // BLOCK_O
    BLOCKS_I: tl.constexpr = (CHANNELS_IN + BLOCK_I - 1) // BLOCK_I
    GROUPS: tl.constexpr = 4 // PHASES
    tiles_w = tl.cdiv(out_width + BACK, 2 * TILE_W)
    tiles = tl.cdiv(out_height + BACK // GROUPS, 2 * TILE_H) * tiles_w
    pid = tl.program_id(0)
    group = pid % GROUPS
    first_o = pid // GROUPS % BLOCKS_O * BLOCK_O
    tile = pid // GROUPS // BLOCKS_O % tiles
    image = (pid // GROUPS // BLOCKS_O // tiles).to(tl.int64)
    if coefficients_ptr is not None:
        coefficients_ptr += image * coefficients_stride

    offs_p = tl.arange(0, TILE_H * TILE_W)
    up = BACK if PHASES == 4 else BACK * group  # the first row of outputs has none before the border
    rows = tile // tiles_w * TILE_H + offs_p // TILE_W - up
    columns = tile % tiles_w * TILE_W + offs_p % TILE_W - BACK
    offs_n = tl.arange(0, PHASES * BLOCK_O)
    phases = group * PHASES + offs_n // BLOCK_O
    offs_o = first_o + offs_n % BLOCK_O
    mask_o = offs_o < CHANNELS_OUT
    taps = 4 if NEAREST or PHASES == 4 else 2 + 2 * group  # the first row of outputs takes the first row of the patch
    acc = tl.zeros([TILE_H * TILE_W, PHASES * BLOCK_O], dtype=tl.float32)
    for step in tl.range(taps * BLOCKS_I):
        tap = step // BLOCKS_I
        row = rows + tap // 2
        column = columns + tap % 2
        if REFLECT:  # mirrored, the upsampled map repeats the pixel at the border
            row = tl.minimum(tl.maximum(row, 0), height - 1)
            column = tl.minimum(tl.maximum(column, 0), width - 1)
        mask_p = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        offs_i = step % BLOCKS_I * BLOCK_I + tl.arange(0, BLOCK_I)
        mask_i = offs_i < CHANNELS_IN
        pixels = (image * height + row) * width + column
        offs_x = pixels[:, None] * CHANNELS_IN + offs_i[None, :]
        mask_x = mask_p[:, None] & mask_i[None, :]
        x = load_deferred(x_ptr, other_ptr, coefficients_ptr, offs_x, offs_i, mask_x, CHANNELS_IN, X_RELU)
        filters = (tap * 4 + phases) * CHANNELS_OUT + offs_o
        weight_ptrs = weight_ptr + filters[:, None] * CHANNELS_IN + offs_i[None, :]
        weight = tl.load(weight_ptrs, mask=mask_o[:, None] & mask_i[None, :], other=0.0)
        acc = tl.dot(x, weight.T, acc, input_precision="ieee")

    offs_q = tl.arange(0, TILE_H * TILE_W * PHASES)  # pixels of the output
    phases = group * PHASES + offs_q % PHASES
    rows = tile // tiles_w * TILE_H + offs_q // PHASES // TILE_W - up
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
        (image * tiles + tile) * GROUPS + group,
        (image * out_height + rows) * out_width + columns,
        offs_o,
        mask_q,
        CHANNELS_OUT,
        RELU,
    )


def pack(weight: Tensor, upsample: str) -> Tensor:
    """[2, 2, 4, O, I] for the kernel, of ``weight``: ``"transposed"`` [I, O, 3, 3] or ``"nearest"`` [O, I, 3, 3]."""
    taps = weight.new_tensor(TAPS[upsample], dtype=torch.float64)  # where no product is taken in TF32
    axes = "io" if upsample == "transposed" else "oi"
    packed = torch.einsum(f"rak,cbl,{axes}kl->rcaboi", taps, taps, weight.double())
    return packed.to(weight.dtype).flatten(2, 3).contiguous()


def _tile_of(x: Deferred, out: Tensor) -> tuple[ConvTile, int]:
    images, channels_in, height, width = x.x.shape
    return _tile(x.x.element_size(), channels_in, out.shape[1], images * height * width)


def _tiles(x: Deferred, out: Tensor, back: int) -> int:
    tile, phases = _tile_of(x, out)
    groups, (height, width) = 4 // phases, out.shape[2:]
    return triton.cdiv(height + back // groups, 2 * tile.height) * triton.cdiv(width + back, 2 * tile.width) * groups


def subpixel_conv_bn_relu_tiles(x: Deferred, out: Tensor, upsample: str) -> int:
    """How many tiles an image is made of: the second size of ``partials``."""
    return _tiles(x, out, int(upsample == "nearest"))


def strided_conv_bwd_tiles(grad: Deferred, out: Tensor, beyond: int) -> int:
    """How many tiles the gradient of an image is made of: the second size of ``partials``."""
    return _tiles(grad, out, beyond)


def subpixel_conv_bn_relu_fwd(
    x: Deferred,
    packed: Tensor,
    bias: Tensor,
    out: Tensor,
    upsample: str,
    padding_mode: str,
    relu: bool,
    partials: Tensor | None = None,
) -> None:
    """Fills ``out`` [N, O, 2H, 2W] with relu(up(``x``) + ``bias``), and ``partials`` [N, tiles, 3, O].

    ``x`` and ``out`` have their channels innermost; ``packed`` is what :func:`pack` makes, in their dtype.
    """
    nearest = upsample == "nearest"
    phases = Phases(nearest, int(nearest), padding_mode == "reflect")
    _launch(x, packed, bias, Destination(out, partials), phases, relu)


def strided_conv_bwd(
    grad: Deferred, packed: Tensor, saved: Deferred | None, out: Tensor, border: int, partials: Tensor | None
) -> None:
    """Fills ``out`` [N, O, H', W'] with the gradient of ``saved``, and ``partials`` [N, tiles, 2, O].

    ``saved`` is the input of a 3×3 convolution of stride 2 and padding 1, ``grad`` the gradient of its output. Without
    ``saved`` it is the gradient of a plain map with a border of 0 or 1 more pixels on each side.
    ``packed`` is what :func:`pack` gives of the convolution's weight, taken as a transposed one's.
    """
    destination = Destination(out, partials, saved)
    _launch(grad, packed, None, destination, Phases(False, border, False), destination.saved_relu)


class Phases(NamedTuple):
    """How each pixel of the input becomes four of the output."""

    nearest: bool  # by nearest-neighbour upsampling and a convolution, rather than a transposed one
    back: int  # pixels of the input before the first that an output pixel reads
    reflect: bool


def _launch(
    x: Deferred,
    packed: Tensor,
    bias: Tensor | None,
    destination: Destination,
    phases: Phases,
    relu: bool,
) -> None:
    out = destination.out
    images, channels_in, height, width = x.x.shape
    _, channels_out, out_height, out_width = out.shape
    tile, at_once = _tile_of(x, out)
    programs = images * _tiles(x, out, phases.back) * triton.cdiv(channels_out, tile.channels_out)
    subpixel_conv_bn_relu_kernel[(programs,)](
        x.x,
        x.other,
        x.coefficients,
        packed,
        bias,
        *destination.saved_arguments,
        out,
        destination.partials,
        stride_of(x.coefficients),
        destination.saved_stride,
        height,
        width,
        out_height,
        out_width,
        CHANNELS_IN=channels_in,
        CHANNELS_OUT=channels_out,
        NEAREST=phases.nearest,
        BACK=phases.back,
        REFLECT=phases.reflect,
        X_RELU=x.relu,
        RELU=relu,
        PHASES=at_once,
        **tile.constants,
        **tile.options,
    )


def variants() -> Iterator[Variant]:
    """The paper's networks at full and half width, super-resolution's, of few pixels and of many."""
    for dtype in ("bf16", "fp16", "fp32"):
        for channels_in, channels_out in ((128, 64), (64, 64), (64, 32), (32, 16)):
            for patches in (64 * 64, 270 * 480)[dtype == "fp32" :]:
                for upsample in TAPS:
                    yield _variant(dtype, channels_in, channels_out, patches, upsample, "relu")
                    yield _variant(dtype, channels_in, channels_out, patches, upsample, "partials")
                    yield _variant(dtype, channels_in, channels_out, patches, upsample, "partials", deferred=True)
                yield _variant(dtype, channels_in, channels_out, patches, "transposed", "gradient", deferred=True)
        yield _variant(dtype, 64, 32, 270 * 480, "nearest", "relu", reflect=True)


def _variant(
    dtype: str,
    channels_in: int,
    channels_out: int,
    patches: int,
    upsample: str,
    end: str,  # "relu", "partials" or "gradient"
    reflect: bool = False,
    deferred: bool = False,
) -> Variant:
    tile, phases = _tile(4 if dtype == "fp32" else 2, channels_in, channels_out, patches)
    kind = f"{upsample}{' reflect' if reflect else ''}{' deferred' if deferred else ''}"
    gradient = end == "gradient"
    pointers = dict(
        x_ptr=f"*{dtype}",
        other_ptr=f"*{dtype}" if gradient else None,
        coefficients_ptr="*fp32" if deferred else None,
        weight_ptr=f"*{dtype}",
        bias_ptr=None if gradient else "*fp32",
        saved_ptr=f"*{dtype}" if gradient else None,
        saved_coefficients_ptr="*fp32" if gradient else None,
        out_ptr=f"*{dtype}",
        partials_ptr=None if end == "relu" else "*fp32",
    )
    sizes = ("coefficients_stride", "saved_coefficients_stride", "height", "width", "out_height", "out_width")
    given = {name: pointer for name, pointer in pointers.items() if pointer}
    return Variant(
        subpixel_conv_bn_relu_kernel,
        f"{dtype} {channels_in}-{channels_out} {tile.height}x{tile.width} {kind} {end}",
        dict(**given, **dict.fromkeys(sizes, "i32")),
        dict(
            CHANNELS_IN=channels_in,
            CHANNELS_OUT=channels_out,
            NEAREST=upsample == "nearest",
            BACK=int(upsample == "nearest"),
            REFLECT=reflect,
            X_RELU=deferred and not gradient,
            RELU=end != "partials",
            PHASES=phases,
            **tile.constants,
            **{name: None for name in pointers if name not in given},
        ),
        **tile.options,
        aligned=(*given, "coefficients_stride", "saved_coefficients_stride"),
        matrix=dtype != "fp32",
    )
