"""The gradient of an activation from that of its padded copy: a mirrored border's is added to the pixels it showed.

Without a border it is where a gradient comes in: let through by the ReLU, and summed for the norm's own gradient.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from fastperc.kernels.configs import Variant
from fastperc.kernels.deferred import store_gradient
from fastperc.kernels.instance_norm import block_of, place
from fastperc.types import Deferred, stride_of

BLOCK = 4096  # elements to a program
OPTIONS = dict(num_warps=8, num_stages=1)


@triton.jit
def shown(row, top, bottom, size, which: tl.constexpr, EDGE: tl.constexpr):
    """Where in the padded copy ``row`` stands, and whether it does: itself (0), in the border before it (1) or in that
    behind it (2). Mirrored about the outermost pixel, or, with EDGE, about its outer edge."""
    if which == 0:
        index = row + top
        stands = row < size
    elif which == 1:
        index = top - EDGE - row
        stands = (row >= 1 - EDGE) & (index >= 0)
    else:
        index = 2 * (size - 1) + EDGE - row + top
        stands = (row <= size - 2 + EDGE) & (index < size + top + bottom)
    return index, stands


@triton.jit
def fold_gradient_kernel(
    grad_ptr,  # [N, top + H + bottom, left + W + right, C] fp16|bf16|fp32 of any strides
    skip_ptr,  # [N, H, W, C]: another gradient of the same; or None
    saved_ptr,  # [N, H, W, C], and
    saved_coefficients_ptr,  # [N or 1, NORM_ROWS, C] fp32: the activation; or None, if it is a plain one
    out_ptr,  # [N, H, W, C]
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
        rows, row_stands = shown(row, top, bottom, height, r, EDGE)
        for c in tl.static_range(3 if PADDED else 1):
            columns, column_stands = shown(column, left, right, width, c, EDGE)
            place_p = rows.to(tl.int64) * stride_row + columns.to(tl.int64) * stride_column
            grad_ptrs = grad_ptr + place_p[None, :] + offs_c[:, None].to(tl.int64) * stride_channel
            mask_p = mask_c[:, None] & (row_stands & column_stands)[None, :]
            grad += tl.load(grad_ptrs, mask=mask_p, other=0.0).to(tl.float32)
    if skip_ptr is not None:
        grad += tl.load(skip_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if saved_ptr is not None:
        saved_coefficients_ptr += image * saved_coefficients_stride
        partials_ptr += (image * tl.cdiv(pixels, BLOCK_P) + tile) * 2 * CHANNELS
    store_gradient(grad, out_ptr, offs, offs_c, mask, saved_ptr, saved_coefficients_ptr, partials_ptr, CHANNELS, RELU)


def fold_gradient_tiles(out: Tensor) -> int:
    """How many tiles an image of ``out`` is made of: the second size of ``partials``."""
    return triton.cdiv(out.shape[2] * out.shape[3], block_of(out.shape[1], BLOCK)["BLOCK_P"])


def fold_gradient(
    grad: Tensor,
    skip: Tensor | None,
    below: Deferred | None,
    out: Tensor,
    padding: tuple[int, int, int, int],
    edge: bool,
    partials: Tensor | None,
) -> None:
    """Fills ``out`` [N, C, H, W], channels innermost, with the gradient of ``below``, and ``partials``
    [N, tiles, 2, C]; without below, with that of a plain map.

    ``grad`` is that of its copy with a mirrored border of ``padding`` (left, right, top, bottom), of any strides; with
    ``edge`` the border begins with the outermost pixel itself. ``skip``, as out, is added.
    """
    images, channels, height, width = out.shape
    block = block_of(channels, BLOCK)
    programs = images * fold_gradient_tiles(out) * triton.cdiv(channels, block["BLOCK_C"])
    fold_gradient_kernel[(programs,)](
        grad,
        skip,
        None if below is None else below.x,
        None if below is None else below.coefficients,
        out,
        partials,
        0 if below is None else stride_of(below.coefficients),
        height,
        width,
        *padding,
        *grad.stride(),
        CHANNELS=channels,
        PADDED=any(padding),
        EDGE=int(edge),
        RELU=below is not None and below.relu,
        **block,
        **OPTIONS,
    )


def variants() -> Iterator[Variant]:
    """The channels of the paper's networks."""
    for dtype in ("bf16", "fp16", "fp32"):
        for channels in (16, 32, 64, 128):
            for padded in (False, True):
                yield _variant(dtype, channels, padded)


def _variant(dtype: str, channels: int, padded: bool) -> Variant:
    pointers = dict.fromkeys(("grad_ptr", "skip_ptr", "saved_ptr", "out_ptr"), f"*{dtype}")
    pointers |= dict.fromkeys(("saved_coefficients_ptr", "partials_ptr"), "*fp32")
    absent = {} if padded else {"skip_ptr": None}
    sizes = ("height", "width", "left", "right", "top", "bottom")
    strides = ("stride_image", "stride_channel", "stride_row", "stride_column")
    given = {name: pointer for name, pointer in pointers.items() if name not in absent}
    return Variant(
        fold_gradient_kernel,
        f"{dtype} C{channels} {'padded' if padded else 'plain'}",
        dict(**given, **dict.fromkeys(("saved_coefficients_stride", *sizes, *strides), "i32")),
        dict(CHANNELS=channels, PADDED=padded, EDGE=0, RELU=True, **block_of(channels, BLOCK), **absent),
        **OPTIONS,
        aligned=tuple(given),
    )
