"""A frozen network's ReLU and pooling in a bit and a byte, and the gradient at a layer whose features are kept.

All tensors are NHWC and dense. After ReLU a number is positive, zero or NaN; a gradient passes where it is not zero.

    relu_mask_fwd, relu_mask_bwd   1 bit an element                     instead of the activations
    relu_pool_fwd, relu_pool_bwd   1 byte a window: its winner, if any  instead of the activations and 8-byte indices
    content_fwd                    Σ (F − T)² and Σ T², by pieces
    tap_bwd                        the gradient from above (unpooled here), the style term F · Δ and the content term
                                   F − T, added up and masked by F > 0 in one pass
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastperc.kernels.configs import Variant
from fastperc.kernels.gram_loss import times_delta

BLOCK = 4096  # elements to a program of the passes over memory
BLOCK_PIXELS, BLOCK_CHANNELS, BLOCK_K = 128, 64, 64  # of tap_bwd
PASS_OPTIONS = dict(num_warps=8, num_stages=1)
TAP_OPTIONS = dict(num_warps=8, num_stages=2)
NO_WINNER = tl.constexpr(4)


@triton.jit
def relu_mask_fwd_kernel(
    x_ptr,  # [count] fp16|bf16|fp32
    bits_ptr,  # [count / 8 rounded up] uint8
    count,
    BLOCK: tl.constexpr,
):
    offs_byte = tl.program_id(0).to(tl.int64) * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
    offs = offs_byte[:, None] * 8 + tl.arange(0, 8)[None, :]
    x = tl.load(x_ptr + offs, mask=offs < count, other=0.0)
    bits = tl.sum((x != 0).to(tl.int32) << tl.arange(0, 8)[None, :], axis=1)
    tl.store(bits_ptr + offs_byte, bits.to(tl.uint8), mask=offs_byte * 8 < count)


@triton.jit
def relu_mask_bwd_kernel(
    grad_ptr,  # [count] fp16|bf16|fp32, changed in place
    bits_ptr,  # [count / 8 rounded up] uint8
    count,
    BLOCK: tl.constexpr,
):
    offs_byte = tl.program_id(0).to(tl.int64) * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
    offs = offs_byte[:, None] * 8 + tl.arange(0, 8)[None, :]
    bits = tl.load(bits_ptr + offs_byte, mask=offs_byte * 8 < count, other=0).to(tl.int32)
    passes = (bits[:, None] >> tl.arange(0, 8)[None, :]) & 1
    grad = tl.load(grad_ptr + offs, mask=offs < count, other=0.0)
    tl.store(grad_ptr + offs, tl.where(passes != 0, grad, 0.0), mask=offs < count)


@triton.jit
def relu_pool_fwd_kernel(
    x_ptr,  # [N, H, W, C] fp16|bf16|fp32
    pooled_ptr,  # [N, H/2, W/2, C]
    winners_ptr,  # [n, H/2, W/2, C] uint8, for the first images
    count,  # elements of pooled
    count_winners,
    height,
    width,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < count
    window, channel = offs // CHANNELS, offs % CHANNELS
    column, row = window % (width // 2), window // (width // 2) % (height // 2)
    image = window // (width // 2) // (height // 2)
    upper = x_ptr + ((image * height + 2 * row) * width + 2 * column) * CHANNELS + channel
    best = tl.load(upper, mask=mask, other=0.0)
    winner = tl.zeros([BLOCK], dtype=tl.int32)
    for other in tl.static_range(1, 4):
        value = tl.load(upper + (other // 2 * width + other % 2) * CHANNELS, mask=mask, other=0.0)
        wins = (value > best) | (value != value)  # the first of equals, and NaN over all, as in PyTorch
        best = tl.where(wins, value, best)
        winner = tl.where(wins, other, winner)
    tl.store(pooled_ptr + offs, best, mask=mask)
    winner = tl.where(best != 0, winner, NO_WINNER)
    tl.store(winners_ptr + offs, winner.to(tl.uint8), mask=offs < count_winners)


@triton.jit
def unpooled(
    grad_pooled_ptr,  # [H/2, W/2, C] of one image
    winners_ptr,  # [H/2, W/2, C] uint8
    row,
    column,
    channel,
    mask,
    height,
    width,
    CHANNELS: tl.constexpr,
):
    """The gradient that the pixels (row, column) of an image get through the pooling."""
    mask &= (row < height // 2 * 2) & (column < width // 2 * 2)  # no window covers an odd last row or column
    offs = (row // 2 * (width // 2) + column // 2) * CHANNELS + channel
    wins = tl.load(winners_ptr + offs, mask=mask, other=NO_WINNER).to(tl.int32) == row % 2 * 2 + column % 2
    return tl.where(wins, tl.load(grad_pooled_ptr + offs, mask=mask, other=0.0), 0.0)


@triton.jit
def relu_pool_bwd_kernel(
    grad_pooled_ptr,  # [N, H/2, W/2, C] fp16|bf16|fp32
    winners_ptr,  # [N, H/2, W/2, C] uint8
    grad_ptr,  # [N, H, W, C]
    count,
    height,
    width,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    pixel, channel = offs // CHANNELS, offs % CHANNELS
    column, row, image = pixel % width, pixel // width % height, pixel // width // height
    skipped = image * (height // 2) * (width // 2) * CHANNELS
    grad = unpooled(
        grad_pooled_ptr + skipped,
        winners_ptr + skipped,
        row,
        column,
        channel,
        offs < count,
        height,
        width,
        CHANNELS,
    )
    tl.store(grad_ptr + offs, grad, mask=offs < count)


@triton.jit
def content_fwd_kernel(
    x_ptr,  # [count] fp16|bf16|fp32: the features F
    target_ptr,  # [count]: the content's own, T
    pieces_ptr,  # [2, programs] fp32: Σ (F − T)², Σ T²
    count,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    offs = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < count, other=0.0).to(tl.float32)
    target = tl.load(target_ptr + offs, mask=offs < count, other=0.0).to(tl.float32)
    tl.store(pieces_ptr + pid, tl.sum((x - target) * (x - target)))
    tl.store(pieces_ptr + tl.num_programs(0) + pid, tl.sum(target * target))


@triton.jit
def tap_bwd_kernel(
    x_ptr,  # [N, H, W, C] fp16|bf16: the features F
    above_ptr,  # the gradient from the layers above: [N, H, W, C], or [N, H/2, W/2, C] before the pooling, or None
    winners_ptr,  # [N, H/2, W/2, C] uint8, or None
    halves_ptr,  # [N, 2, C, C], the style term's Δ; or None
    scale_ptr,  # [1] fp32, of the halves; or None
    target_ptr,  # [N, H, W, C], the content term's T; or None
    grad_ptr,  # [N, H, W, C]; may be above_ptr
    grad_style_ptr,  # [1] fp32
    grad_content_ptr,  # [1] fp32
    height,
    width,
    style_coefficient,  # 4 / NCHW
    content_coefficient,  # 2 / NCHW
    CHANNELS: tl.constexpr,
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
        grad *= style_coefficient * tl.load(scale_ptr) * tl.load(grad_style_ptr)
    x = tl.load(x_ptr + skipped + offs, mask=mask, other=0.0)
    if target_ptr is not None:
        difference = x.to(tl.float32) - tl.load(target_ptr + skipped + offs, mask=mask, other=0.0).to(tl.float32)
        grad += content_coefficient * tl.load(grad_content_ptr) * difference
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
    grad = tl.where(x != 0, grad, 0.0)
    tl.store(grad_ptr + skipped + offs, grad.to(grad_ptr.dtype.element_ty), mask=mask)


def relu_mask_fwd(x: Tensor, bits: Tensor) -> None:
    """See ``fastperc._native``, whose functions these are on a GPU."""
    relu_mask_fwd_kernel[(triton.cdiv(x.numel(), BLOCK),)](x, bits, x.numel(), BLOCK=BLOCK, **PASS_OPTIONS)


def relu_mask_bwd(grad: Tensor, bits: Tensor) -> None:
    relu_mask_bwd_kernel[(triton.cdiv(grad.numel(), BLOCK),)](grad, bits, grad.numel(), BLOCK=BLOCK, **PASS_OPTIONS)


def relu_pool_fwd(x: Tensor, pooled: Tensor, winners: Tensor) -> None:
    _, channels, height, width = x.shape
    relu_pool_fwd_kernel[(triton.cdiv(pooled.numel(), BLOCK),)](
        x,
        pooled,
        winners,
        pooled.numel(),
        winners.numel(),
        height,
        width,
        CHANNELS=channels,
        BLOCK=BLOCK,
        **PASS_OPTIONS,
    )


def relu_pool_bwd(grad_pooled: Tensor, winners: Tensor, grad: Tensor) -> None:
    _, channels, height, width = grad.shape
    relu_pool_bwd_kernel[(triton.cdiv(grad.numel(), BLOCK),)](
        grad_pooled, winners, grad, grad.numel(), height, width, CHANNELS=channels, BLOCK=BLOCK, **PASS_OPTIONS
    )


def content_fwd(x: Tensor, target: Tensor) -> Tensor:
    """[Σ (x − target)², Σ target²] in float32."""
    programs = triton.cdiv(x.numel(), BLOCK)
    pieces = torch.empty(2, programs, device=x.device)
    content_fwd_kernel[(programs,)](x, target, pieces, x.numel(), BLOCK=BLOCK, **PASS_OPTIONS)
    return pieces.sum(dim=1)


def tap_bwd(
    x: Tensor,
    above: Tensor | None,
    winners: Tensor | None,
    halves: Tensor | None,
    scale: Tensor | None,
    target: Tensor | None,
    grad_style: Tensor | None,
    grad_content: Tensor | None,
    grad: Tensor,
) -> None:
    """Fills ``grad`` with the gradient before the ReLU that gave ``x`` [N, C, H, W]; the kernel says what each is."""
    images, channels, height, width = x.shape
    block = min(channels, BLOCK_CHANNELS)
    programs = images * (channels // block) * triton.cdiv(height * width, BLOCK_PIXELS)
    tap_bwd_kernel[(programs,)](
        x,
        above,
        winners,
        halves,
        scale,
        target,
        grad,
        grad_style,
        grad_content,
        height,
        width,
        4 / x.numel(),
        2 / x.numel(),
        CHANNELS=channels,
        BLOCK_C=block,
        BLOCK_P=BLOCK_PIXELS,
        BLOCK_K=min(channels, BLOCK_K),
        **TAP_OPTIONS,
    )


def variants() -> Iterator[Variant]:
    """VGG-16's channels in both half precisions: a kept layer before a pooling, before a convolution, and the last."""
    for dtype in ("bf16", "fp16", "fp32"):
        x, size = f"*{dtype}", dict(height="i32", width="i32")
        yield Variant(
            relu_mask_fwd_kernel,
            dtype,
            dict(x_ptr=x, bits_ptr="*u8", count="i32"),
            dict(BLOCK=BLOCK),
            **PASS_OPTIONS,
            aligned=("x_ptr", "bits_ptr", "count"),
        )
        yield Variant(
            relu_mask_bwd_kernel,
            dtype,
            dict(grad_ptr=x, bits_ptr="*u8", count="i32"),
            dict(BLOCK=BLOCK),
            **PASS_OPTIONS,
            aligned=("grad_ptr", "bits_ptr", "count"),
        )
        yield Variant(
            content_fwd_kernel,
            dtype,
            dict(x_ptr=x, target_ptr=x, pieces_ptr="*fp32", count="i32"),
            dict(BLOCK=BLOCK),
            **PASS_OPTIONS,
            aligned=("x_ptr", "target_ptr", "pieces_ptr", "count"),
        )
        for channels in (64, 512):
            yield Variant(
                relu_pool_fwd_kernel,
                f"{dtype} C{channels}",
                dict(x_ptr=x, pooled_ptr=x, winners_ptr="*u8", count="i32", count_winners="i32", **size),
                dict(CHANNELS=channels, BLOCK=BLOCK),
                **PASS_OPTIONS,
                aligned=("x_ptr", "pooled_ptr", "winners_ptr", "count", "count_winners"),
            )
            yield Variant(
                relu_pool_bwd_kernel,
                f"{dtype} C{channels}",
                dict(grad_pooled_ptr=x, winners_ptr="*u8", grad_ptr=x, count="i32", **size),
                dict(CHANNELS=channels, BLOCK=BLOCK),
                **PASS_OPTIONS,
                aligned=("grad_pooled_ptr", "winners_ptr", "grad_ptr", "count"),
            )
            if dtype == "fp32":
                continue
            for above in ("pooled", "dense", "none"):
                given = {
                    "x_ptr": x,
                    "above_ptr": x if above != "none" else None,
                    "winners_ptr": "*u8" if above == "pooled" else None,
                    "halves_ptr": x,
                    "scale_ptr": "*fp32",
                    "target_ptr": x if above == "dense" else None,
                    "grad_ptr": x,
                    "grad_style_ptr": "*fp32",
                    "grad_content_ptr": "*fp32",
                    "style_coefficient": "fp32",
                    "content_coefficient": "fp32",
                    **size,
                }
                absent = {name: None for name, kind in given.items() if kind is None}
                present = {name: kind for name, kind in given.items() if kind is not None}
                yield Variant(
                    tap_bwd_kernel,
                    f"{dtype} C{channels} {above}",
                    present,
                    dict(
                        CHANNELS=channels,
                        BLOCK_C=min(channels, BLOCK_CHANNELS),
                        BLOCK_P=BLOCK_PIXELS,
                        BLOCK_K=BLOCK_K,
                        **absent,
                    ),
                    **TAP_OPTIONS,
                    aligned=tuple(name for name in present if present[name] == x or name == "winners_ptr"),
                    matrix=True,
                )
