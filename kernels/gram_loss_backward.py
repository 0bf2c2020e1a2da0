"""The kernel of the style loss, backward: F · Δ, scaled. See ``fastperc.kernels.gram_loss``."""

from __future__ import annotations

import triton
import triton.language as tl

from fastperc.kernels.gram_loss_forward import load_pixels


@triton.jit
def times_delta(
    x_ptr,  # [pixels, channels] of one image, fp16|bf16|fp32
    halves_ptr,  # [2, channels, channels] of that image, fp16|bf16
    offs_p,
    offs_c,
    pixels,
    stride,
    CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The tile [offs_p, offs_c] of F · (high + low), float32: as exact as F itself."""
    acc = tl.zeros([offs_p.shape[0], offs_c.shape[0]], dtype=tl.float32)
    for k in tl.range(0, CHANNELS, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        x = load_pixels(x_ptr, offs_p, offs_k, pixels, stride, CHANNELS, CHANNELS_LAST)
        high_ptrs = halves_ptr + offs_k[:, None] * CHANNELS + offs_c[None, :]
        mask = (offs_k[:, None] < CHANNELS) & (offs_c[None, :] < CHANNELS)
        acc = tl.dot(x, tl.load(high_ptrs, mask=mask, other=0.0), acc, input_precision="ieee")
        low = tl.load(high_ptrs + CHANNELS * CHANNELS, mask=mask, other=0.0)
        acc = tl.dot(x, low, acc, input_precision="ieee")
    return acc


@triton.jit
def gram_loss_bwd_tile(
    x_ptr,  # [N, C, H, W] fp16|bf16|fp32
    halves_ptr,  # [N, 2, C, C] fp16|bf16
    grad_ptr,  # as x
    pid,
    pixels,
    stride_image,
    stride,
    grad_stride_image,
    grad_stride,
    scale,
    CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    GRAD_CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    BLOCKS: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    tiles = tl.cdiv(pixels, BLOCK_P)
    offs_c = pid % BLOCKS * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_p = pid // BLOCKS % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    image = (pid // BLOCKS // tiles).to(tl.int64)
    acc = times_delta(
        x_ptr + image * stride_image,
        halves_ptr + image * 2 * CHANNELS * CHANNELS,
        offs_p,
        offs_c,
        pixels,
        stride,
        CHANNELS,
        CHANNELS_LAST,
        BLOCK_K,
    )
    grad = (acc * scale).to(grad_ptr.dtype.element_ty)
    grad_ptr += image * grad_stride_image
    mask = (offs_p[:, None] < pixels) & (offs_c[None, :] < CHANNELS)
    if GRAD_CHANNELS_LAST:
        tl.store(grad_ptr + offs_p[:, None].to(tl.int64) * grad_stride + offs_c[None, :], grad, mask=mask)
    else:
        tl.store(grad_ptr + offs_c[None, :].to(tl.int64) * grad_stride + offs_p[:, None], grad, mask=mask)


@triton.jit
def gram_loss_bwd_kernel(
    x_ptrs,  # for each layer: [N, C, H, W] fp16|bf16|fp32
    halves_ptrs,  # for each layer: [N, 2, C, C] fp16|bf16
    grad_ptrs,  # for each layer: as x
    scales_ptr,  # [layers] fp32, of the halves
    grad_losses_ptr,  # [layers] fp32
    pixels,
    strides_image,
    strides,
    grad_strides_image,
    grad_strides,
    coefficients,  # 4 / NCHW
    ends,
    CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    GRAD_CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    pid = tl.program_id(0)
    start = 0
    for layer in tl.static_range(len(CHANNELS)):
        if (pid >= start) & (pid < ends[layer]):
            gram_loss_bwd_tile(
                x_ptrs[layer],
                halves_ptrs[layer],
                grad_ptrs[layer],
                pid - start,
                pixels[layer],
                strides_image[layer],
                strides[layer],
                grad_strides_image[layer],
                grad_strides[layer],
                coefficients[layer] * tl.load(scales_ptr + layer) * tl.load(grad_losses_ptr + layer),
                CHANNELS[layer],
                CHANNELS_LAST[layer],
                GRAD_CHANNELS_LAST[layer],
                BLOCK_C[layer],
                BLOCK_P,
                BLOCK_K[layer],
            )
        start = ends[layer]
