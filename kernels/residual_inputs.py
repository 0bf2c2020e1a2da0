"""The inputs of several residual blocks in a row, computed again for the backward in one pass.

    x₀ = relu?(y₀ · scale + shift), or the sum before the first; xᵢ = xᵢ₋₁ + yᵢ · scale + shift

Each is rounded before the next is added, as the forward does: the result is the same bit for bit. All tensors are NHWC.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from fastperc.kernels.conv_bn_relu import activate
from fastperc.kernels.deferred import coefficient
from fastperc.kernels.instance_norm import PASS_OPTIONS, block_of, place, programs_of
from fastperc.types import Deferred, stride_of


@triton.jit(do_not_specialize=["pixels"])
def residual_inputs_kernel(
    start_ptr,  # [N, pixels, C] as the outputs: what the first is added to; or None
    raw_ptrs,  # for each output: [N, pixels, C] fp16|bf16|fp32
    coefficients_ptrs,  # for each output: [N or 1, rows, C] fp32
    out_ptrs,  # [N, pixels, C] each
    strides,  # from an image's coefficients to the next one's
    pixels,
    COUNT: tl.constexpr,
    CHANNELS: tl.constexpr,
    RELU: tl.constexpr,  # whether the first is a ReLU's output
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    image, _, offs_p, offs_c = place(tl.program_id(0), pixels, CHANNELS, BLOCK_P, BLOCK_C)
    mask = (offs_p[:, None] < pixels) & (offs_c[None, :] < CHANNELS)
    offs = (image * pixels + offs_p[:, None]) * CHANNELS + offs_c[None, :]
    total = tl.zeros([BLOCK_P, BLOCK_C], dtype=tl.float32)
    if start_ptr is not None:
        total = tl.load(start_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    for i in tl.static_range(COUNT):
        table_ptr = coefficients_ptrs[i] + image * strides[i]
        scale = coefficient(table_ptr, 0, offs_c, CHANNELS)
        shift = coefficient(table_ptr, 1, offs_c, CHANNELS)
        raw = tl.load(raw_ptrs[i] + offs, mask=mask, other=0.0).to(tl.float32)
        y = raw * scale[None, :] + shift[None, :]
        if i > 0 or start_ptr is not None:
            y += total
        if RELU and i == 0:
            y = activate(y, None, "relu")
        rounded = y.to(out_ptrs[i].dtype.element_ty)
        tl.store(out_ptrs[i] + offs, rounded, mask=mask)
        total = rounded.to(tl.float32)


def residual_inputs(start: Tensor | None, activations: Sequence[Deferred], outs: Sequence[Tensor]) -> None:
    """Fills each of ``outs`` with the one before, or ``start``, plus its activation; only the first may have a ReLU.

    All are [N, C, H, W], of one shape and dtype, channels innermost and dense.
    """
    tables = [activation.coefficients for activation in activations]
    n, channels, height, width = outs[0].shape
    residual_inputs_kernel[(programs_of((n, channels, height, width)),)](
        start,
        tuple(activation.x for activation in activations),
        tuple(tables),
        tuple(outs),
        tuple(stride_of(table) for table in tables),
        height * width,
        COUNT=len(outs),
        CHANNELS=channels,
        RELU=activations[0].relu,
        **block_of(channels),
        **PASS_OPTIONS,
    )
