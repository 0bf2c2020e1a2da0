"""What flows between the layers of a chain in training: a map that nobody has normalised yet.

    forward     conv ── y ─────────────────────────────▶ next conv's load: relu(scale · y + shift), zero at the border
                     └─ statistics by tiles ▶ scale, shift ┘

    backward    dy by the load of the layer's own gradients: a · g + b · y + c, g being the gradient after the norm
                     ▲ sums by tiles ▶ a, b, c ┐
                     └── g ── data gradient of the next conv, let through where that load's ReLU did ◀── …

Either is x · row 0 + row 1 of a table of coefficients for each channel (of each image, for an instance norm), the
backward's + ``other`` · row 2. The table of a norm holds what a backward wants too: see ``NORM_ROWS``.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Rows of a norm's coefficients: scale, shift, mean, 1 / standard deviation, and how many values were counted.
NORM_ROWS = tl.constexpr(5)
GRADIENT_ROWS = tl.constexpr(3)  # of a gradient's: what g, 1 and y are multiplied by


@triton.jit
def coefficient(coefficients_ptr, row: tl.constexpr, offs_c, CHANNELS: tl.constexpr):
    """One row of an image's coefficients."""
    return tl.load(coefficients_ptr + row * CHANNELS + offs_c, mask=offs_c < CHANNELS, other=0.0)


@triton.jit
def load_deferred(
    x_ptr,  # [N, H, W, C] fp16|bf16|fp32
    other_ptr,  # as x; or None
    coefficients_ptr,  # [rows, C] fp32, of the image; or None
    offs,  # [pixels, channels]: of the elements in x
    offs_c,  # [channels]
    mask,  # [pixels, channels]
    CHANNELS: tl.constexpr,
    RELU: tl.constexpr,
):
    """[pixels, channels] in the dtype of x; zero outside ``mask``, also after the norm."""
    x = tl.load(x_ptr + offs, mask=mask, other=0.0)
    if coefficients_ptr is not None:
        value = x.to(tl.float32) * coefficient(coefficients_ptr, 0, offs_c, CHANNELS)[None, :]
        value += coefficient(coefficients_ptr, 1, offs_c, CHANNELS)[None, :]
        if other_ptr is not None:
            other = tl.load(other_ptr + offs, mask=mask, other=0.0).to(tl.float32)
            value += other * coefficient(coefficients_ptr, 2, offs_c, CHANNELS)[None, :]
        if RELU:
            value = tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)
        x = tl.where(mask, value, 0.0).to(x_ptr.dtype.element_ty)
    return x


@triton.jit
def store_gradient(
    grad,  # [channels, pixels] fp32: of a deferred activation; or of a plain one, if saved_ptr is None
    out_ptr,  # [N, H, W, C] fp16|bf16|fp32
    offs,  # [channels, pixels]: of the elements in out, and in saved
    offs_c,  # [channels]
    mask,  # [channels, pixels]
    saved_ptr,  # [N, H, W, C]: the activation's x; or None
    coefficients_ptr,  # [NORM_ROWS, C] fp32: its own, of the image
    partials_ptr,  # [2, C] fp32: Σ g and Σ g · x̂ of what is stored, x̂ being the normalised x
    CHANNELS: tl.constexpr,
    RELU: tl.constexpr,
):
    """Stores the gradient where the activation's ReLU let it through, and what its norm's own gradient wants of it."""
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
