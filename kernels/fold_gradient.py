"""The gradient of an activation from that of its padded copy: a reflected border's is added to the pixels it showed.

Without a border this is where a chain's backward begins: the gradient is masked by the last layer's ReLU, and summed
for its norm.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastperc.kernels.deferred import store_gradient
from fastperc.kernels.instance_norm import block_of, place
from fastperc.types import Deferred, stride_of

BLOCK = 4096  # elements per program
OPTIONS = dict(num_warps=8, num_stages=1)


@triton.jit
def padded_position(row, top, bottom, size, where: tl.constexpr, EDGE: tl.constexpr):
    """Where the padded copy shows ``row``, and whether it does: in its middle (where = 0), in the border before it (1)
    or in the border after it (2). The border is reflected about the outermost pixel or, with EDGE, about its outer
    edge."""
    if where == 0:
        index = row + top
        exists = row < size
    elif where == 1:
        index = top - EDGE - row
        exists = (row >= 1 - EDGE) & (index >= 0)
    else:
        index = 2 * (size - 1) + EDGE - row + top
        exists = (row <= size - 2 + EDGE) & (index < size + top + bottom)
    return index, exists


@triton.jit(do_not_specialize=["height", "width", "left", "right", "top", "bottom"])
def fold_gradient_kernel(
    grad_ptr,  # [N, top + H + bottom, left + W + right, C] fp16|bf16|fp32 of any strides
    skip_ptr,  # [N, H, W, C] as out: another gradient of the same activation, to be added; or None
    saved_ptr,  # [N, H, W, C] as out: the deferred activation; or None, if it is a plain map
    saved_coefficients_ptr,  # [N or 1, NORM_ROWS, C] fp32: those of saved; or None
    out_ptr,  # [N, H, W, C] fp16|bf16|fp32
    partials_ptr,  # [N, tiles, 2, C] fp32; or None
    saved_coefficients_stride,
    height,
    width,
    left,
    right,
    top,
    bottom,
    stride_image,
    stride_channel,
    stride_row,
    stride_column,
    CHANNELS: tl.constexpr,
    PADDED: tl.constexpr,
    EDGE: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    pixels = height * width
    image, tile, offs_p, offs_c = place(tl.program_id(0), pixels, CHANNELS, BLOCK_P, BLOCK_C)
    mask_c = offs_c < CHANNELS
    row = offs_p // width
    column = offs_p % width
    offs = (image * pixels + offs_p)[None, :] * CHANNELS + offs_c[:, None]
    mask = mask_c[:, None] & (offs_p < pixels)[None, :]
    grad_ptr += image * stride_image
    grad = tl.zeros([BLOCK_C, BLOCK_P], dtype=tl.float32)
    for r in tl.static_range(3 if PADDED else 1):
        rows, row_exists = padded_position(row, top, bottom, height, r, EDGE)
        if r == 0 or tl.max(row_exists.to(tl.int32)) > 0:  # few programs have a row next to the border
            for c in tl.static_range(3 if PADDED else 1):
                columns, column_exists = padded_position(column, left, right, width, c, EDGE)
                offs_padded = rows.to(tl.int64) * stride_row + columns.to(tl.int64) * stride_column
                grad_ptrs = grad_ptr + offs_padded[None, :] + offs_c[:, None].to(tl.int64) * stride_channel
                mask_p = mask_c[:, None] & (row_exists & column_exists)[None, :]
                grad += tl.load(grad_ptrs, mask=mask_p, other=0.0).to(tl.float32)
    if skip_ptr is not None:
        grad += tl.load(skip_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if saved_ptr is not None:
        saved_coefficients_ptr += image * saved_coefficients_stride
        partials_ptr += (image * tl.cdiv(pixels, BLOCK_P) + tile) * 2 * CHANNELS
    store_gradient(grad, out_ptr, offs, offs_c, mask, saved_ptr, saved_coefficients_ptr, partials_ptr, CHANNELS, RELU)


def fold_gradient_tiles(out: Tensor) -> int:
    """How many tiles an image of ``out`` [N, C, H, W] has: the second size of ``partials``."""
    return triton.cdiv(out.shape[2] * out.shape[3], block_of(out.shape[1], BLOCK)["BLOCK_P"])


def fold_gradient(
    grad: Tensor,
    skip: Tensor | None,
    saved: Deferred | None,
    out: Tensor,
    padding: tuple[int, int, int, int],
    edge: bool,
    partials: Tensor | None,
) -> None:
    """Fills ``out`` [N, C, H, W] with the gradient of ``saved``, and ``partials`` [N, tiles, 2, C] float32.

    Without ``saved`` it is the gradient of a plain map. ``out`` has its channels innermost. ``grad``, of any strides,
    is the gradient of the activation's copy with a reflected border of ``padding`` (left, right, top, bottom); with
    ``edge`` the border begins with the outermost pixel itself. ``skip``, as out, is added.
    """
    images, channels, height, width = out.shape
    block = block_of(channels, BLOCK)
    programs = images * fold_gradient_tiles(out) * triton.cdiv(channels, block["BLOCK_C"])
    fold_gradient_kernel[(programs,)](
        grad,
        skip,
        None if saved is None else saved.x,
        None if saved is None else saved.coefficients,
        out,
        partials,
        0 if saved is None else stride_of(saved.coefficients),
        height,
        width,
        *padding,
        *grad.stride(),
        CHANNELS=channels,
        PADDED=any(padding),
        EDGE=int(edge),
        RELU=saved is not None and saved.relu,
        **block,
        **OPTIONS,
    )
