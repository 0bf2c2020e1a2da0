"""LPIPS: the distances between two feature maps and their gradients, in one pass over both.

A pixel's features a and b [C] become unit vectors â = a / (‖a‖ + eps) and b̂; their distance is Σ w (â − b̂)². With
g = 2 w (â − b̂) the gradient of a is inverse · unit, where inverse = 1 / (‖a‖ + eps) and unit = g − â (a · g) / ‖a‖.
That of b is the same with −g. Of a zero vector, which has no direction, it is 0.

A program takes all channels of a few pixels, reads them once and sums in float32. Nothing is shared between programs:
the result is the same bit for bit.

    lpips_distance_kernel   distances, and gradients or units, of one layer
    add_units_kernel        grad + coefficient · unit, with a coefficient a pixel
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastperc.kernels.configs import register_options, shared_memory
from fastperc.kernels.gram_loss_forward import load_pixels

EPS = tl.constexpr(1e-10)
ELEMENTS = 2048  # a program's, of each map
FEWEST_PIXELS_NCHW = 8  # a program's, where the pixels of a channel are adjacent
OPTIONS = dict(num_warps=8, num_stages=1)
DISTANCE_OPTIONS = OPTIONS | dict(enable_fp_fusion=False)  # so that equal features have a distance of 0
BLOCK = 4096  # elements a program of add_units

Sides = tuple[Tensor | None, Tensor | None]


@triton.jit
def store_pixels(
    out_ptr,  # [pixels, channels] of one image, fp16|bf16|fp32, or the transpose
    values,  # [pixels, channels] fp32
    offs_p,
    offs_c,
    pixels,
    stride,  # between pixels if CHANNELS_LAST, else between channels; the other one is 1
    CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):
    """The reverse of ``load_pixels``."""
    values = values.to(out_ptr.dtype.element_ty)
    if CHANNELS_LAST:
        mask = (offs_p[:, None] < pixels) & (offs_c[None, :] < CHANNELS)
        tl.store(out_ptr + offs_p[:, None].to(tl.int64) * stride + offs_c[None, :], values, mask=mask)
    else:
        mask = (offs_c[:, None] < CHANNELS) & (offs_p[None, :] < pixels)
        tl.store(out_ptr + offs_c[:, None].to(tl.int64) * stride + offs_p[None, :], tl.trans(values), mask=mask)


@triton.jit
def unit_gradient(
    own,  # [pixels, channels] fp32: a, or b
    g,  # [pixels, channels] fp32, or −g
    norm,  # [pixels] fp32, of own
    inverse,  # [pixels] fp32
    AFTER_RELU: tl.constexpr,
):
    along = tl.sum(own * g, axis=1) * inverse / tl.where(norm == 0, 1.0, norm)
    unit = g - own * along[:, None]
    unit = tl.where((norm == 0)[:, None], 0.0, unit)
    if AFTER_RELU:
        unit = tl.where(own <= 0, 0.0, unit)
    return unit


@triton.jit(do_not_specialize=["pixels"])
def lpips_distance_kernel(
    a_ptr,  # [N, C, H, W] fp16|bf16|fp32
    b_ptr,  # [N, C, H, W] as a
    weight_ptr,  # [C] fp32
    distances_ptr,  # [N, pixels] fp32, or None
    incoming_ptr,  # [N, pixels] fp32: the gradient of the distances; or None, for units
    grad_a_ptr,  # [N, C, H, W] as a, or None; may be a_ptr
    grad_b_ptr,  # [N, C, H, W] as b, or None; may be b_ptr
    inverse_a_ptr,  # [N, pixels] fp32, or None
    inverse_b_ptr,  # [N, pixels] fp32, or None
    pixels,
    strides_image,  # of a, b, grad_a and grad_b; 0 where one image serves all
    strides,  # between pixels where channels are adjacent, else between channels
    CHANNELS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,  # of the four
    AFTER_RELU: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    pid = tl.program_id(0)
    tiles = tl.cdiv(pixels, BLOCK_P)
    image = (pid // tiles).to(tl.int64)
    offs_p = pid % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    offs_c = tl.arange(0, BLOCK_C)
    offs = image * pixels + offs_p
    mask = offs_p < pixels
    a_ptr += image * strides_image[0]
    b_ptr += image * strides_image[1]
    a = load_pixels(a_ptr, offs_p, offs_c, pixels, strides[0], CHANNELS, CHANNELS_LAST[0]).to(tl.float32)
    b = load_pixels(b_ptr, offs_p, offs_c, pixels, strides[1], CHANNELS, CHANNELS_LAST[1]).to(tl.float32)
    weight = tl.load(weight_ptr + offs_c, mask=offs_c < CHANNELS, other=0.0)

    norm_a = tl.sqrt(tl.sum(a * a, axis=1))
    norm_b = tl.sqrt(tl.sum(b * b, axis=1))
    inverse_a = 1.0 / (norm_a + EPS)
    inverse_b = 1.0 / (norm_b + EPS)
    difference = a * inverse_a[:, None] - b * inverse_b[:, None]
    g = 2.0 * weight[None, :] * difference
    if distances_ptr is not None:
        tl.store(distances_ptr + offs, 0.5 * tl.sum(g * difference, axis=1), mask=mask)
    if inverse_a_ptr is not None:
        tl.store(inverse_a_ptr + offs, inverse_a, mask=mask)
    if inverse_b_ptr is not None:
        tl.store(inverse_b_ptr + offs, inverse_b, mask=mask)
    if grad_a_ptr is not None:
        grad = unit_gradient(a, g, norm_a, inverse_a, AFTER_RELU)
        if incoming_ptr is not None:
            grad *= (tl.load(incoming_ptr + offs, mask=mask, other=0.0) * inverse_a)[:, None]
        grad_a_ptr += image * strides_image[2]
        store_pixels(grad_a_ptr, grad, offs_p, offs_c, pixels, strides[2], CHANNELS, CHANNELS_LAST[2])
    if grad_b_ptr is not None:
        grad = unit_gradient(b, -g, norm_b, inverse_b, AFTER_RELU)
        if incoming_ptr is not None:
            grad *= (tl.load(incoming_ptr + offs, mask=mask, other=0.0) * inverse_b)[:, None]
        grad_b_ptr += image * strides_image[3]
        store_pixels(grad_b_ptr, grad, offs_p, offs_c, pixels, strides[3], CHANNELS, CHANNELS_LAST[3])


@triton.jit
def add_units_kernel(
    unit_ptr,  # [pixels, C] fp16|bf16|fp32
    coefficient_ptr,  # [pixels] fp32
    grad_ptr,  # [pixels, C] as unit, added to; or None
    out_ptr,  # [pixels, C] as unit; may be unit_ptr or grad_ptr
    count,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < count
    coefficient = tl.load(coefficient_ptr + offs // CHANNELS, mask=mask, other=0.0)
    total = coefficient * tl.load(unit_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if grad_ptr is not None:
        total += tl.load(grad_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offs, total.to(out_ptr.dtype.element_ty), mask=mask)


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels of a pixel of ``x`` [N, C, H, W] are adjacent in memory."""
    return x.stride(1) == 1


def stride_of(x: Tensor) -> int:
    """Elements from one pixel of ``x`` to the next, or from one channel to the next where those are farther apart."""
    if not is_channels_last(x):
        return x.stride(1)
    return x.stride(2) if x.shape[3] == 1 else x.stride(3)


def lpips_distance(
    features: tuple[Tensor, Tensor],
    weight: Tensor,
    distances: Tensor | None = None,
    incoming: Tensor | None = None,
    gradients: Sides = (None, None),
    inverses: Sides = (None, None),
    after_relu: bool = False,
) -> None:
    """Fills what is given; the arguments are those of ``fastperc._native.lpips_distance``. Without ``gradients`` the
    distances alone are computed.

    Where channels are not adjacent, the pixels of a channel are.
    """
    images, channels, height, width = features[0].shape
    pixels = height * width
    block = max(triton.next_power_of_2(channels), 16)
    maps = [x if x is not None else features[0] for x in (*features, *gradients)]
    nhwc = all(map(is_channels_last, maps))
    block_pixels = max(ELEMENTS // block, 1 if nhwc else FEWEST_PIXELS_NCHW)
    lpips_distance_kernel[(images * triton.cdiv(pixels, block_pixels),)](
        *features,
        weight,
        distances,
        incoming,
        *gradients,
        *inverses,
        pixels,
        tuple(x.stride(0) for x in maps),
        tuple(map(stride_of, maps)),
        CHANNELS=channels,
        CHANNELS_LAST=tuple(map(is_channels_last, maps)),
        AFTER_RELU=after_relu,
        BLOCK_P=block_pixels,
        BLOCK_C=block,
        **DISTANCE_OPTIONS,
        **register_options(shared_memory(weight.device)),
    )


def add_units(unit: Tensor, coefficient: Tensor, grad: Tensor | None, out: Tensor) -> None:
    """Fills ``out`` with ``grad`` + ``coefficient`` · ``unit``.

    ``coefficient`` is float32 [N, 1, H, W], contiguous; all others are [N, C, H, W], dense in NHWC.
    """
    add_units_kernel[(triton.cdiv(unit.numel(), BLOCK),)](
        unit, coefficient, grad, out, unit.numel(), CHANNELS=unit.shape[1], BLOCK=BLOCK, **OPTIONS
    )
