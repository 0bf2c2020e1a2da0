"""Two passes over memory of ``fastperc.kernels.instance_norm`` in one launch: in a chain's backward the gradient before a
layer's norm, and the layer's input, which is computed again."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fastperc.kernels.instance_norm import (
    PASS_OPTIONS,
    block_of,
    instance_norm_fwd,
    instance_norm_tile,
    programs_of,
)
from fastperc.types import Deferred, stride_of


@triton.jit(do_not_specialize=["programs", "height", "width", "other_height", "other_width"])
def instance_norm_pair_kernel(
    grad_ptr,  # [N, H, W, C] fp16|bf16|fp32
    saved_ptr,  # as grad; or None
    grad_coefficients_ptr,  # [N or 1, GRADIENT_ROWS, C] fp32
    grad_out_ptr,  # as grad; may be grad_ptr
    programs,  # of this pass; those of the other one follow
    grad_coefficients_stride,
    height,
    width,
    x_ptr,  # [N, other_height, other_width, OTHER_CHANNELS] as grad
    coefficients_ptr,  # [N or 1, NORM_ROWS, OTHER_CHANNELS] fp32
    skip_ptr,  # as x, with strides for all but the channels; or None
    out_ptr,  # as x
    coefficients_stride,
    other_height,
    other_width,
    skip_stride_image,
    skip_stride_row,
    skip_stride_column,
    CHANNELS: tl.constexpr,
    OTHER_CHANNELS: tl.constexpr,
    ACTIVATION: tl.constexpr,  # of x: "relu" or None
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    OTHER_BLOCK_P: tl.constexpr,
    OTHER_BLOCK_C: tl.constexpr,
):
    pid = tl.program_id(0)
    if pid < programs:
        instance_norm_tile(
            grad_ptr,
            saved_ptr,
            grad_coefficients_ptr,
            None,
            grad_out_ptr,
            pid,
            grad_coefficients_stride,
            height,
            width,
            0,
            0,
            0,
            None,
            CHANNELS,
            None,
            BLOCK_P,
            BLOCK_C,
        )
    else:
        instance_norm_tile(
            x_ptr,
            None,
            coefficients_ptr,
            skip_ptr,
            out_ptr,
            pid - programs,
            coefficients_stride,
            other_height,
            other_width,
            skip_stride_image,
            skip_stride_row,
            skip_stride_column,
            None,
            OTHER_CHANNELS,
            ACTIVATION,
            OTHER_BLOCK_P,
            OTHER_BLOCK_C,
        )


class Pass(NamedTuple):
    """A pass over memory: ``out`` becomes ``x`` + ``skip``, and its ReLU if ``x`` has one."""

    x: Deferred  # [N, C, H, W]
    skip: Tensor | None  # as x; may be a window of a larger map
    out: Tensor  # as x; may be x.x

    def run(self) -> None:
        """Launches it by itself."""
        instance_norm_fwd(self.x, self.skip, self.out)


def run_both(gradient: Pass, other: Pass) -> None:
    """Launches both: that of a gradient, without skip and ReLU, and the ``other``, without a second map."""
    _, channels, *size = gradient.x.x.shape
    _, other_channels, *other_size = other.x.x.shape
    skip = other.skip
    programs, other_programs = programs_of(gradient.x.x.shape), programs_of(other.x.x.shape)
    blocks: dict[str, Any] = {f"OTHER_{name}": size for name, size in block_of(other_channels).items()}
    instance_norm_pair_kernel[(programs + other_programs,)](
        gradient.x.x,
        gradient.x.other,
        gradient.x.coefficients,
        gradient.out,
        programs,
        stride_of(gradient.x.coefficients),
        *size,
        other.x.x,
        other.x.coefficients,
        skip,
        other.out,
        stride_of(other.x.coefficients),
        *other_size,
        *((0, 0, 0) if skip is None else (skip.stride(0), skip.stride(2), skip.stride(3))),
        CHANNELS=channels,
        OTHER_CHANNELS=other_channels,
        ACTIVATION="relu" if other.x.relu else None,
        **block_of(channels),
        **blocks,
        **PASS_OPTIONS,
    )
