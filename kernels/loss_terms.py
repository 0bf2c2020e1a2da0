"""What a perceptual loss launches around its network: the pictures in, the weighted terms out.

    normalise_pictures   the output and the target, normalised and padded, as one batch for the first convolution
    loss_terms           the weighted terms and their sum, from the pieces that other kernels leave; and for each of
                         them the factor that its gradient has

Pieces are added up in a fixed order: the result is the same bit for bit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastperc.kernels.rgb_conv_stem import PREPARE_BLOCK, PREPARE_OPTIONS, pitch_of

BLOCK = 1024  # pieces that a program loads at once
OPTIONS = dict(num_warps=4, num_stages=1)
TERMS = 4  # total, content, style and total variation
CONTENT, TV, GRAMS = 0, 1, 2  # where the factors are: of the content term, of total variation, of the Gram terms


@triton.jit(do_not_specialize=["images", "height", "width", "pitch"])
def normalise_pictures_kernel(
    output_ptr,  # [images, 3, height, width] fp16|bf16|fp32 of any strides
    target_ptr,  # as many, of any strides; or None
    mean_ptr,  # [3] fp32
    std_ptr,  # [3] fp32
    x_ptr,  # [pictures, height + 2, pitch] fp16|bf16
    images,
    height,
    width,
    pitch,
    stride_image,
    stride_channel,
    stride_row,
    stride_column,
    target_stride_image,
    target_stride_channel,
    target_stride_row,
    target_stride_column,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(pitch, BLOCK)
    line = tl.program_id(0) // blocks
    offs = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    image = (line // (height + 2)).to(tl.int64)
    row = (line % (height + 2) - 1).to(tl.int64)
    column = (offs // 3 - 1).to(tl.int64)
    channel = offs % 3
    inside = (column >= 0) & (column < tl.where((row >= 0) & (row < height), width, 0))
    ptrs = output_ptr + image * stride_image + row * stride_row + column * stride_column + channel * stride_channel
    outputs = tl.where(image < images, width, 0)  # columns of the output, which the other rows of x have not
    level = tl.load(ptrs, mask=inside & (column < outputs), other=0.0).to(tl.float32)
    if target_ptr is not None:
        target_ptr += (image - images) * target_stride_image + row * target_stride_row
        ptrs = target_ptr + column * target_stride_column + channel * target_stride_channel
        level += tl.load(ptrs, mask=inside & (column >= outputs), other=0.0).to(tl.float32)
    x = (level - tl.load(mean_ptr + channel)) / tl.load(std_ptr + channel)
    x = tl.where(inside, x, 0.0)
    tl.store(x_ptr + line.to(tl.int64) * pitch + offs, x.to(x_ptr.dtype.element_ty), mask=offs < pitch)


@triton.jit
def sum_of(pieces_ptr, count, BLOCK: tl.constexpr):
    """Σ of ``count`` pieces, fp32."""
    sums = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, count, BLOCK):
        offs = first + tl.arange(0, BLOCK)
        sums += tl.load(pieces_ptr + offs, mask=offs < count, other=0.0)
    return tl.sum(sums)


@triton.jit(do_not_specialize=["content_pieces", "tv_pieces"])
def loss_terms_kernel(
    content_ptr,  # [2, content_pieces] fp32: Σ d(F − T), Σ d(T); or None
    grams_ptr,  # [layers] fp32: Σ Δ² averaged over the images; or None
    weights_ptr,  # [layers] fp32: their weights; or None
    tv_ptr,  # [tv_pieces] fp32
    terms_ptr,  # [TERMS] fp32
    factors_ptr,  # [GRAMS + layers] fp32
    content_pieces,
    tv_pieces,
    content_count,  # numbers that the content term is a mean of
    content_weight,
    style_weight,
    tv_weight,
    RELATIVE: tl.constexpr,  # whether the content term is over Σ d(T)
    LAYERS: tl.constexpr,
    BLOCK_LAYERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tv = sum_of(tv_ptr, tv_pieces, BLOCK)
    zero = tv * 0.0  # NaN where a pixel is not finite, which the network's ReLUs and poolings may drop
    tv *= tv_weight
    content = zero
    content_factor = zero
    if content_ptr is not None:
        content_factor = content_weight
        if RELATIVE:
            content_factor = content_weight / (
                sum_of(content_ptr + content_pieces, content_pieces, BLOCK) / content_count
            )
        content += sum_of(content_ptr, content_pieces, BLOCK) / content_count * content_factor
    style = zero
    if grams_ptr is not None:
        offs = tl.arange(0, BLOCK_LAYERS)
        factors = style_weight * tl.load(weights_ptr + offs, mask=offs < LAYERS, other=0.0)
        style += tl.sum(factors * tl.load(grams_ptr + offs, mask=offs < LAYERS, other=0.0))
        tl.store(factors_ptr + 2 + offs, factors, mask=offs < LAYERS)
    tl.store(factors_ptr, content_factor)
    tl.store(factors_ptr + 1, tv_weight)
    tl.store(terms_ptr, content + style + tv)
    tl.store(terms_ptr + 1, content)
    tl.store(terms_ptr + 2, style)
    tl.store(terms_ptr + 3, tv)


def normalise_pictures(output: Tensor, target: Tensor | None, mean: Tensor, std: Tensor, dtype: torch.dtype) -> Tensor:
    """(``output`` − ``mean``) / ``std``, and behind it in the batch that of ``target``, as a 3×3 convolution of
    ``kernels/rgb_conv_stem.py`` loads them: [pictures, H + 2, pitch] in ``dtype``.

    Pictures are [N, 3, H, W], any strides; ``mean`` and ``std`` have 3 numbers, float32.
    """
    images, _, height, width = output.shape
    pictures, pitch = images if target is None else 2 * images, pitch_of(width + 2)
    x = torch.empty(pictures, height + 2, pitch, dtype=dtype, device=output.device)
    normalise_pictures_kernel[(pictures * (height + 2) * triton.cdiv(pitch, PREPARE_BLOCK),)](
        output,
        target,
        mean,
        std,
        x,
        images,
        height,
        width,
        pitch,
        *output.stride(),
        *(output if target is None else target).stride(),
        BLOCK=PREPARE_BLOCK,
        **PREPARE_OPTIONS,
    )
    return x


class Pieces(NamedTuple):
    """What the terms are computed from."""

    content: Tensor | None  # [2, pieces] float32, of fastperc.kernels.vgg_loss.content_pieces
    content_count: int  # numbers that the content term is a mean of
    grams: Tensor | None  # [layers] float32
    gram_weights: Tensor | None  # [layers] float32
    tv: Tensor  # [pieces] float32


class Weights(NamedTuple):
    """What multiplies the terms."""

    content: float
    style: float
    tv: float
    relative: bool  # whether the content term is over that of its target against zeros


def loss_terms(pieces: Pieces, weights: Weights) -> tuple[Tensor, Tensor]:
    """The terms [TERMS], weighted, their total first, and the factors [GRAMS + layers] of their gradients."""
    layers = 0 if pieces.grams is None else len(pieces.grams)
    terms, factors = pieces.tv.new_empty(TERMS), pieces.tv.new_empty(GRAMS + layers)
    loss_terms_kernel[(1,)](
        pieces.content,
        pieces.grams,
        pieces.gram_weights,
        pieces.tv,
        terms,
        factors,
        0 if pieces.content is None else pieces.content.shape[1],
        len(pieces.tv),
        float(max(pieces.content_count, 1)),
        float(weights.content),
        float(weights.style),
        float(weights.tv),
        RELATIVE=weights.relative,
        LAYERS=layers,
        BLOCK_LAYERS=triton.next_power_of_2(max(layers, 1)),
        BLOCK=BLOCK,
        **OPTIONS,
    )
    return terms, factors
