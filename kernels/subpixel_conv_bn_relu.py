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
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from fastperc.kernels.configs import PROGRAMS, ConvTile, Variant, channel_step
from fastperc.kernels.conv_bn_relu import store_partials
from torch import Tensor

TAPS = {  # how much of which weight [k] a pixel of the patch [2] has for a phase [2]
    "transposed": [[[0, 1, 0], [0, 0, 1]], [[0, 0, 0], [1, 0, 0]]],
    "nearest": [[[1, 1, 0], [1, 0, 0]], [[0, 0, 1], [0, 1, 1]]],
}


def _tile(itemsize: int, channels_in: int, channels_out: int, patches: int) -> tuple[ConvTile, int]:
    """The largest tile of patches that leaves enough programs for those of a batch, and how many of the four phases a
    program makes; not measured yet."""
    block = max(16, triton.next_power_of_2(channels_out))
    if itemsize == 4:
        return ConvTile(8, 8, min(block, 32), 16, 4, 2), 2
    height = 8 if patches * block * 4 >= 128 * 128 * PROGRAMS else 4
    num_warps = 8 if height == 8 and block > 16 else 4
    tile = ConvTile(height, 16, min(block, 64), channel_step(channels_in), num_warps, 3)
    return tile, 4 if block <= 32 else 2


@triton.jit
def subpixel_conv_bn_relu_kernel(
    x_ptr,  # [N, H, W, I] fp16|bf16|fp32
    weight_ptr,  # [2, 2, 4, O, I]: row and column in the patch, phase
    bias_ptr,  # [O] fp32
    out_ptr,  # [N, 2H, 2W, O]
    partials_ptr,  # [N, tiles, 3, O] fp32: count, mean, M2 of what is stored; or None
    height,
    width,
    CHANNELS_IN: tl.constexpr,
    CHANNELS_OUT: tl.constexpr,
    NEAREST: tl.constexpr,
    REFLECT: tl.constexpr,
    RELU: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    PHASES: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    BLOCKS_O: tl.constexpr = (CHANNELS_OUT + BLOCK_O - 1) // BLOCK_O
    BLOCKS_I: tl.constexpr = (CHANNELS_IN + BLOCK_I - 1) // BLOCK_I
    GROUPS: tl.constexpr = 4 // PHASES
    BACK: tl.constexpr = 1 if NEAREST else 0  # how far before the border the first patch begins
    tiles_w = tl.cdiv(width + BACK, TILE_W)
    tiles = tl.cdiv(height + BACK // GROUPS, TILE_H) * tiles_w
    pid = tl.program_id(0)
    group = pid % GROUPS
    first_o = pid // GROUPS % BLOCKS_O * BLOCK_O
    tile = pid // GROUPS // BLOCKS_O % tiles
    image = (pid // GROUPS // BLOCKS_O // tiles).to(tl.int64)

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
        x_ptrs = x_ptr + pixels[:, None] * CHANNELS_IN + offs_i[None, :]
        x = tl.load(x_ptrs, mask=mask_p[:, None] & mask_i[None, :], other=0.0)
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
    mask_q = (rows >= 0) & (rows < 2 * height) & (columns >= 0) & (columns < 2 * width)
    offs_o = first_o + tl.arange(0, BLOCK_O)
    mask_o = offs_o < CHANNELS_OUT
    acc = acc.reshape(TILE_H * TILE_W * PHASES, BLOCK_O) + tl.load(bias_ptr + offs_o, mask=mask_o, other=0.0)[None, :]
    if RELU:
        acc = tl.maximum(acc, 0.0, propagate_nan=tl.PropagateNan.ALL)
    out = acc.to(out_ptr.dtype.element_ty)
    pixels = (image * 2 * height + rows) * 2 * width + columns
    tl.store(out_ptr + pixels[:, None] * CHANNELS_OUT + offs_o[None, :], out, mask=mask_q[:, None] & mask_o[None, :])
    if partials_ptr is not None:
        partials_ptr += ((image * tiles + tile) * GROUPS + group) * 3 * CHANNELS_OUT
        store_partials(partials_ptr, out.to(tl.float32).T, offs_o, mask_q, CHANNELS_OUT)


def pack(weight: Tensor, upsample: str) -> Tensor:
    """[2, 2, 4, O, I] for the kernel, of ``weight``: ``"transposed"`` [I, O, 3, 3] or ``"nearest"`` [O, I, 3, 3]."""
    taps = weight.new_tensor(TAPS[upsample], dtype=torch.float64)  # where no product is taken in TF32
    axes = "io" if upsample == "transposed" else "oi"
    packed = torch.einsum(f"rak,cbl,{axes}kl->rcaboi", taps, taps, weight.double())
    return packed.to(weight.dtype).flatten(2, 3).contiguous()


def _tile_of(x: Tensor, out: Tensor) -> tuple[ConvTile, int]:
    images, channels_in, height, width = x.shape
    return _tile(x.element_size(), channels_in, out.shape[1], images * height * width)


def subpixel_conv_bn_relu_tiles(x: Tensor, out: Tensor, upsample: str) -> int:
    """How many tiles an image is made of: the second size of ``partials``."""
    tile, phases = _tile_of(x, out)
    groups, back = 4 // phases, int(upsample == "nearest")
    height, width = x.shape[2] + back // groups, x.shape[3] + back
    return triton.cdiv(height, tile.height) * triton.cdiv(width, tile.width) * groups


def subpixel_conv_bn_relu_fwd(
    x: Tensor,
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
    images, channels_in, height, width = x.shape
    channels_out = out.shape[1]
    tile, phases = _tile_of(x, out)
    programs = images * subpixel_conv_bn_relu_tiles(x, out, upsample)
    subpixel_conv_bn_relu_kernel[(programs * triton.cdiv(channels_out, tile.channels_out),)](
        x,
        packed,
        bias,
        out,
        partials,
        height,
        width,
        CHANNELS_IN=channels_in,
        CHANNELS_OUT=channels_out,
        NEAREST=upsample == "nearest",
        REFLECT=padding_mode == "reflect",
        RELU=relu,
        PHASES=phases,
        **tile.constants,
        **tile.options,
    )


def variants() -> Iterator[Variant]:
    """The paper's networks at full and half width, super-resolution's, of few pixels and of many."""
    for dtype in ("bf16", "fp16", "fp32"):
        for upsample in TAPS:
            for channels_in, channels_out in ((128, 64), (64, 64), (64, 32), (32, 16)):
                for patches in (64 * 64, 270 * 480)[dtype == "fp32" :]:
                    yield _variant(dtype, channels_in, channels_out, patches, upsample, "relu")
                    yield _variant(dtype, channels_in, channels_out, patches, upsample, "partials")
        yield _variant(dtype, 64, 32, 270 * 480, "nearest", "relu", reflect=True)


def _variant(
    dtype: str,
    channels_in: int,
    channels_out: int,
    patches: int,
    upsample: str,
    end: str,
    reflect: bool = False,
) -> Variant:
    tile, phases = _tile(4 if dtype == "fp32" else 2, channels_in, channels_out, patches)
    kind = f"{upsample} reflect" if reflect else upsample
    pointers = dict(x_ptr=f"*{dtype}", weight_ptr=f"*{dtype}", bias_ptr="*fp32", out_ptr=f"*{dtype}")
    absent = {}
    if end == "partials":
        pointers["partials_ptr"] = "*fp32"
    else:
        absent["partials_ptr"] = None
    return Variant(
        subpixel_conv_bn_relu_kernel,
        f"{dtype} {channels_in}-{channels_out} {tile.height}x{tile.width} {kind} {end}",
        dict(**pointers, height="i32", width="i32"),
        dict(
            CHANNELS_IN=channels_in,
            CHANNELS_OUT=channels_out,
            NEAREST=upsample == "nearest",
            REFLECT=reflect,
            RELU=end == "relu",
            PHASES=phases,
            **tile.constants,
            **absent,
        ),
        **tile.options,
        aligned=tuple(pointers),
        matrix=dtype != "fp32",
    )
