"""How a chain of convolutions in training takes its norms: what the kernels store for them, and the gradient's.

    forward     conv ── y ────────────────────────────────▶ relu(scale · y + shift) ── next conv
                     └─ statistics by tile ▶ scale, shift ─┘

    backward    ◀── data gradient, weight gradient ── dy = a · g + b + c · y ◀── g ── next conv's data gradient
                                             sums by tile ▶ a, b, c ─────────┘

g is the gradient after the norm, zero where the ReLU stopped the value. Both passes over memory, in
``fastperc.kernels.chain_passes`` with the coefficients that they need, are x · row 0 + row 1 + other · row 2 of a
table of coefficients, one column a channel. An instance norm has a table for each image. A norm's table also holds what
its backward needs: see ``NORM_ROWS``.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Rows of a norm's coefficients: scale, shift, mean, 1 / standard deviation, and how many values were counted.
NORM_ROWS = tl.constexpr(5)
GRADIENT_ROWS = tl.constexpr(3)  # of a gradient's coefficients: the factors of g, 1 and y


@triton.jit
def coefficient(coefficients_ptr, row: tl.constexpr, offs_c, CHANNELS: tl.constexpr):
    """One row of an image's coefficients, [channels] fp32."""
    return tl.load(coefficients_ptr + row * CHANNELS + offs_c, mask=offs_c < CHANNELS, other=0.0)


@triton.jit
def store_gradient(
    grad,  # [channels, pixels] fp32: the gradient of the saved activation, or of a plain map without one
    out_ptr,  # [N, H, W, C] fp16|bf16|fp32
    offs,  # [channels, pixels]: offsets in out, and in saved
    offs_c,  # [channels]
    mask,  # [channels, pixels]
    saved_ptr,  # [N, H, W, C] as out: the deferred activation's x; or None
    coefficients_ptr,  # [NORM_ROWS, C] fp32: those of saved, of the image
    partials_ptr,  # [2, C] fp32: Σ g and Σ g · x̂ of the stored gradient g; x̂ is the normalised x
    CHANNELS: tl.constexpr,
    RELU: tl.constexpr,
):
    """Stores the gradient, zero where the activation's ReLU was, and the two sums that its norm's backward needs."""
    if saved_ptr is not None:
        saved = tl.load(saved_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        if RELU:
            scale = coefficient(coefficients_ptr, 0, offs_c, CHANNELS)[:, None]
            shift = coefficient(coefficients_ptr, 1, offs_c, CHANNELS)[:, None]
            grad = tl.where(saved * scale + shift > 0, grad, 0.0)
    grad = grad.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offs, grad, mask=mask)
    if saved_ptr is not None:
        mean = coefficient(coefficients_ptr, 2, offs_c, CHANNELS)[:, None]
        inverse = coefficient(coefficients_ptr, 3, offs_c, CHANNELS)
        grad = tl.where(mask, grad.to(tl.float32), 0.0)
        total = tl.sum(grad, axis=1)
        product = tl.sum(grad * (saved - mean), axis=1) * inverse
        mask_c = offs_c < CHANNELS
        tl.store(partials_ptr + offs_c, total, mask=mask_c)
        tl.store(partials_ptr + CHANNELS + offs_c, product, mask=mask_c)
