"""Convolution as an implicit matrix product; bias, skip and ReLU, or statistics, before the one rounding and store.

    out[pixel, o] = Σ over taps and input channels of x[pixel · stride + tap, i] · weight[o, tap, i]

A program makes a tile of pixels × output channels, one tap and one block of input channels at a time. It takes the
shifted tiles of x by tensor descriptors, whose zeros outside the image are the padding; and where those cannot go
(strides, mirrored borders, rows of bytes that 16 does not divide, sm_80) by masked pointers; by those also what is
still to be normalised (``fastperc.kernels.deferred``). Neighbouring programs take the channel blocks of one tile, then
the next tile of its row.

In training the same kernel gives the gradient to the input: a convolution of the output's gradient, in whose place x
stands, with the weights turned round.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastperc.kernels.configs import ConvTile, Variant, conv_tile, deferred_tile
from fastperc.kernels.deferred import load_deferred, store_gradient
from fastperc.types import RELU, Deferred, Destination, Epilogue, Padding, stride_of


@triton.jit
def mirrored(i, size):
    """The index inside ``size`` that a border of at most size - 1, reflected about the last pixel, shows at i."""
    return size - 1 - tl.abs(size - 1 - tl.abs(i))


@triton.jit
def store_partials(
    partials_ptr,  # [3, CHANNELS] fp32
    y,  # [channels, pixels] fp32
    offs_c,
    mask_p,
    CHANNELS: tl.constexpr,
):
    """(count, mean, M2 about that mean) of each channel, over the pixels of ``mask_p``."""
    mask_c = offs_c < CHANNELS
    count = tl.sum(mask_p.to(tl.float32))
    mean = tl.sum(tl.where(mask_p[None, :], y, 0.0), axis=1) / count
    difference = tl.where(mask_p[None, :], y - mean[:, None], 0.0)
    tl.store(partials_ptr + offs_c, tl.zeros_like(mean) + count, mask=mask_c)
    tl.store(partials_ptr + CHANNELS + offs_c, mean, mask=mask_c)
    tl.store(partials_ptr + 2 * CHANNELS + offs_c, tl.sum(difference * difference, axis=1), mask=mask_c)


@triton.jit
def store_output(
    y,  # [channels, pixels] fp32
    out_ptr,  # [N, H', W', CHANNELS] fp16|bf16|fp32
    bias_ptr,  # [CHANNELS] fp32; or None
    saved_ptr,  # as out, and
    saved_coefficients_ptr,  # [NORM_ROWS, CHANNELS] fp32, of the image: the activation whose gradient y is; or None
    partials_ptr,  # [tiles, 3, CHANNELS] fp32, of all images; of a gradient [tiles, 2, CHANNELS]; or None
    tile,
    pixels,  # of out, int64
    offs_c,
    mask_p,
    CHANNELS: tl.constexpr,
    RELU: tl.constexpr,  # last, or in the activation whose gradient y is
):
    """Stores relu(y + bias) and its statistics; or a gradient and its sums."""
    offs = pixels[None, :] * CHANNELS + offs_c[:, None]
    mask_c = offs_c < CHANNELS
    mask = mask_c[:, None] & mask_p[None, :]
    if saved_ptr is not None:
        partials_ptr += tile * 2 * CHANNELS
        store_gradient(y, out_ptr, offs, offs_c, mask, saved_ptr, saved_coefficients_ptr, partials_ptr, CHANNELS, RELU)
    else:
        if bias_ptr is not None:
            y += tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0)[:, None]
        if RELU:
            y = tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)
        y = y.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + offs, y, mask=mask)
        if partials_ptr is not None:
            store_partials(partials_ptr + tile * 3 * CHANNELS, y.to(tl.float32), offs_c, mask_p, CHANNELS)


@triton.jit
def conv_bn_relu_kernel(
    x_desc,  # [N, H, W, I] fp16|bf16, blocks [1, TILE_H, TILE_W, BLOCK_I]; or None
    weight_desc,  # [O, KERNEL² · I], blocks [BLOCK_O, BLOCK_I]; or None
    x_ptr,  # [N, H, W, I] fp16|bf16|fp32
    other_ptr,  # as x, and
    coefficients_ptr,  # [N or 1, rows, I] fp32: what is to be made of x; or None
    weight_ptr,  # [O, KERNEL², I]
    bias_ptr,  # [O] fp32; or None
    skip_ptr,  # [N, H', W', O] with strides for all but O; or None
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
    left,  # padding
    top,
    skip_stride_image,
    skip_stride_row,
    skip_stride_column,
    CHANNELS_IN: tl.constexpr,
    CHANNELS_OUT: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    REFLECT: tl.constexpr,
    X_RELU: tl.constexpr,  # in what is to be made of x
    RELU: tl.constexpr,  # last, or in the activation whose gradient out is
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    BLOCKS_O: tl.constexpr = (CHANNELS_OUT + BLOCK_O - 1) // BLOCK_O
    BLOCKS_I: tl.constexpr = (CHANNELS_IN + BLOCK_I - 1) // BLOCK_I
    TAPS: tl.constexpr = KERNEL * KERNEL
    tiles_w = tl.cdiv(out_width, TILE_W)
    tiles = tl.cdiv(out_height, TILE_H) * tiles_w
    pid = tl.program_id(0)
    block = pid % BLOCKS_O * BLOCK_O
    tile = pid // BLOCKS_O % tiles
    image = pid // BLOCKS_O // tiles
    if coefficients_ptr is not None:
        coefficients_ptr += image * coefficients_stride
    first_row = tile // tiles_w * TILE_H
    first_column = tile % tiles_w * TILE_W

    offs_p = tl.arange(0, TILE_H * TILE_W)
    rows = first_row + offs_p // TILE_W
    columns = first_column + offs_p % TILE_W
    offs_o = block + tl.arange(0, BLOCK_O)
    # Channels × pixels where the tensor cores take that (64 rows or more): then both factors come from shared memory,
    # where a reshaped x on the left would pass through registers; and a channel's statistics are sums along a row. An x
    # still to be normalised is in registers anyway.
    CHANNELS_FIRST: tl.constexpr = BLOCK_O >= 64 and coefficients_ptr is None
    if CHANNELS_FIRST:
        acc = tl.zeros([BLOCK_O, TILE_H * TILE_W], dtype=tl.float32)
    else:
        acc = tl.zeros([TILE_H * TILE_W, BLOCK_O], dtype=tl.float32)
    for step in tl.range(TAPS * BLOCKS_I):
        tap = step // BLOCKS_I
        first_i = step % BLOCKS_I * BLOCK_I
        down = tap // KERNEL - top
        right = tap % KERNEL - left
        if x_desc is not None:
            x = x_desc.load([image, first_row + down, first_column + right, first_i])
            x = x.reshape(TILE_H * TILE_W, BLOCK_I)
            weight = weight_desc.load([block, tap * CHANNELS_IN + first_i])
        else:
            row = rows * STRIDE + down
            column = columns * STRIDE + right
            if REFLECT:
                row = mirrored(row, height)
                column = mirrored(column, width)
            mask_p = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            offs_i = first_i + tl.arange(0, BLOCK_I)
            mask_i = offs_i < CHANNELS_IN
            pixels = (image.to(tl.int64) * height + row) * width + column
            offs_x = pixels[:, None] * CHANNELS_IN + offs_i[None, :]
            mask_x = mask_p[:, None] & mask_i[None, :]
            x = load_deferred(x_ptr, other_ptr, coefficients_ptr, offs_x, offs_i, mask_x, CHANNELS_IN, X_RELU)
            weight_ptrs = weight_ptr + (offs_o[:, None] * TAPS + tap) * CHANNELS_IN + offs_i[None, :]
            weight = tl.load(weight_ptrs, mask=(offs_o[:, None] < CHANNELS_OUT) & mask_i[None, :], other=0.0)
        if CHANNELS_FIRST:
            acc = tl.dot(weight, x.T, acc, input_precision="ieee")
        else:
            acc = tl.dot(x, weight.T, acc, input_precision="ieee")
    if not CHANNELS_FIRST:
        acc = acc.T

    image = image.to(tl.int64)
    if skip_ptr is None and saved_ptr is None:
        parts = (acc,)
    else:  # the upper half and the lower, lest a thread runs out of registers
        parts = acc.reshape(BLOCK_O, 2, TILE_H * TILE_W // 2).permute(0, 2, 1).split()
    PART_H: tl.constexpr = TILE_H // len(parts)
    if saved_ptr is not None:
        saved_coefficients_ptr += image * saved_coefficients_stride
    for part in tl.static_range(len(parts)):
        offs_p = tl.arange(0, PART_H * TILE_W)
        rows = first_row + part * PART_H + offs_p // TILE_W
        columns = first_column + offs_p % TILE_W
        mask_p = (rows < out_height) & (columns < out_width)
        y = parts[part]
        if skip_ptr is not None:
            offs_skip = image * skip_stride_image + rows.to(tl.int64) * skip_stride_row
            offs_skip += columns.to(tl.int64) * skip_stride_column
            mask = (offs_o < CHANNELS_OUT)[:, None] & mask_p[None, :]
            y += tl.load(skip_ptr + offs_skip[None, :] + offs_o[:, None], mask=mask, other=0.0).to(tl.float32)
        store_output(
            y,
            out_ptr,
            bias_ptr,
            saved_ptr,
            saved_coefficients_ptr,
            partials_ptr,
            (image * tiles + tile) * (len(parts) if saved_ptr is not None else 1) + part,
            (image * out_height + rows) * out_width + columns,
            offs_o,
            mask_p,
            CHANNELS_OUT,
            RELU,
        )


def conv_bn_relu_tiles(x: Deferred, out_shape: Sequence[int], gradient: bool = False) -> int:
    """How many tiles an image of ``out_shape`` [N, O, H', W'] is made of: the second size of ``partials``."""
    _, _, height, width = out_shape
    tile = _tile(x, out_shape)
    return triton.cdiv(height, tile.height) * triton.cdiv(width, tile.width) * (2 if gradient else 1)


def _tile(x: Deferred, out_shape: Sequence[int]) -> ConvTile:
    images, channels_out, height, width = out_shape
    choose = conv_tile if x.coefficients is None else deferred_tile
    return choose(x.x.element_size(), x.x.shape[1], channels_out, images * height * width)


def conv_bn_relu_fwd(
    x: Deferred,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    stride: int,
    padding: Padding,
    epilogue: Epilogue,
    partials: Tensor | None = None,
) -> None:
    """Fills ``out`` [N, O, H', W'] with relu(conv(``x``) + ``bias`` + skip), and ``partials`` [N, tiles, 3, O].

    All tensors but ``bias`` and ``partials`` have their channels innermost; the epilogue's skip may be a window of a
    larger map, its norm is None. The mode of ``padding`` is ``"zeros"`` or ``"reflect"``.
    """
    _launch(x, weight, bias, Destination(out, partials), stride, padding, epilogue)


def conv_bn_relu_bwd(
    grad: Deferred,
    weight: Tensor,
    skip: Tensor | None,
    saved: Deferred | None,
    out: Tensor,
    stride: int,
    padding: Padding,
    partials: Tensor | None,
) -> None:
    """Fills ``out`` with conv(``grad``) + ``skip``, the gradient of ``saved``, and ``partials`` [N, tiles, 2, O].

    ``weight`` is turned already. Without ``saved`` it is the gradient of a plain map. The padding is of zeros.
    """
    destination = Destination(out, partials, saved)
    activation = RELU if destination.saved_relu else None
    _launch(grad, weight, None, destination, stride, padding, Epilogue(None, activation, skip))


def _launch(
    x: Deferred,
    weight: Tensor,
    bias: Tensor | None,
    destination: Destination,
    stride: int,
    padding: Padding,
    epilogue: Epilogue,
) -> None:
    out, skip = destination.out, epilogue.skip
    images, channels_in, height, width = x.x.shape
    _, channels_out, out_height, out_width = out.shape
    kernel = weight.shape[-1]
    tile = _tile(x, out.shape)
    x_desc = weight_desc = None
    if stride == 1 and not padding.reflects and x.coefficients is None and descriptors_fit(x.x, weight):
        strides = (height * width * channels_in, width * channels_in, channels_in, 1)
        block = [1, tile.height, tile.width, tile.channels_in]
        x_desc = TensorDescriptor(x.x, [images, height, width, channels_in], strides, block)
        elements = kernel * kernel * channels_in
        block = [tile.channels_out, tile.channels_in]
        weight_desc = TensorDescriptor(weight, [channels_out, elements], (elements, 1), block)
    programs = images * triton.cdiv(out_height, tile.height) * triton.cdiv(out_width, tile.width)
    programs *= triton.cdiv(channels_out, tile.channels_out)
    skip_strides = (0, 0, 0) if skip is None else (skip.stride(0), skip.stride(2), skip.stride(3))
    conv_bn_relu_kernel[(programs,)](
        x_desc,
        weight_desc,
        None if x_desc else x.x,
        x.other,
        x.coefficients,
        None if x_desc else weight,
        bias,
        skip,
        *destination.saved_arguments,
        out,
        destination.partials,
        stride_of(x.coefficients),
        destination.saved_stride,
        height,
        width,
        out_height,
        out_width,
        padding.sides[0],
        padding.sides[2],
        *skip_strides,
        CHANNELS_IN=channels_in,
        CHANNELS_OUT=channels_out,
        KERNEL=kernel,
        STRIDE=stride,
        REFLECT=padding.reflects,
        X_RELU=x.relu,
        RELU=epilogue.activation is not None,
        **tile.constants,
        **tile.options,
    )


def descriptors_fit(*tensors: Tensor) -> bool:
    """Whether the GPU has tensor descriptors, and takes these tensors, of channels innermost, by them."""
    fit = all(x.element_size() == 2 and x.shape[1] % 8 == 0 and x.data_ptr() % 16 == 0 for x in tensors)
    device = tensors[0].device
    return fit and (device.type == "cpu" or torch.cuda.get_device_capability(device) >= (9, 0))  # cpu: interpreted


def variants() -> Iterator[Variant]:
    """The paper's networks: the trunks, of images of 256², 512² and 1920×1080, and the convolutions of stride 2; what
    training makes of them, of four images of 256²."""
    small, medium, large = 64 * 64, 128 * 128, 270 * 480
    for dtype in ("bf16", "fp16"):
        for end in ("relu", "skip", "partials"):
            for pixels in (small, medium, large):
                yield _variant(dtype, 128, 128, 1, pixels, end, "descriptors")
            yield _variant(dtype, 64, 64, 1, large, end, "descriptors")
            yield _variant(dtype, 128, 128, 1, large, end, "reflect")
        for pixels in (small, medium, large):
            yield _variant(dtype, 128, 128, 1, pixels, "relu", "pointers")
        for channels_in, channels_out in ((16, 32), (32, 64), (64, 128)):
            for end in ("relu", "partials"):
                yield _variant(dtype, channels_in, channels_out, 2, large, end, "pointers")
        for pixels in (small, large):
            yield _variant(dtype, 128, 128, 1, pixels, "partials", "deferred")
            yield _variant(dtype, 128, 128, 1, pixels, "gradient", "deferred gradient")
            yield _variant(dtype, 128, 128, 1, pixels, "gradient", "deferred gradient", skip=True)
        yield _variant(dtype, 64, 64, 1, large, "gradient", "deferred gradient", skip=True)
        for channels_in, channels_out in ((32, 64), (64, 128)):
            yield _variant(dtype, channels_in, channels_out, 2, large, "partials", "deferred")
            yield _variant(dtype, channels_in, channels_out, 2, large, "gradient", "deferred gradient")
    for end in ("relu", "skip", "partials"):
        yield _variant("fp32", 128, 128, 1, large, end, "pointers")
    yield _variant("fp32", 128, 128, 1, large, "partials", "deferred")
    yield _variant("fp32", 128, 128, 1, large, "gradient", "deferred gradient", skip=True)
    yield _variant("fp32", 32, 64, 2, large, "relu", "reflect")


def _variant(
    dtype: str,
    channels_in: int,
    channels_out: int,
    stride: int,
    pixels: int,
    end: str,  # "relu", "skip", "partials" or "gradient"
    path: str,  # "descriptors", "pointers", "reflect", "deferred" or "deferred gradient": how x is taken
    skip: bool = False,
) -> Variant:
    descriptors = path == "descriptors"
    skip = skip or end == "skip"
    choose = deferred_tile if path.startswith("deferred") else conv_tile
    tile = choose(4 if dtype == "fp32" else 2, channels_in, channels_out, pixels)
    pointer = f"*{dtype}"
    given = dict(
        x_desc=f"tensordesc<{dtype}[1, {tile.height}, {tile.width}, {tile.channels_in}]>" if descriptors else None,
        weight_desc=f"tensordesc<{dtype}[{tile.channels_out}, {tile.channels_in}]>" if descriptors else None,
        x_ptr=None if descriptors else pointer,
        other_ptr=pointer if path == "deferred gradient" else None,
        coefficients_ptr="*fp32" if path.startswith("deferred") else None,
        weight_ptr=None if descriptors else pointer,
        bias_ptr=None if end == "gradient" else "*fp32",
        skip_ptr=pointer if skip else None,
        saved_ptr=pointer if end == "gradient" else None,
        saved_coefficients_ptr="*fp32" if end == "gradient" else None,
        out_ptr=pointer,
        partials_ptr="*fp32" if end in ("partials", "gradient") else None,
        **dict.fromkeys(("coefficients_stride", "saved_coefficients_stride"), "i32"),
        **dict.fromkeys(("height", "width", "out_height", "out_width", "left", "top"), "i32"),
        **dict.fromkeys(("skip_stride_image", "skip_stride_row", "skip_stride_column"), "i32"),
    )
    return Variant(
        conv_bn_relu_kernel,
        f"{dtype} {channels_in}-{channels_out} s{stride} {tile.height}x{tile.width} {end}"
        f"{' skip' if skip and end != 'skip' else ''} {path}",
        {name: kind for name, kind in given.items() if kind},
        dict(
            CHANNELS_IN=channels_in,
            CHANNELS_OUT=channels_out,
            KERNEL=3,
            STRIDE=stride,
            REFLECT=path == "reflect",
            X_RELU=path == "deferred",
            RELU=end in ("relu", "gradient"),
            **tile.constants,
            **{name: None for name, kind in given.items() if not kind},
        ),
        **tile.options,
        aligned=tuple(name for name in given if given[name] and ("_ptr" in name or "stride" in name)),
        matrix=dtype != "fp32",
        first_arch=90 if descriptors else 80,
    )
