"""The last convolution, wide and to three channels, and the picture that it gives.

Three filters are too few columns for a matrix product. So the horizontal taps become columns too: P[pixel, dx·3 + o] is
summed over rows and channels, and k shifted additions of P give a pixel. Four rows of the picture are columns as well:
a row of x is loaded once for all four, instead of k times for each.

Where a column has no tap, its weight is zero: at k = 9 with 32 channels the tensor cores compute 1.7 times the products
needed. On an H200 the kernel waits for its loads; with the weights kept in shared memory from tile to tile it was
slower. A NaN or infinite number also reaches the pixels that share its product.

In training, the same kernel gives the gradient of a network's input, from the gradient of its first convolution's
output.
"""

from __future__ import annotations

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fastperc.kernels.configs import LARGEST, channel_step, register_options, shared_memory
from fastperc.kernels.conv_bn_relu import reflect_once
from fastperc.types import Padding

ROWS = tl.constexpr(4)  # rows of the output that share a row of the product
ROUNDING = tl.constexpr(12582912.0)  # 1.5 · 2²³: adding and subtracting it rounds to the nearest, ties to even


@triton.jit(do_not_specialize=["height", "width", "out_height", "out_width", "left", "top"])
def rgb_conv_head_kernel(
    x_ptr,  # [N, H, W, C] fp16|bf16|fp32
    weight_ptr,  # [COLUMNS, KERNEL + 2 * ROWS - 2, C] as x
    bias_ptr,  # [3] fp32; or None
    out_ptr,  # [N, 3, H', W'] uint8|fp16|bf16|fp32 of any strides
    raw_ptr,  # as out and with its strides: the convolution's own values; or None
    height,
    width,
    out_height,
    out_width,
    left,  # padding
    top,
    stride_image,  # of out
    stride_channel,
    stride_row,
    stride_column,
    CHANNELS: tl.constexpr,
    KERNEL: tl.constexpr,
    REFLECT: tl.constexpr,
    OUTPUT: tl.constexpr,  # "tanh": 0.5 + 150/255 · tanh; "linear": over 255; or None: as it is
    COLUMNS: tl.constexpr,  # 3 * KERNEL or more
    BLOCK_P: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    BLOCKS_I: tl.constexpr = (CHANNELS + BLOCK_I - 1) // BLOCK_I
    LINES: tl.constexpr = ROWS + KERNEL - 1  # of x, for ROWS of out
    WIDTH: tl.constexpr = BLOCK_P - KERNEL + 1  # of the tile of out
    tiles_w = tl.cdiv(out_width, WIDTH)
    tiles = tl.cdiv(out_height, ROWS) * tiles_w
    pid = tl.program_id(0)
    image = (pid // tiles).to(tl.int64)
    first_row = pid % tiles // tiles_w * ROWS
    first_column = pid % tiles_w * WIDTH

    offs_p = tl.arange(0, BLOCK_P)
    offs_n = tl.arange(0, ROWS * COLUMNS)
    column = first_column + offs_p - left
    if REFLECT:
        column = reflect_once(column, width)
    acc = tl.zeros([BLOCK_P, ROWS * COLUMNS], dtype=tl.float32)
    for step in tl.range(LINES * BLOCKS_I):
        line = step // BLOCKS_I
        row = first_row + line - top
        if REFLECT:
            row = reflect_once(row, height)
        offs_i = step % BLOCKS_I * BLOCK_I + tl.arange(0, BLOCK_I)
        mask_i = offs_i < CHANNELS
        row_ptr = x_ptr + (image * height + row) * width * CHANNELS
        mask_p = (column >= 0) & (column < tl.where((row >= 0) & (row < height), width, 0))
        offs_x = column[:, None] * CHANNELS + offs_i[None, :]
        x = tl.load(row_ptr + offs_x, mask=mask_p[:, None] & mask_i[None, :], other=0.0)
        filters = offs_n // ROWS * (LINES + ROWS - 1) + offs_n % ROWS + (LINES - 1 - line)
        weight_ptrs = weight_ptr + filters[:, None] * CHANNELS + offs_i[None, :]
        weight = tl.load(weight_ptrs, mask=mask_i[None, :], other=0.0)
        acc = tl.dot(x, weight.T, acc, input_precision="ieee")

    # Each of the four warps holds all taps of one of the ROWS, so that none waits for another below. The % tells the
    # compiler which of a thread's registers a shifted pixel is in; the pixels that wrap around are not stored.
    shifted = (offs_p[:, None] + offs_n[None, :] // ROWS // 3) % BLOCK_P
    acc = tl.gather(acc, shifted, 0).reshape(BLOCK_P, COLUMNS, ROWS)
    offs_n = tl.arange(0, COLUMNS)
    row = first_row + tl.arange(0, ROWS)[:, None]
    column = (first_column + offs_p)[None, :]
    mask = (row < out_height) & (offs_p < WIDTH)[None, :] & (column < out_width)
    offs_out = image * stride_image + row.to(tl.int64) * stride_row + column.to(tl.int64) * stride_column
    for o in tl.static_range(3):
        own = (offs_n % 3 == o) & (offs_n < 3 * KERNEL)
        v = tl.sum(tl.where(own[None, :, None], acc, 0.0), axis=1).T
        if bias_ptr is not None:
            v += tl.load(bias_ptr + o)
        if raw_ptr is not None:
            tl.store(raw_ptr + offs_out, v.to(raw_ptr.dtype.element_ty), mask=mask)
        if OUTPUT == "tanh":
            v = 0.5 + 150 / 255 * (2 * tl.sigmoid(2 * v) - 1)
        elif OUTPUT == "linear":
            v = v / 255
        if out_ptr.dtype.element_ty == tl.uint8:
            v = tl.where(v > 0, tl.minimum(v, 1.0), 0.0)  # NaN becomes 0
            v = v * 255 + ROUNDING - ROUNDING
        tl.store(out_ptr + offs_out, v.to(out_ptr.dtype.element_ty), mask=mask)
        offs_out += stride_channel


def pack(weight: Tensor) -> Tensor:
    """The kernel's weights [columns, k + 2·ROWS - 2, C] from ``weight`` [3, C, k, k]."""
    kernel, empty_rows = weight.shape[2], ROWS.value - 1
    filters = weight.flip(2).permute(3, 0, 2, 1).flatten(0, 1)  # [3k, k, C]
    return F.pad(filters, (0, 0, empty_rows, empty_rows, 0, _columns(kernel) - 3 * kernel)).contiguous()


def _columns(kernel: int) -> int:
    return max(triton.next_power_of_2(3 * kernel), 16)


def rgb_conv_head_fwd(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    out: Tensor,
    padding: Padding,
    output: str | None,
    raw: Tensor | None = None,
) -> None:
    """Fills ``out`` [N, 3, H', W'], of any strides, with the picture that conv(``x``) + ``bias`` is.

    ``x`` [N, C, H, W] has its channels innermost; ``packed`` is what :func:`pack` makes, in its dtype; ``padding``
    of zeros or reflected; ``output`` ``"tanh"``, ``"linear"`` or ``None``, for the convolution's own values. ``raw``,
    with the shape and strides of ``out``, is filled with those too.
    """
    images, channels, height, width = x.shape
    _, _, out_height, out_width = out.shape
    left, _, top, bottom = padding.sides
    kernel = height + top + bottom - out_height + 1
    tile = _tile(x.element_size(), channels, shared_memory(x.device))
    programs = triton.cdiv(out_height, ROWS.value) * triton.cdiv(out_width, tile["BLOCK_P"] - kernel + 1)
    rgb_conv_head_kernel[(images * programs,)](
        x,
        packed,
        bias,
        out,
        raw,
        height,
        width,
        out_height,
        out_width,
        left,
        top,
        *out.stride(),
        CHANNELS=channels,
        KERNEL=kernel,
        REFLECT=padding.mode == "reflect",
        OUTPUT=output,
        COLUMNS=_columns(kernel),
        **tile,
        **register_options(shared_memory(x.device)),
    )


def _tile(itemsize: int, channels: int, limit: int) -> dict[str, int]:
    """Block sizes and options: the fastest of those measured on an H200, or smaller steps that fit ``limit`` bytes of
    shared memory and do not spill registers."""
    if itemsize == 4:
        return dict(BLOCK_P=64, BLOCK_I=16, num_warps=8, num_stages=2)
    step = min(channel_step(channels), 32) if limit < LARGEST else channel_step(channels)
    return dict(BLOCK_P=128, BLOCK_I=step, num_warps=4, num_stages=4)
