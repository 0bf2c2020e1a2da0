"""The terms of a fixed loss network's layers and the gradient at a layer with a term; its masks are beside it.

All tensors are NHWC and dense. After ReLU a number is positive, zero or NaN; a gradient passes where it is not zero.

    content_fwd                    Σ d(F − T) and Σ d(T), a piece per program, d as the criterion has it
    tap_bwd                        the sum of the gradient from the layers above, unpooled, the style term F · Δ and the
                                   content term d'(F − T), after a ReLU masked by F > 0: in one pass
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastperc.kernels.configs import register_options, shared_memory
from fastperc.kernels.gram_loss_backward import times_delta
from fastperc.kernels.relu_masks import (
    BLOCK,
    PASS_OPTIONS,
    relu_mask_bwd,
    relu_mask_fwd,
    relu_masks_fwd,
    relu_pool_bwd,
    relu_pool_fwd,
    relu_pool_masks_fwd,
    unpooled,
)

__all__ = [
    "Above",
    "ContentTerm",
    "StyleTerm",
    "content_fwd",
    "content_pieces",
    "relu_mask_bwd",
    "relu_mask_fwd",
    "relu_masks_fwd",
    "relu_pool_bwd",
    "relu_pool_fwd",
    "relu_pool_masks_fwd",
    "tap_bwd",
]

BLOCK_PIXELS, BLOCK_CHANNELS, BLOCK_K = 128, 64, 64  # of tap_bwd
TAP_OPTIONS = dict(num_warps=8, num_stages=2)


@triton.jit
def distance(difference, CRITERION: tl.constexpr):
    """What ``fastperc.reference.distances`` says."""
    if CRITERION == "l2":
        result = difference * difference
    elif CRITERION == "l1":
        result = tl.abs(difference)
    else:
        size = tl.abs(difference)
        result = tl.where(size < 1.0, 0.5 * difference * difference, size - 0.5)
    return result


@triton.jit
def slope(difference, CRITERION: tl.constexpr):
    """The derivative of :func:`distance`; of squares half of it."""
    if CRITERION == "l2":
        result = difference
    elif CRITERION == "l1":
        result = tl.where(difference > 0.0, 1.0, tl.where(difference < 0.0, -1.0, difference))
    else:
        result = tl.where(difference > 1.0, 1.0, tl.where(difference < -1.0, -1.0, difference))
    return result


@triton.jit
def content_fwd_kernel(
    x_ptr,  # [count] fp16|bf16|fp32: the features F
    target_ptr,  # [count] as x: the content's features T
    pieces_ptr,  # [2, programs] fp32: Σ d(F − T), Σ d(T)
    count,
    CRITERION: tl.constexpr,  # "l2", "l1" or "smooth_l1"
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    offs = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < count, other=0.0).to(tl.float32)
    target = tl.load(target_ptr + offs, mask=offs < count, other=0.0).to(tl.float32)
    tl.store(pieces_ptr + pid, tl.sum(distance(x - target, CRITERION)))
    tl.store(pieces_ptr + tl.num_programs(0) + pid, tl.sum(distance(target, CRITERION)))


@triton.jit(do_not_specialize=["height", "width"])
def tap_bwd_kernel(
    x_ptr,  # [N, H, W, C] fp16|bf16: the features F
    above_ptr,  # as x: the gradient from the layers above, [N, H, W, C] or, with winners, [N, H/2, W/2, C]; or None
    winners_ptr,  # [N, H/2, W/2, C] uint8, or None
    halves_ptr,  # [N, 2, C, C] as x: the style term's Δ; or None
    scale_ptr,  # [1] fp32, of the halves; or None
    target_ptr,  # [N, H, W, C] as x: the content term's T; or None
    grad_ptr,  # [N, H, W, C] as x; may be above_ptr
    grad_style_ptr,  # [1] fp32: the gradient of the style term; or None
    grad_content_ptr,  # [1] fp32: the gradient of the content term; or None
    factor_style_ptr,  # [1] fp32: what multiplies that of the style term; or None
    factor_content_ptr,  # [1] fp32: what multiplies that of the content term; or None
    height,
    width,
    style_coefficient,  # 4 / NCHW
    content_coefficient,  # 1 / NCHW, or 2 / NCHW of squares
    CHANNELS: tl.constexpr,
    CRITERION: tl.constexpr,  # of the content term: "l2", "l1" or "smooth_l1"
    AFTER_RELU: tl.constexpr,  # whether F is the output of a ReLU
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    BLOCKS: tl.constexpr = CHANNELS // BLOCK_C
    pid = tl.program_id(0)
    pixels = height * width
    tiles = tl.cdiv(pixels, BLOCK_P)
    offs_c = pid % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_p = pid // BLOCKS % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    image = (pid // BLOCKS // tiles).to(tl.int64)
    skipped = image * pixels * CHANNELS
    mask = (offs_p[:, None] < pixels) & (offs_c[None, :] < CHANNELS)
    offs = offs_p[:, None].to(tl.int64) * CHANNELS + offs_c[None, :]

    grad = tl.zeros([BLOCK_P, BLOCK_C], dtype=tl.float32)
    if halves_ptr is not None:
        halves_ptr += image * 2 * CHANNELS * CHANNELS
        grad = times_delta(x_ptr + skipped, halves_ptr, offs_p, offs_c, pixels, CHANNELS, CHANNELS, True, BLOCK_K)
        factor = style_coefficient * tl.load(scale_ptr) * tl.load(grad_style_ptr)
        if factor_style_ptr is not None:
            factor *= tl.load(factor_style_ptr)
        grad *= factor
    x = tl.load(x_ptr + skipped + offs, mask=mask, other=0.0)
    if target_ptr is not None:
        difference = x.to(tl.float32) - tl.load(target_ptr + skipped + offs, mask=mask, other=0.0).to(tl.float32)
        factor = content_coefficient * tl.load(grad_content_ptr)
        if factor_content_ptr is not None:
            factor *= tl.load(factor_content_ptr)
        grad += factor * slope(difference, CRITERION)
    if winners_ptr is not None:
        skipped_windows = image * (height // 2) * (width // 2) * CHANNELS
        grad += unpooled(
            above_ptr + skipped_windows,
            winners_ptr + skipped_windows,
            offs_p[:, None] // width,
            offs_p[:, None] % width,
            offs_c[None, :],
            mask,
            height,
            width,
            CHANNELS,
        ).to(tl.float32)
    elif above_ptr is not None:
        grad += tl.load(above_ptr + skipped + offs, mask=mask, other=0.0).to(tl.float32)
    if AFTER_RELU:
        grad = tl.where(x != 0, grad, 0.0)
    tl.store(grad_ptr + skipped + offs, grad.to(grad_ptr.dtype.element_ty), mask=mask)


def content_fwd(x: Tensor, target: Tensor, criterion: str = "l2") -> Tensor:
    """[Σ d(x − target), Σ d(target)] in float32, of two tensors of one shape and dtype, d by ``criterion``."""
    return content_pieces(x, target, criterion).sum(dim=1)


def content_pieces(x: Tensor, target: Tensor, criterion: str = "l2") -> Tensor:
    """The pieces [2, pieces] of which :func:`content_fwd` is the sum."""
    programs = triton.cdiv(x.numel(), BLOCK)
    pieces = torch.empty(2, programs, device=x.device)
    content_fwd_kernel[(programs,)](x, target, pieces, x.numel(), CRITERION=criterion, BLOCK=BLOCK, **PASS_OPTIONS)
    return pieces


class StyleTerm(NamedTuple):
    """What the gradient of a layer's style term needs."""

    halves: Tensor  # [N, 2, C, C] fp16|bf16: Δ = (high + low) · scale
    scale: Tensor  # [1] fp32
    grad: Tensor  # [1] fp32: the gradient of the term
    factor: Tensor | None = None  # [1] fp32: what multiplies it


class ContentTerm(NamedTuple):
    """What the gradient of a layer's content term needs."""

    target: Tensor  # as the maps
    grad: Tensor  # [1] fp32: the gradient of the term
    criterion: str  # "l2", "l1" or "smooth_l1"
    factor: Tensor | None = None  # [1] fp32: what multiplies the gradient


class Above(NamedTuple):
    """The gradient from the layers above, and what lies between it and the maps."""

    grad: Tensor | None
    winners: Tensor | None  # of the pooling, if one lies between
    after_relu: bool  # whether the maps are the output of a ReLU


def tap_bwd(x: Tensor, above: Above, style: StyleTerm | None, content: ContentTerm | None, grad: Tensor) -> None:
    """Fills ``grad`` with the gradient of the maps ``x`` [N, C, H, W] or, after a ReLU, before that ReLU.

    ``tap_bwd_kernel`` lists the shapes and dtypes. Without ``style`` or ``content`` the layer has no such term.
    """
    halves, scale, grad_style, factor_style = style or (None,) * 4
    target, grad_content, criterion, factor_content = content or (None, None, "l2", None)
    images, channels, height, width = x.shape
    block = min(channels, BLOCK_CHANNELS)
    programs = images * (channels // block) * triton.cdiv(height * width, BLOCK_PIXELS)
    tap_bwd_kernel[(programs,)](
        x,
        above.grad,
        above.winners,
        halves,
        scale,
        target,
        grad,
        grad_style,
        grad_content,
        factor_style,
        factor_content,
        height,
        width,
        4 / x.numel(),
        (2 if criterion == "l2" else 1) / x.numel(),
        CHANNELS=channels,
        CRITERION=criterion,
        AFTER_RELU=above.after_relu,
        BLOCK_C=block,
        BLOCK_P=BLOCK_PIXELS,
        BLOCK_K=min(channels, BLOCK_K),
        **TAP_OPTIONS,
        **register_options(shared_memory(x.device)),
    )
