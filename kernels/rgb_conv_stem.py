"""The first convolution, wide, from a picture of 3 channels.

    rgb_prepare_kernel     a window of the picture, reflected beyond the border, normalised, padded: 3 numbers a pixel
    rgb_conv_stem_kernel   the convolution. Four neighbouring pixels share a row of the product: in each of the k rows
                           their inputs are 3·(k+3) consecutive numbers in memory, multiplied by 4·O columns

Where a column has no tap, its weight is zero: at k = 9 with 32 channels the tensor cores compute 1.4 times the products
needed. On an H200 the kernel waits for its loads, half of them from the L1 cache; with the weights kept in shared
memory from tile to tile it was slower. A NaN or infinite number also reaches the pixels that share its product.

In training, the same kernel gives the gradient of the last convolution's input: from the gradient of the picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastperc.kernels.configs import LARGEST, PROGRAMS, shared_memory
from fastperc.kernels.conv_bn_relu import registers_for, slopes_of, store_output
from fastperc.types import RELU, Activation, Deferred, Destination, Padding

PIXELS = tl.constexpr(4)  # pixels that share a row of the product
STEP, STAGES = 32, 3  # numbers that a step of the sum takes; steps in flight
PREPARE_BLOCK = 1024  # elements per program
PREPARE_OPTIONS = dict(num_warps=4, num_stages=1)


@triton.jit
def reflect(i, size):
    """The pixel inside ``size`` that a reflected border of any width shows at i."""
    period = tl.maximum(2 * (size - 1), 1)
    i = tl.abs(i) % period
    return tl.minimum(i, period - i)


@triton.jit(
    do_not_specialize=[
        "image_height",
        "image_width",
        "window_top",
        "window_left",
        "window_height",
        "window_width",
        "left",
        "top",
        "rows",
    ]
)
def rgb_prepare_kernel(
    image_ptr,  # [N, 3, H, W] uint8|fp16|bf16|fp32 of any strides
    raw_ptr,  # with the strides of the image, a gradient by tanh(raw): it is multiplied by 1 − tanh²; or None
    x_ptr,  # [N, rows, numbers] fp16|bf16|fp32
    image_height,
    image_width,
    stride_image,
    stride_channel,
    stride_row,
    stride_column,
    window_top,
    window_left,
    window_height,
    window_width,
    left,  # padding
    top,
    rows,
    numbers,
    scale,
    shift,
    REFLECT: tl.constexpr,
    STEP: tl.constexpr,  # numbers from where a run begins to where the next one does
    RUN: tl.constexpr,  # numbers in a run, which may overlap the next; or None: a row is one run
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(numbers, BLOCK)
    pid = tl.program_id(0)
    line = pid // blocks
    offs = pid % blocks * BLOCK + tl.arange(0, BLOCK)
    number = offs if RUN is None else offs // RUN * STEP + offs % RUN
    row = line % rows - top
    column = number // 3 - left
    if REFLECT:
        row = reflect(row, window_height)
        column = reflect(column, window_width)
    inside = (column >= 0) & (column < tl.where((row >= 0) & (row < window_height), window_width, 0))
    row = reflect(window_top + row, image_height).to(tl.int64)
    column = reflect(window_left + column, image_width).to(tl.int64)
    mask = offs < numbers
    channel = (number % 3).to(tl.int64)
    offs_image = (line // rows).to(tl.int64) * stride_image + row * stride_row
    offs_image += column * stride_column + channel * stride_channel
    level = tl.load(image_ptr + offs_image, mask=mask & inside, other=0).to(tl.float32)
    if raw_ptr is not None:
        raw = tl.load(raw_ptr + offs_image, mask=mask & inside, other=0.0).to(tl.float32)
        decay = tl.exp(-2 * tl.abs(raw))
        level *= 4 * decay / ((1 + decay) * (1 + decay))  # 1 − tanh², without the cancellation
    x = tl.where(inside, level * scale + shift, 0.0)
    tl.store(x_ptr + line.to(tl.int64) * numbers + offs, x.to(x_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["height", "width"])
def rgb_conv_stem_kernel(
    x_ptr,  # [N, H' + KERNEL - 1, pitch] fp16|bf16|fp32
    weight_ptr,  # [PIXELS, O, STEPS * BLOCK_K] as x
    bias_ptr,  # [O] fp32; or None
    saved_ptr,  # as out: the deferred activation whose gradient out is; or None
    saved_coefficients_ptr,  # [N or 1, NORM_ROWS, O] fp32: those of saved; or None
    out_ptr,  # [N, H', W', O]
    partials_ptr,  # [N, tiles, 3, O] fp32: count, mean, M2 of out; of a gradient, [N, tiles, 2, O]; or None
    saved_coefficients_stride,
    height,  # of out
    width,
    pitch,
    slopes,  # [O] fp32 of "prelu", a number of "leaky_relu", or None
    KERNEL: tl.constexpr,
    CHANNELS_OUT: tl.constexpr,
    ACTIVATION: tl.constexpr,  # in the epilogue; of a gradient, in the saved activation: "relu" or None
    RUN: tl.constexpr,  # elements of a row of x that a group of pixels takes, rounded up to a multiple of 4
    STEPS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    BLOCKS_O: tl.constexpr = (CHANNELS_OUT + BLOCK_O - 1) // BLOCK_O
    groups_w = tl.cdiv(width, PIXELS)
    groups = height * groups_w
    tiles = tl.cdiv(groups, BLOCK_G)
    pid = tl.program_id(0)
    first_o = pid % BLOCKS_O * BLOCK_O
    tile = pid // BLOCKS_O % tiles
    image = (pid // BLOCKS_O // tiles).to(tl.int64)

    offs_g = tile * BLOCK_G + tl.arange(0, BLOCK_G)
    lines = image * (height + KERNEL - 1) + offs_g // groups_w
    x_ptrs = x_ptr + (lines * pitch + offs_g % groups_w * (3 * PIXELS))[:, None]
    offs_n = tl.arange(0, PIXELS * BLOCK_O)
    offs_o = first_o + offs_n % BLOCK_O
    weight_ptrs = weight_ptr + ((offs_n // BLOCK_O * CHANNELS_OUT + offs_o) * (STEPS * BLOCK_K))[:, None]
    acc = tl.zeros([BLOCK_G, PIXELS * BLOCK_O], dtype=tl.float32)
    for step in tl.range(STEPS):
        offs_k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        mask = (offs_g < groups)[:, None] & (offs_k < KERNEL * RUN)[None, :]
        x = tl.load(x_ptrs + (offs_k // RUN * pitch + offs_k % RUN)[None, :], mask=mask, other=0.0)
        weight = tl.load(weight_ptrs + offs_k[None, :], mask=(offs_o < CHANNELS_OUT)[:, None], other=0.0)
        acc = tl.dot(x, weight.T, acc, input_precision="ieee")

    offs_p = tl.arange(0, PIXELS * BLOCK_G)
    offs_g = tile * BLOCK_G + offs_p // PIXELS
    row = offs_g // groups_w
    column = offs_g % groups_w * PIXELS + offs_p % PIXELS
    mask_p = (row < height) & (column < width)
    offs_o = first_o + tl.arange(0, BLOCK_O)
    if saved_ptr is not None:
        saved_coefficients_ptr += image * saved_coefficients_stride
    store_output(
        acc.reshape(PIXELS * BLOCK_G, BLOCK_O).T,
        out_ptr,
        bias_ptr,
        saved_ptr,
        saved_coefficients_ptr,
        partials_ptr,
        image * tiles + tile,
        (image * height + row) * width + column,
        offs_o,
        mask_p,
        slopes,
        CHANNELS_OUT,
        ACTIVATION,
    )


def _run(kernel: int) -> int:
    return 4 * triton.cdiv(3 * (kernel + PIXELS.value - 1), 4)


def pack(weight: Tensor) -> Tensor:
    """The kernel's weights [PIXELS, O, k·run rounded up to steps] from ``weight`` [O, 3, k, k]."""
    channels, _, kernel, _ = weight.shape
    run, pixels = _run(kernel), PIXELS.value
    numbers = STEP * triton.cdiv(kernel * run, STEP)
    packed = weight.new_zeros(pixels, channels, numbers)
    # Of each pixel the k rows of 3·k weights, which begin 3 numbers later than the pixel before's.
    strides = (channels * numbers + 3, numbers, run, 1)
    packed.as_strided((pixels, channels, kernel, 3 * kernel), strides).copy_(weight.permute(0, 2, 3, 1).flatten(2))
    return packed


def _block(channels_out: int) -> int:
    return min(max(triton.next_power_of_2(channels_out), 16), 32)


def _has_tensor_memory(device: torch.device) -> bool:
    """Whether products are added up in tensor memory (sm_100), from where all of them come into registers at once."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability(device)[0] in (10, 11)


def _tile(out: Tensor, with_sums: bool, activation: Activation | None = None) -> tuple[int, int]:
    """Groups of pixels per program, and its warps: the fastest of those measured on an H200. Sums take registers, and
    so do activations other than ReLU, and the products of GPUs with less shared memory or with tensor memory."""
    if out.element_size() == 4:
        return 32, 8
    enough = out.numel() >= 128 * PIXELS.value * _block(out.shape[1]) * PROGRAMS
    other = activation is not None and activation.name != "relu"
    many_registers = with_sums or other or shared_memory(out.device) < LARGEST or _has_tensor_memory(out.device)
    return (128, 8 if many_registers else 4) if enough else (64, 4)


def rgb_conv_stem_tiles(out: Tensor) -> int:
    """How many tiles an image of ``out`` [N, O, H', W'] has: the second size of ``partials``."""
    return _tiles(out, _tile(out, True)[0])


def _tiles(out: Tensor, groups: int) -> int:
    _, _, height, width = out.shape
    return triton.cdiv(height * triton.cdiv(width, PIXELS.value), groups)


def pitch_of(width: int) -> int:
    """The numbers in a row of the stem kernel's input, of ``width`` pixels: up to whole groups and aligned rows."""
    return 48 * triton.cdiv(width + PIXELS.value, 16)


def rgb_prepare(
    image: Tensor,
    window: Sequence[int],
    padding: Padding,
    input_range: tuple[float, float],
    dtype: torch.dtype,
    runs: Runs | None = None,
    raw: Tensor | None = None,
) -> Tensor:
    """The stem kernel's input [N, rows, numbers]: the ``window`` of ``image`` [N, 3, H, W], padded, 3 numbers a pixel.

    Pixels are multiplied by the first number of ``input_range``, plus the second. Zeros follow on the right, up to
    whole groups of pixels and aligned rows. With ``runs`` a row is cut into those. With ``raw``, of the image's shape
    and strides, the image is a gradient by tanh(``raw``), and that by ``raw`` is prepared.
    """
    left, right, top, bottom = padding.sides
    rows = window[2] + top + bottom
    numbers = pitch_of(window[3] + left + right) if runs is None else runs.pieces * runs.length
    x = torch.empty(len(image), rows, numbers, dtype=dtype, device=image.device)
    rgb_prepare_kernel[(len(image) * rows * triton.cdiv(numbers, PREPARE_BLOCK),)](
        image,
        raw,
        x,
        *image.shape[2:],
        *image.stride(),
        *window,
        left,
        top,
        rows,
        numbers,
        *input_range,
        REFLECT=padding.mode == "reflect",
        STEP=None if runs is None else runs.step,
        RUN=None if runs is None else runs.length,
        BLOCK=PREPARE_BLOCK,
        **PREPARE_OPTIONS,
    )
    return x


class Runs(NamedTuple):
    """Overlapping pieces of a picture's row, one after the other in memory, so that each begins at a whole vector."""

    pieces: int
    step: int  # numbers from where one begins to where the next one does
    length: int  # numbers


def rgb_conv_stem_fwd(
    x: Tensor, packed: Tensor, bias: Tensor, out: Tensor, activation: Activation | None, partials: Tensor | None = None
) -> None:
    """Fills ``out`` [N, O, H', W'], channels innermost, with activation(conv(``x``) + ``bias``), and ``partials``
    [N, tiles, 3, O]; ``x`` is what :func:`rgb_prepare` makes, ``packed`` what :func:`pack` does, all in one dtype."""
    _launch(x, packed, bias, Destination(out, partials), activation)


def rgb_conv_head_bwd(
    grad: Tensor, packed: Tensor, saved: Deferred | None, out: Tensor, partials: Tensor | None
) -> None:
    """Fills ``out`` with the gradient of ``saved``, and ``partials`` [N, tiles, 2, O].

    ``saved`` is the input of a convolution to three channels, ``grad`` the prepared gradient of its output. Without
    ``saved`` it is the gradient of a plain map.
    """
    destination = Destination(out, partials, saved)
    _launch(grad, packed, None, destination, RELU if destination.saved_relu else None)


def _launch(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    destination: Destination,
    activation: Activation | None,
) -> None:
    out = destination.out
    images, channels_out, height, width = out.shape
    _, rows, pitch = x.shape
    kernel = rows - height + 1
    block, (groups, num_warps) = _block(channels_out), _tile(out, destination.partials is not None, activation)
    programs = images * _tiles(out, groups) * triton.cdiv(channels_out, block)
    rgb_conv_stem_kernel[(programs,)](
        x,
        packed,
        bias,
        *destination.saved_arguments,
        out,
        destination.partials,
        destination.saved_stride,
        height,
        width,
        pitch,
        slopes_of(activation, channels_out),
        KERNEL=kernel,
        CHANNELS_OUT=channels_out,
        ACTIVATION=activation and activation.name,
        RUN=_run(kernel),
        STEPS=packed.shape[2] // STEP,
        BLOCK_G=groups,
        BLOCK_O=block,
        BLOCK_K=STEP,
        num_warps=num_warps,
        num_stages=STAGES,
        **registers_for(activation, out.device),
    )
