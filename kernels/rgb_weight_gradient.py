"""The gradient of the weight of a wide convolution from three channels, or to three: a network's two ends.

    out[d, row, column, c] = Σ over images and pixels of dense[pixel, d] · picture[pixel + (row, column), c]

In a row of the picture, the taps of a pixel and their colours are 3·k consecutive numbers. Two neighbouring pixels
share a run of 3·(k + 1) of them, which the prepared picture has in a piece: that is a row of the product's right side,
for four of the k rows at a time. The left side has the channels of both pixels. So the sum for a tap is at two places,
one for each pixel, which ``fastperc.kernels.sum_parts`` adds up together with the parts, in order.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastperc.kernels.configs import multiprocessors, register_options, shared_memory
from fastperc.kernels.conv_bn_relu import reflect_once
from fastperc.kernels.rgb_conv_stem import Runs
from fastperc.kernels.sum_parts import SumOf, Wide
from fastperc.kernels.weight_gradient import parts_of

PIXELS = tl.constexpr(2)  # that share a row of the product
ROWS = tl.constexpr(4)  # of taps that a program computes
PER_MULTIPROCESSOR = 2  # programs that one runs at a time


@triton.jit(do_not_specialize=["height", "width", "border", "rows", "images", "part_steps"])
def rgb_weight_gradient_kernel(
    dense_ptr,  # [N, H, W, D] fp16|bf16|fp32
    picture_ptr,  # [N, rows, pairs of pixels, RUN] as dense
    partials_ptr,  # [parts, PIXELS, D, KERNEL, RUN] fp32
    height,  # of dense
    width,
    border,  # reflected pixels on each side of dense that count too
    rows,  # of the picture: H + 2 · border + KERNEL - 1
    images,
    part_steps,  # of a part, BLOCK_P pairs of pixels each
    CHANNELS: tl.constexpr,  # of dense
    KERNEL: tl.constexpr,
    RUN: tl.constexpr,  # numbers of a pair in a row of the picture: 3 · (KERNEL + PIXELS - 1) or more
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    BLOCKS_D: tl.constexpr = (CHANNELS + BLOCK_D - 1) // BLOCK_D
    GROUPS: tl.constexpr = (KERNEL + ROWS - 1) // ROWS
    pid = tl.program_id(0)
    group = pid % GROUPS
    first_d = pid // GROUPS % BLOCKS_D * BLOCK_D
    part = pid // GROUPS // BLOCKS_D
    padded_width = width + 2 * border
    pairs_w = tl.cdiv(padded_width, PIXELS)
    pairs = (height + 2 * border) * pairs_w  # of an image
    steps = tl.cdiv(pairs, BLOCK_P)
    offs_m = tl.arange(0, PIXELS * BLOCK_D)
    offs_d = first_d + offs_m % BLOCK_D
    offs_n = tl.arange(0, ROWS * RUN)
    tap_row = group * ROWS + offs_n // RUN
    offs_picture = tl.arange(0, BLOCK_P)[:, None] * RUN + (tap_row * pairs_w * RUN + offs_n % RUN)[None, :]
    mask_n = tap_row < KERNEL
    image = (part * part_steps // steps).to(tl.int64)
    start = part * part_steps % steps * BLOCK_P

    acc = tl.zeros([PIXELS * BLOCK_D, ROWS * RUN], dtype=tl.float32)
    for _ in tl.range(tl.minimum(part_steps, images * steps - part * part_steps)):
        offs_p = start + tl.arange(0, BLOCK_P)
        row = offs_p // pairs_w
        pair = offs_p % pairs_w
        column = pair[:, None] * PIXELS + (offs_m // BLOCK_D)[None, :]
        mask = (offs_p < pairs)[:, None] & (column < padded_width) & (offs_d < CHANNELS)[None, :]
        # 64 bits for the first row only: from there 32 are enough.
        first_row = reflect_once(start // pairs_w - border, height)
        pixel = (reflect_once(row - border, height) - first_row)[:, None] * width + reflect_once(column - border, width)
        dense_ptrs = dense_ptr + (image * height + first_row) * width * CHANNELS + (pixel * CHANNELS + offs_d[None, :])
        dense = tl.load(dense_ptrs, mask=mask, other=0.0)
        picture_ptrs = picture_ptr + (image * rows * pairs_w + start) * RUN + offs_picture
        picture = tl.load(picture_ptrs, mask=(offs_p < pairs)[:, None] & mask_n[None, :], other=0.0)
        acc = tl.dot(dense.T, picture, acc, input_precision="ieee")
        start += BLOCK_P  # the next step, without a division
        ends = start >= pairs
        start = tl.where(ends, 0, start)
        image += ends.to(tl.int64)
    offs_m = ((part.to(tl.int64) * PIXELS + offs_m // BLOCK_D) * CHANNELS + offs_d) * KERNEL * RUN
    offs = offs_m[:, None] + (tap_row * RUN + offs_n % RUN)[None, :]
    tl.store(partials_ptr + offs, acc, mask=(offs_d < CHANNELS)[:, None] & mask_n[None, :])


BLOCK_CHANNELS = 32  # of dense: two pixels are the 64 rows that the tensor cores take


def _block(itemsize: int) -> dict[str, int]:
    """Block size, warps and stages."""
    if itemsize == 4:
        return dict(BLOCK_P=16, num_warps=8, num_stages=1)
    return dict(BLOCK_P=64, num_warps=4, num_stages=3)


def picture_runs(width: int, kernel: int) -> Runs:
    """How the picture is cut for a ``dense`` map of so many columns, its border included."""
    pixels = PIXELS.value
    return Runs(triton.cdiv(width, pixels), 3 * pixels, max(triton.next_power_of_2(3 * (kernel + pixels - 1)), 4))


def rgb_weight_gradient(
    dense: Tensor, picture: Tensor, kernel: int, border: int, to_rgb: bool, destination: SumOf
) -> None:
    """Makes ``destination`` [D, k, k, 3] or, ``to_rgb`` and turned by 180°, [3, k, k, D].

    ``dense`` is [N, D, H, W] in NHWC, ``picture`` as prepared in :func:`picture_runs`,
    [N, H + 2 · border + k - 1, numbers]. ``border`` is how many reflected pixels ``dense`` has on each side.
    """
    images, channels, height, width = dense.shape
    pixels, (pairs, _, run) = PIXELS.value, picture_runs(width + 2 * border, kernel)
    block = _block(dense.element_size())
    blocks = triton.cdiv(channels, BLOCK_CHANNELS) * triton.cdiv(kernel, ROWS.value)
    steps = images * triton.cdiv((height + 2 * border) * pairs, block["BLOCK_P"])
    parts, part_steps = parts_of(steps, blocks, PER_MULTIPROCESSOR * multiprocessors(dense.device))
    shape = (3, kernel, kernel, channels) if to_rgb else (channels, kernel, kernel, 3)
    wide = Wide(kernel, run, channels, to_rgb)
    partials = destination.empty(parts, (pixels, channels, kernel, run), shape, wide)
    rgb_weight_gradient_kernel[(parts * blocks,)](
        dense,
        picture,
        partials,
        height,
        width,
        border,
        picture.shape[1],
        images,
        part_steps,
        CHANNELS=channels,
        KERNEL=kernel,
        RUN=run,
        BLOCK_D=BLOCK_CHANNELS,
        **block,
        **register_options(shared_memory(dense.device)),
    )
