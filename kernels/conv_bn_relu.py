"""Convolution as an implicit GEMM. The epilogue adds bias and skip and applies the activation, or takes statistics.

    out[pixel, o] = Σ over taps and input channels of x[pixel · stride + tap, i] · weight[o, tap, i]

A program computes a tile of pixels × output channels, one tap and one block of input channels at a time. It loads the
shifted tiles of x through tensor descriptors, which give zeros outside the image: that is the padding. Masked pointers
serve where descriptors cannot: strides, reflected borders, rows whose bytes are no multiple of 16, and sm_80.
Neighbouring programs take the channel blocks of one tile, then the next tile of its row.

In training the same kernel computes the gradient of the input: a convolution of the output's gradient, passed as x,
with the weights turned: read in the opposite order of taps, in and out exchanged.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastperc.kernels.configs import ConvTile, conv_tile, register_options, shared_memory
from fastperc.kernels.deferred import store_gradient
from fastperc.types import RELU, Activation, Destination, Epilogue, Padding


@triton.jit
def reflect_once(i, size):
    """The pixel inside ``size`` that a reflected border of at most size - 1 pixels shows at i."""
    return size - 1 - tl.abs(size - 1 - tl.abs(i))


@triton.jit
def store_partials(
    partials_ptr,  # [3, CHANNELS] fp32
    y,  # [channels, pixels] fp32
    offs_c,
    mask_p,
    CHANNELS: tl.constexpr,
):
    """Stores (count, mean, M2 about that mean) of each channel, over the pixels of ``mask_p``."""
    mask_c = offs_c < CHANNELS
    count = tl.sum(mask_p.to(tl.float32))
    mean = tl.sum(tl.where(mask_p[None, :], y, 0.0), axis=1) / count
    difference = tl.where(mask_p[None, :], y - mean[:, None], 0.0)
    tl.store(partials_ptr + offs_c, tl.zeros_like(mean) + count, mask=mask_c)
    tl.store(partials_ptr + CHANNELS + offs_c, mean, mask=mask_c)
    tl.store(partials_ptr + 2 * CHANNELS + offs_c, tl.sum(difference * difference, axis=1), mask=mask_c)


@triton.jit
def activate(
    y,  # fp32
    slope,  # of the negative side, for the activations that have it: a number, or as many as broadcast to y
    ACTIVATION: tl.constexpr,  # a name of fastperc.types.Activation, or None
):
    """The activation of each element. NaN stays NaN."""
    if ACTIVATION == "relu":
        y = tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "leaky_relu" or ACTIVATION == "prelu":
        y = tl.where(y > 0, y, y * slope)
    elif ACTIVATION == "relu6":
        y = tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)
        y = tl.minimum(y, 6.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "silu":
        y = y * tl.sigmoid(y)
    elif ACTIVATION == "sigmoid":
        y = tl.sigmoid(y)
    elif ACTIVATION == "tanh":
        y = 2 * tl.sigmoid(2 * y) - 1
    return y


@triton.jit
def store_output(
    y,  # [channels, pixels] fp32
    out_ptr,  # [N, H', W', CHANNELS] fp16|bf16|fp32
    bias_ptr,  # [CHANNELS] fp32; or None
    saved_ptr,  # as out: the deferred activation whose gradient y is; or None
    saved_coefficients_ptr,  # [NORM_ROWS, CHANNELS] fp32: those of saved, of the image; or None
    partials_ptr,  # [tiles, 3, CHANNELS] fp32, of all images; of a gradient [tiles, 2, CHANNELS]; or None
    tile,
    pixels,  # of out, int64
    offs_c,
    mask_p,
    slopes,  # [CHANNELS] fp32 of "prelu", a number of "leaky_relu", or None
    CHANNELS: tl.constexpr,
    ACTIVATION: tl.constexpr,  # in the epilogue; of a gradient, in the saved activation: "relu" or None
):
    """Stores the activation of y + bias and its statistics, or a gradient and its sums."""
    offs = pixels[None, :] * CHANNELS + offs_c[:, None]
    mask_c = offs_c < CHANNELS
    mask = mask_c[:, None] & mask_p[None, :]
    if saved_ptr is not None:
        partials_ptr += tile * 2 * CHANNELS
        RELU: tl.constexpr = ACTIVATION == "relu"
        store_gradient(y, out_ptr, offs, offs_c, mask, saved_ptr, saved_coefficients_ptr, partials_ptr, CHANNELS, RELU)
    else:
        if bias_ptr is not None:
            y += tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0)[:, None]
        slope = slopes
        if ACTIVATION == "prelu":
            slope = tl.load(slopes + offs_c, mask=mask_c, other=0.0)[:, None]
        y = activate(y, slope, ACTIVATION)
        y = y.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + offs, y, mask=mask)
        if partials_ptr is not None:
            store_partials(partials_ptr + tile * 3 * CHANNELS, y.to(tl.float32), offs_c, mask_p, CHANNELS)


@triton.jit(do_not_specialize=["height", "width", "out_height", "out_width", "left", "top"])
def conv_bn_relu_kernel(
    x_desc,  # [N, H, W, I] fp16|bf16, blocks [1, TILE_H, TILE_W, BLOCK_I]; or None
    weight_desc,  # [O, KERNEL² · I], blocks [BLOCK_O, BLOCK_I], or turned as weight; or None
    x_ptr,  # [N, H, W, I] fp16|bf16|fp32; or None
    weight_ptr,  # [O, KERNEL², I] or, with TURNED, [I, KERNEL², O]; or None
    bias_ptr,  # [O] fp32; or None
    skip_ptr,  # [N, H', W', O] with strides for all but O; or None
    saved_ptr,  # as out: the deferred activation whose gradient out is; or None
    saved_coefficients_ptr,  # [N or 1, NORM_ROWS, O] fp32: those of saved; or None
    out_ptr,  # [N, H', W', O]
    partials_ptr,  # [N, tiles, 3, O] fp32: count, mean, M2 of out; of a gradient, [N, tiles, 2, O]; or None
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
    slopes,  # [O] fp32 of "prelu", a number of "leaky_relu", or None
    CHANNELS_IN: tl.constexpr,
    CHANNELS_OUT: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    REFLECT: tl.constexpr,
    TURNED: tl.constexpr,
    ACTIVATION: tl.constexpr,  # in the epilogue; of a gradient, in the saved activation: "relu" or None
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
    first_row = tile // tiles_w * TILE_H
    first_column = tile % tiles_w * TILE_W

    offs_p = tl.arange(0, TILE_H * TILE_W)
    rows = first_row + offs_p // TILE_W
    columns = first_column + offs_p % TILE_W
    offs_o = block + tl.arange(0, BLOCK_O)
    # Channels × pixels where the tensor cores can (64 rows or more): both factors then come from shared memory, where a
    # reshaped x on the left would go through registers, and a channel's statistics are sums along a row.
    CHANNELS_FIRST: tl.constexpr = BLOCK_O >= 64
    if CHANNELS_FIRST:
        acc = tl.zeros([BLOCK_O, TILE_H * TILE_W], dtype=tl.float32)
    else:
        acc = tl.zeros([TILE_H * TILE_W, BLOCK_O], dtype=tl.float32)
    if x_desc is None:  # 64 bits for the tile's first row only
        x_ptr += (image.to(tl.int64) * height + first_row * STRIDE) * width * CHANNELS_IN
    for step in tl.range(TAPS * BLOCKS_I):
        tap = step // BLOCKS_I
        first_i = step % BLOCKS_I * BLOCK_I
        row_offset = tap // KERNEL - top
        column_offset = tap % KERNEL - left
        if x_desc is not None:
            x = x_desc.load([image, first_row + row_offset, first_column + column_offset, first_i])
            x = x.reshape(TILE_H * TILE_W, BLOCK_I)
            if TURNED:
                weight = weight_desc.load([first_i, (TAPS - 1 - tap) * CHANNELS_OUT + block]).T
            else:
                weight = weight_desc.load([block, tap * CHANNELS_IN + first_i])
        else:
            row = rows * STRIDE + row_offset
            column = columns * STRIDE + column_offset
            if REFLECT:
                row = reflect_once(row, height)
                column = reflect_once(column, width)
            mask_p = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            offs_i = first_i + tl.arange(0, BLOCK_I)
            mask_i = offs_i < CHANNELS_IN
            offs_x = ((row - first_row * STRIDE) * width + column)[:, None] * CHANNELS_IN + offs_i[None, :]
            x = tl.load(x_ptr + offs_x, mask=mask_p[:, None] & mask_i[None, :], other=0.0)
            mask_o = offs_o < CHANNELS_OUT
            if TURNED:
                weight_ptrs = weight_ptr + (offs_i[:, None] * TAPS + TAPS - 1 - tap) * CHANNELS_OUT + offs_o[None, :]
                weight = tl.load(weight_ptrs, mask=mask_i[:, None] & mask_o[None, :], other=0.0).T
            else:
                weight_ptrs = weight_ptr + (offs_o[:, None] * TAPS + tap) * CHANNELS_IN + offs_i[None, :]
                weight = tl.load(weight_ptrs, mask=mask_o[:, None] & mask_i[None, :], other=0.0)
        if CHANNELS_FIRST:
            acc = tl.dot(weight, x.T, acc, input_precision="ieee")
        else:
            acc = tl.dot(x, weight.T, acc, input_precision="ieee")
    if not CHANNELS_FIRST:
        acc = acc.T

    image = image.to(tl.int64)
    if skip_ptr is None and saved_ptr is None:
        parts = (acc,)
    else:  # the upper half, then the lower, so that a thread does not run out of registers
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
            slopes,
            CHANNELS_OUT,
            ACTIVATION,
        )


def conv_bn_relu_tiles(x: Tensor, out_shape: Sequence[int], gradient: bool = False) -> int:
    """How many tiles an image of ``out_shape`` [N, O, H', W'] has: the second size of ``partials``."""
    _, _, height, width = out_shape
    tile = _tile(x, out_shape)
    return triton.cdiv(height, tile.height) * triton.cdiv(width, tile.width) * (2 if gradient else 1)


def _tile(x: Tensor, out_shape: Sequence[int]) -> ConvTile:
    images, channels_out, height, width = out_shape
    limit = shared_memory(x.device)
    return conv_tile(x.element_size(), x.shape[1], channels_out, images * height * width, limit)


def conv_bn_relu_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    stride: int,
    padding: Padding,
    epilogue: Epilogue,
    partials: Tensor | None = None,
) -> None:
    """Fills ``out`` [N, O, H', W'] with activation(conv(``x``) + ``bias`` + skip), and ``partials``
    [N, tiles, 3, O].

    All tensors but ``bias`` and ``partials`` have their channels innermost; the epilogue's skip may be a window of a
    larger map, its norm is None. The mode of ``padding`` is ``"zeros"`` or ``"reflect"``.
    """
    _launch(x, weight, False, bias, Destination(out, partials), stride, padding, epilogue)


def conv_bn_relu_bwd(
    grad: Tensor,
    weight: Tensor,
    turned: bool,
    skip: Tensor | None,
    destination: Destination,
    stride: int,
    padding: Padding,
) -> None:
    """Fills ``destination`` with conv(``grad``) + ``skip``, the gradient of its saved activation, and its sums.

    ``weight`` is [O, I, k, k], or [I, O, k, k] to be ``turned``; channels innermost. Without a saved activation it is
    the gradient of a plain map. The padding is of zeros.
    """
    activation = RELU if destination.saved_relu else None
    _launch(grad, weight, turned, None, destination, stride, padding, Epilogue(None, activation, skip))


def _launch(
    x: Tensor,
    weight: Tensor,
    turned: bool,
    bias: Tensor | None,
    destination: Destination,
    stride: int,
    padding: Padding,
    epilogue: Epilogue,
) -> None:
    out, skip = destination.out, epilogue.skip
    images, channels_in, height, width = x.shape
    _, channels_out, out_height, out_width = out.shape
    kernel = weight.shape[-1]
    tile = _tile(x, out.shape)
    x_desc = weight_desc = None
    if stride == 1 and not padding.reflects and descriptors_fit(x, weight):
        strides = (height * width * channels_in, width * channels_in, channels_in, 1)
        block = [1, tile.height, tile.width, tile.channels_in]
        x_desc = TensorDescriptor(x, [images, height, width, channels_in], strides, block)
        elements = weight[0].numel()
        block = [tile.channels_in, tile.channels_out] if turned else [tile.channels_out, tile.channels_in]
        weight_desc = TensorDescriptor(weight, [len(weight), elements], (elements, 1), block)
    programs = images * triton.cdiv(out_height, tile.height) * triton.cdiv(out_width, tile.width)
    programs *= triton.cdiv(channels_out, tile.channels_out)
    skip_strides = (0, 0, 0) if skip is None else (skip.stride(0), skip.stride(2), skip.stride(3))
    conv_bn_relu_kernel[(programs,)](
        x_desc,
        weight_desc,
        None if x_desc else x,
        None if x_desc else weight,
        bias,
        skip,
        *destination.saved_arguments,
        out,
        destination.partials,
        destination.saved_stride,
        height,
        width,
        out_height,
        out_width,
        padding.sides[0],
        padding.sides[2],
        *skip_strides,
        slopes_of(epilogue.activation, channels_out),
        CHANNELS_IN=channels_in,
        CHANNELS_OUT=channels_out,
        KERNEL=kernel,
        STRIDE=stride,
        REFLECT=padding.reflects,
        TURNED=turned,
        ACTIVATION=epilogue.activation and epilogue.activation.name,
        **tile.constants,
        **tile.options,
        **registers_for(epilogue.activation, x.device),
    )


def slopes_of(activation: Activation | None, channels: int) -> Tensor | float | None:
    """What the kernels take as slopes: a float32 [C] of ``"prelu"``, a number of ``"leaky_relu"``, or ``None``."""
    if activation is None:
        return None
    if activation.name == "leaky_relu":
        return 0.01 if activation.slope is None else float(activation.slope)
    if activation.slopes is not None:
        return activation.slopes.detach().float().expand(channels).contiguous()
    return None


def registers_for(activation: Activation | None, device: torch.device) -> dict[str, int]:
    """Options of Triton's compiler for a product with ``activation``. All but ReLU take registers, which the assembler
    spills on the largest GPUs too, unless a kernel names its own limit."""
    many = activation is not None and activation.name != "relu"
    return register_options(0 if many else shared_memory(device))


def descriptors_fit(*tensors: Tensor) -> bool:
    """Whether the GPU has tensor descriptors and can load ``tensors``, channels innermost, through them.

    GeForce GPUs from sm_120 on have them too, but there the kernel takes stack memory for them and pointers take none.
    """
    fit = all(x.element_size() == 2 and x.shape[1] % 8 == 0 and x.data_ptr() % 16 == 0 for x in tensors)
    device = tensors[0].device
    if not fit or device.type == "cpu":  # cpu: interpreted
        return fit
    return (9, 0) <= torch.cuda.get_device_capability(device) < (12, 0)
