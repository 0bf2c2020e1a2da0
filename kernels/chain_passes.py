"""The passes over memory of a chain in training, each with the coefficients that it needs, in one launch.

    normalise        the coefficients of a norm from its input's statistics by tiles; then the next layer's input
    before_norm      the same of the gradient; then the gradient before the norm. Beside it another layer's input may be
                     normalised again

The first programs compute the coefficients, and those that need them wait. Programs count themselves as they begin, so
those that are waited for run already. They count in integers: the result is the same bit for bit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastperc.kernels.deferred import GRADIENT_ROWS, NORM_ROWS
from fastperc.kernels.instance_norm import PASS_OPTIONS, block_of, instance_norm_fwd, instance_norm_tile, programs_of
from fastperc.kernels.norm_coefficients import (
    BLOCK_CHANNELS,
    BLOCK_TILES,
    RunningStatistics,
    gradient_coefficients_tile,
    norm_coefficients_tile,
)
from fastperc.types import Deferred, stride_of

# int32 zeros for a launch: programs that began, and that announced their coefficients. Two more keep those of the next
# launch at a whole vector, so that Triton does not compile for other addresses too.
COUNTERS = 4


@triton.jit
def number(counters_ptr):
    """The number of this program, in the order in which they begin."""
    return tl.atomic_add(counters_ptr, 1, sem="relaxed")


@triton.jit
def announce(counters_ptr):
    """Says that what this program stored is there."""
    tl.debug_barrier()
    tl.atomic_add(counters_ptr + 1, 1, sem="release")


@triton.jit
def wait_for(counters_ptr, programs):
    """Waits until so many programs have announced."""
    while tl.atomic_add(counters_ptr + 1, 0, sem="acquire") < programs:
        pass
    tl.debug_barrier()


@triton.jit(do_not_specialize=["tiles", "height", "width", "programs"])
def normalise_kernel(
    counters_ptr,  # [COUNTERS] int32
    programs,  # that compute coefficients
    partials_ptr,  # this and all up to momentum: see norm_coefficients_kernel
    weight_ptr,
    bias_ptr,
    mean_ptr,
    variance_ptr,
    batches_ptr,
    coefficients_ptr,
    tiles,
    eps,
    momentum,
    x_ptr,  # this and all up to skip_stride_column: see instance_norm_kernel
    skip_ptr,
    out_ptr,
    coefficients_stride,
    height,
    width,
    skip_stride_image,
    skip_stride_row,
    skip_stride_column,
    CHANNELS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    COEFFICIENTS_T: tl.constexpr,
    COEFFICIENTS_C: tl.constexpr,
):
    pid = number(counters_ptr)
    if pid < programs:
        norm_coefficients_tile(
            pid,
            partials_ptr,
            weight_ptr,
            bias_ptr,
            mean_ptr,
            variance_ptr,
            batches_ptr,
            coefficients_ptr,
            None,
            tiles,
            eps,
            momentum,
            CHANNELS,
            COEFFICIENTS_T,
            COEFFICIENTS_C,
        )
        announce(counters_ptr)
    else:
        wait_for(counters_ptr, programs)
        instance_norm_tile(
            x_ptr,
            None,
            coefficients_ptr,
            skip_ptr,
            out_ptr,
            pid - programs,
            coefficients_stride,
            height,
            width,
            skip_stride_image,
            skip_stride_row,
            skip_stride_column,
            None,
            CHANNELS,
            ACTIVATION,
            BLOCK_P,
            BLOCK_C,
        )


@triton.jit(do_not_specialize=["tiles", "height", "width", "programs", "other_programs", "other_height", "other_width"])
def before_norm_kernel(
    counters_ptr,  # [COUNTERS] int32
    programs,  # that compute coefficients
    partials_ptr,  # this and all up to tiles: see gradient_coefficients_kernel
    weight_ptr,
    norm_ptr,
    coefficients_ptr,
    sums_ptr,
    sums_stride_image,
    sums_stride_row,
    tiles,
    grad_ptr,  # [N, H, W, C] fp16|bf16|fp32
    saved_ptr,  # as grad: the norm's input; None if its statistics are constants
    out_ptr,  # as grad; may be grad_ptr
    coefficients_stride,
    height,
    width,
    other_programs,  # that normalise another layer's input, next in number
    x_ptr,  # [N, other_height, other_width, OTHER_CHANNELS] as grad; or None, and there is no other layer
    x_coefficients_ptr,  # [N or 1, NORM_ROWS, OTHER_CHANNELS] fp32
    skip_ptr,  # as x, with strides for all but the channels; or None
    x_out_ptr,  # as x
    x_coefficients_stride,
    other_height,
    other_width,
    skip_stride_image,
    skip_stride_row,
    skip_stride_column,
    FROZEN: tl.constexpr,
    CHANNELS: tl.constexpr,
    OTHER_CHANNELS: tl.constexpr,
    ACTIVATION: tl.constexpr,  # of x: "relu" or None
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    OTHER_BLOCK_P: tl.constexpr,
    OTHER_BLOCK_C: tl.constexpr,
    COEFFICIENTS_T: tl.constexpr,
    COEFFICIENTS_C: tl.constexpr,
):
    pid = number(counters_ptr)
    if pid < programs:
        gradient_coefficients_tile(
            pid,
            partials_ptr,
            weight_ptr,
            norm_ptr,
            coefficients_ptr,
            sums_ptr,
            sums_stride_image,
            sums_stride_row,
            tiles,
            FROZEN,
            CHANNELS,
            COEFFICIENTS_T,
            COEFFICIENTS_C,
        )
        announce(counters_ptr)
    elif pid < programs + other_programs:
        if x_ptr is not None:
            instance_norm_tile(
                x_ptr,
                None,
                x_coefficients_ptr,
                skip_ptr,
                x_out_ptr,
                pid - programs,
                x_coefficients_stride,
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
    else:
        wait_for(counters_ptr, programs)
        instance_norm_tile(
            grad_ptr,
            saved_ptr,
            coefficients_ptr,
            None,
            out_ptr,
            pid - programs - other_programs,
            coefficients_stride,
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


_COEFFICIENTS = dict(COEFFICIENTS_T=BLOCK_TILES, COEFFICIENTS_C=BLOCK_CHANNELS)


def _skip_strides(skip: Tensor | None) -> tuple[int, int, int]:
    return (0, 0, 0) if skip is None else (skip.stride(0), skip.stride(2), skip.stride(3))


class Norm(NamedTuple):
    """A norm whose coefficients are computed first."""

    counters: Tensor  # [COUNTERS] int32 zeros, for one launch
    partials: Tensor | None  # [N, tiles, 3, C], N = 1 for a batch norm; None: the running statistics are applied
    weight: Tensor  # [C] float32
    bias: Tensor  # [C] float32
    eps: float
    running: RunningStatistics | None  # to be updated, or applied

    def empty_coefficients(self) -> Tensor:
        """Memory for its coefficients [N, NORM_ROWS, C] float32."""
        images = 1 if self.partials is None else len(self.partials)
        return torch.empty(images, NORM_ROWS.value, len(self.weight), device=self.weight.device)


class Pass(NamedTuple):
    """A pass over memory: ``out`` becomes ``x`` + ``skip``, and its ReLU if ``x`` has one."""

    x: Deferred  # [N, C, H, W]
    skip: Tensor | None  # as x; may be a window of a larger map
    out: Tensor  # as x; may be x.x
    norm: Norm | None = None  # fills the coefficients of ``x``

    def run(self) -> None:
        """Launches it by itself."""
        norm, (x, coefficients, relu, _) = self.norm, self.x
        if norm is None:
            instance_norm_fwd(self.x, self.skip, self.out)
            return
        assert coefficients is not None
        images, tiles = (1, 0) if norm.partials is None else norm.partials.shape[:2]
        programs, running = images * triton.cdiv(x.shape[1], BLOCK_CHANNELS), norm.running
        normalise_kernel[(programs + programs_of(x.shape),)](
            norm.counters,
            programs,
            norm.partials,
            norm.weight,
            norm.bias,
            running and running.mean,
            running and running.variance,
            running.batches if running is not None and running.momentum is None else None,
            coefficients,
            tiles,
            norm.eps,
            (running and running.momentum) or 0.0,
            x,
            self.skip,
            self.out,
            stride_of(coefficients),
            *x.shape[2:],
            *_skip_strides(self.skip),
            CHANNELS=x.shape[1],
            ACTIVATION="relu" if relu else None,
            **block_of(x.shape[1]),
            **_COEFFICIENTS,
            **PASS_OPTIONS,
        )


class GradientNorm(NamedTuple):
    """A norm's backward: what ``gradient_coefficients`` takes."""

    counters: Tensor  # [COUNTERS] int32 zeros, for one launch
    partials: Tensor  # [N, tiles, 2, C] of the output's gradient, N = 1 for a batch norm
    weight: Tensor  # [C] float32
    norm: Tensor  # [N, NORM_ROWS, C]: the coefficients of the forward
    frozen: bool
    sums: Tensor  # [N, 2, C], C innermost: to be filled

    def empty_coefficients(self) -> Tensor:
        """Memory for its coefficients [N, GRADIENT_ROWS, C] float32."""
        return torch.empty(len(self.partials), GRADIENT_ROWS.value, len(self.weight), device=self.weight.device)


def before_norm(norm: GradientNorm, gradient: Pass, other: Pass | None) -> None:
    """Fills the coefficients of ``gradient``, runs it, and ``other`` beside it, which needs no coefficients."""
    grad, coefficients, _, saved = gradient.x
    assert coefficients is not None
    _, channels, *size = grad.shape
    images, tiles = norm.partials.shape[:2]
    programs = images * triton.cdiv(channels, BLOCK_CHANNELS)
    other_channels, other_size, other_programs = channels, size, 0
    blocks: dict[str, Any] = {f"OTHER_{name}": None for name in block_of(channels)}
    x = skip = out = x_coefficients = None
    if other is not None:
        (x, x_coefficients, _, _), skip, out = other.x, other.skip, other.out
        _, other_channels, *other_size = x.shape
        other_programs = programs_of(x.shape)
        blocks = {f"OTHER_{name}": block for name, block in block_of(other_channels).items()}
    before_norm_kernel[(programs + other_programs + programs_of(grad.shape),)](
        norm.counters,
        programs,
        norm.partials,
        norm.weight,
        norm.norm,
        coefficients,
        norm.sums,
        *norm.sums.stride()[:2],
        tiles,
        grad,
        saved,
        gradient.out,
        stride_of(coefficients),
        *size,
        other_programs,
        x,
        x_coefficients,
        skip,
        out,
        0 if x_coefficients is None else stride_of(x_coefficients),
        *other_size,
        *_skip_strides(skip),
        FROZEN=norm.frozen,
        CHANNELS=channels,
        OTHER_CHANNELS=other_channels,
        ACTIVATION="relu" if other is not None and other.x.relu else None,
        **block_of(channels),
        **blocks,
        **_COEFFICIENTS,
        **PASS_OPTIONS,
    )
