"""Norms of activations in NHWC: statistics of the channels, the passes over the activations, and their gradients."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastperc._native.module import _C, DTYPES, activation_arguments, image_shape, strides_of
from fastperc.types import Activation


class NormState(NamedTuple):
    """A norm's statistics and what it makes of them. N is the number of images, or 1 for a batch norm."""

    statistics: Tensor  # float64 [N, 2, C]: mean and Σ (x - mean)²
    counts: Tensor  # float64 [1] or [C]: of how many values
    factors: Tensor  # float32 [3, N, C]: mean, scale and shift, out = x · scale + shift
    batch: bool  # whether the statistics are of all images together


class NormParameters(NamedTuple):
    """Weight and bias [C], float32 and contiguous, or ``None``."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float

    @property
    def pointers(self) -> tuple[tuple[int, int], float]:
        return (_pointer(self.weight), _pointer(self.bias)), self.eps


def channel_mean_m2(x: Tensor, batch: bool = False) -> Tensor:
    """The mean and Σ (x - mean)² of each channel of each image of ``x``, channels-last: float64 [N, 2, C].

    With ``batch``, those of all images together: [1, 2, C].
    """
    shape = _shape(x, batch)
    statistics = torch.empty(shape[0], 2, shape[3], dtype=torch.float64)
    _C.channel_statistics_cpu(x.data_ptr(), statistics.data_ptr(), DTYPES[x.dtype], shape, torch.get_num_threads())
    return statistics


def norm_state(statistics: Tensor, counts: Tensor, parameters: NormParameters, batch: bool) -> NormState:
    """What a norm makes of ``statistics`` and ``counts``, as :class:`NormState` has them."""
    images, _, channels = statistics.shape
    state = NormState(statistics, counts, torch.empty(3, images, channels, dtype=torch.float32), batch)
    _C.norm_from_statistics_cpu(*_statistics(state), *parameters.pointers, state.factors.data_ptr(), images, channels)
    return state


def scale_shift(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    skip: Tensor | None,
    activation: Activation | None,
    out: Tensor,
    batch: bool = False,
) -> None:
    """Fills ``out`` with ``activation`` of ``x`` · ``scale`` + ``shift`` + ``skip``.

    Args:
        x: [N, C, H, W], channels-last.
        scale, shift: float32 [N, C]; [1, C] with ``batch``.
        skip: [N, C, H, W] whose channels have stride 1, or ``None``. With ``batch``, its images follow each other as
            its rows do.
        activation: one of ``PASS_ACTIVATIONS``, or ``None``.
        out: of the shape, dtype and strides of ``x``; may be ``x``.
        batch: whether all images have the same scale and shift.
    """
    assert out.stride() == x.stride() and (skip is None or skip.stride(1) == 1 or skip.shape[1] == 1)
    assert skip is None or not batch or images_follow(skip)
    kind, slopes = activation_arguments(activation, x.shape[1])
    _C.scale_shift_cpu(
        x.data_ptr(),
        scale.data_ptr(),
        shift.data_ptr(),
        _pointer(skip),
        out.data_ptr(),
        DTYPES[x.dtype],
        _shape(x, batch),
        (0, 0, 0, 0) if skip is None else _strides(skip),
        kind,
        _pointer(slopes),
        torch.get_num_threads(),
    )


def images_follow(x: Tensor) -> bool:
    """Whether the first row of an image of ``x`` comes after the last one of the image before, as rows do."""
    return len(x) == 1 or x.shape[2] == 1 or x.stride(0) == x.shape[2] * x.stride(2)


def _strides(x: Tensor) -> tuple[int, int, int, int]:
    image, channel, row, column = strides_of(x)
    return image, channel, image if x.shape[2] == 1 else row, column


def update_running_statistics(statistics: Tensor, counts: Tensor, share: float, mean: Tensor, variance: Tensor) -> None:
    """Moves ``mean`` and ``variance`` [C], float32 and contiguous, by ``share`` towards those of a batch norm's values.

    ``statistics`` and ``counts`` are as :class:`NormState` has them; a channel of no values keeps its own.
    """
    pointers = (statistics.data_ptr(), counts.data_ptr()), int(counts.numel() > 1)
    _C.update_running_statistics_cpu(*pointers, share, mean.data_ptr(), variance.data_ptr(), len(mean))
    torch.autograd.graph.increment_version((mean, variance))


def norm_gradient_sums(
    x: Tensor,
    grad: Tensor,
    state: NormState,
    activation: Activation | None,
    y: Tensor | None = None,
    masked: Tensor | None = None,
) -> Tensor:
    """The sums Σ g and Σ g · (``x`` - mean) over the values that each mean is of: float64 [N, 2, C].

    g is the gradient before ``activation``, from ``grad`` after it. With slopes, the result has a third row: their
    gradient.

    Args:
        x, grad: [N, C, H, W], channels-last.
        state: of the norm.
        activation: as :func:`scale_shift` takes it.
        y: after a skip, the result of :func:`scale_shift`, whose sign says what the activation did. The row of the
            slopes is wrong then.
        masked: after a skip, receives g. Both are as ``x``.
    """
    kind, slopes = activation_arguments(activation, x.shape[1])
    shape = _shape(x, state.batch)
    sums = torch.empty(shape[0], 2 if slopes is None else 3, shape[3], dtype=torch.float64)
    assert (y is None) == (masked is None)
    _C.norm_gradient_sums_cpu(
        x.data_ptr(),
        grad.data_ptr(),
        _factors(state),
        state.statistics.data_ptr(),
        sums.data_ptr(),
        DTYPES[x.dtype],
        shape,
        kind,
        _pointer(slopes),
        _pointer(y),
        _pointer(masked),
        torch.get_num_threads(),
    )
    return sums


def norm_parameter_gradients(state: NormState, sums: Tensor, eps: float) -> Tensor:
    """The gradients of weight, bias and, if there are slopes, slopes, from :func:`norm_gradient_sums`: [2 or 3, C]."""
    images, rows, channels = sums.shape
    gradients = torch.empty(rows, channels, dtype=torch.float32)
    _C.norm_parameter_gradients_cpu(
        *_statistics(state), eps, sums.data_ptr(), rows, gradients.data_ptr(), images, channels
    )
    return gradients


def norm_gradient(
    x: Tensor,
    grad: Tensor,
    state: NormState,
    parameters: NormParameters,
    sums: Tensor,
    activation: Activation | None,
    out: Tensor,
) -> None:
    """Fills ``out`` with the gradient of a norm's input ``x`` [N, C, H, W].

    ``sums`` are those of :func:`norm_gradient_sums` over all values that the statistics are of, and ``grad`` and
    ``activation`` are what it got. After a skip, ``grad`` is ``masked`` and the activation is ``None``.
    """
    kind, slopes = activation_arguments(activation, x.shape[1])
    images, rows, channels = sums.shape
    factors = torch.empty(images, 3, channels, dtype=torch.float32)
    of_sums = sums.data_ptr(), rows, factors.data_ptr(), images, channels
    _C.norm_gradient_factors_cpu(*_statistics(state), *parameters.pointers, *of_sums)
    pointers = x.data_ptr(), grad.data_ptr(), _factors(state), factors.data_ptr(), out.data_ptr()
    common = DTYPES[x.dtype], _shape(x, state.batch), kind, _pointer(slopes), torch.get_num_threads()
    _C.norm_gradient_cpu(*pointers, *common)


def _shape(x: Tensor, batch: bool) -> tuple[int, int, int, int]:
    """Images, rows, columns, channels; with ``batch``, of all images of ``x`` one above the other."""
    n, h, w, c = image_shape(x)
    return (1, n * h, w, c) if batch else (n, h, w, c)


def _factors(state: NormState) -> tuple[int, int, int]:
    first, step = state.factors.data_ptr(), state.factors.stride(0) * state.factors.itemsize
    return first, first + step, first + 2 * step


def _statistics(state: NormState) -> tuple[tuple[int, int], int]:
    return (state.statistics.data_ptr(), state.counts.data_ptr()), int(state.counts.numel() > 1)


def _pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
