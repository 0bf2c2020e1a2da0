"""Norms of activations: statistics of the channels, the passes over the activations, and their gradients.

On a CPU the activations are in NHWC. On a GPU "channels-last" includes dense NCHW: both are served.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastperc._native.module import (
    _C,
    DTYPES,
    activation_arguments,
    gpu_activation,
    image_shape,
    on_gpu,
    stream_of,
    strides_of,
)
from fastperc.types import Activation


class NormState(NamedTuple):
    """A norm's statistics and what it makes of them. N is the number of images, or 1 for a batch norm."""

    statistics: Tensor  # float64 [N, 2, C]: mean and Σ (x - mean)²
    counts: Tensor  # float64 [1] or [C]: of how many values
    factors: Tensor  # float32 [3, N, C]: mean, scale and shift, as scale_shift() takes them
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
    statistics = torch.empty(1 if batch else len(x), 2, x.shape[1], dtype=torch.float64, device=x.device)
    if on_gpu(x):
        partials = _gpu_partials(x, batch)
        with stream_of(x) as stream:
            pointers = x.data_ptr(), statistics.data_ptr(), partials.data_ptr()
            _C.channel_statistics_cuda(*pointers, DTYPES[x.dtype], _gpu_shape(x, batch), stream)
        return statistics
    shape = _shape(x, batch)
    _C.channel_statistics_cpu(x.data_ptr(), statistics.data_ptr(), DTYPES[x.dtype], shape, torch.get_num_threads())
    return statistics


def norm_state(statistics: Tensor, counts: Tensor, parameters: NormParameters, batch: bool) -> NormState:
    """What a norm makes of ``statistics`` and ``counts``, as :class:`NormState` has them."""
    images, _, channels = statistics.shape
    factors = torch.empty(3, images, channels, dtype=torch.float32, device=statistics.device)
    state = NormState(statistics, counts, factors, batch)
    arguments = (*_statistics(state), *parameters.pointers, factors.data_ptr(), images, channels)
    if on_gpu(statistics):
        with stream_of(statistics) as stream:
            _C.norm_from_statistics_cuda(*arguments, stream)
    else:
        _C.norm_from_statistics_cpu(*arguments)
    return state


def scale_shift(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    skip: Tensor | None,
    activation: Activation | None,
    out: Tensor,
    batch: bool = False,
    mean: Tensor | None = None,
) -> None:
    """Fills ``out`` with ``activation`` of ``x`` · ``scale`` + ``shift`` + ``skip``.

    On a GPU, ``mean`` is subtracted from ``x`` first: the shift that :func:`norm_state` makes there is without it.

    Args:
        x: [N, C, H, W], channels-last.
        scale, shift, mean: float32 [N, C]; [1, C] with ``batch``. On a GPU they may be ``None``, which is 1, 0 and 0.
        skip: [N, C, H, W] whose channels have stride 1, or ``None``. With ``batch``, its images follow each other as
            its rows do. On a GPU it may have any strides.
        activation: one of ``PASS_ACTIVATIONS``, or ``None``.
        out: of the shape, dtype and strides of ``x``; may be ``x``.
        batch: whether all images have the same scale and shift.
    """
    assert out.stride() == x.stride()
    if on_gpu(x):
        function, _slopes = gpu_activation(activation, x.shape[1])
        pointers = (_pointer(mean), _pointer(scale), _pointer(shift)), _pointer(skip), out.data_ptr()
        strides = (0, 0, 0, 0) if skip is None else strides_of(skip)
        with stream_of(x) as stream:
            _C.scale_shift_cuda(
                x.data_ptr(), *pointers, DTYPES[x.dtype], _gpu_shape(x, batch), strides, function, stream
            )
        return
    assert scale is not None and shift is not None
    assert skip is None or skip.stride(1) == 1 or skip.shape[1] == 1
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
    arguments = (*pointers, share, mean.data_ptr(), variance.data_ptr(), len(mean))
    if on_gpu(mean):
        with stream_of(mean) as stream:
            _C.update_running_statistics_cuda(*arguments, stream)
    else:
        _C.update_running_statistics_cpu(*arguments)
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
    assert (y is None) == (masked is None)
    rows = 3 if activation is not None and activation.name in ("leaky_relu", "prelu") else 2
    sums = torch.empty(len(state.statistics), rows, x.shape[1], dtype=torch.float64, device=x.device)
    if on_gpu(x):
        function, _slopes = gpu_activation(activation, x.shape[1])
        partials = _gpu_partials(x, state.batch)
        pointers = x.data_ptr(), grad.data_ptr(), _factors(state), state.statistics.data_ptr(), sums.data_ptr()
        common = partials.data_ptr(), DTYPES[x.dtype], _gpu_shape(x, state.batch), function
        with stream_of(x) as stream:
            _C.norm_gradient_sums_cuda(*pointers, *common, _pointer(y), _pointer(masked), stream)
        return sums
    kind, slopes = activation_arguments(activation, x.shape[1])
    shape = _shape(x, state.batch)
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
    gradients = torch.empty(rows, channels, dtype=torch.float32, device=sums.device)
    arguments = (*_statistics(state), eps, sums.data_ptr(), rows, gradients.data_ptr(), images, channels)
    if on_gpu(sums):
        with stream_of(sums) as stream:
            _C.norm_parameter_gradients_cuda(*arguments, stream)
    else:
        _C.norm_parameter_gradients_cpu(*arguments)
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
    images, rows, channels = sums.shape
    factors = torch.empty(images, 3, channels, dtype=torch.float32, device=x.device)
    of_sums = sums.data_ptr(), rows, factors.data_ptr(), images, channels
    pointers = x.data_ptr(), grad.data_ptr(), _factors(state), factors.data_ptr(), out.data_ptr()
    if on_gpu(x):
        function, _slopes = gpu_activation(activation, channels)
        with stream_of(x) as stream:
            _C.norm_gradient_factors_cuda(*_statistics(state), *parameters.pointers, *of_sums, stream)
            _C.norm_gradient_cuda(*pointers, DTYPES[x.dtype], _gpu_shape(x, state.batch), function, stream)
        return
    kind, slopes = activation_arguments(activation, channels)
    _C.norm_gradient_factors_cpu(*_statistics(state), *parameters.pointers, *of_sums)
    common = DTYPES[x.dtype], _shape(x, state.batch), kind, _pointer(slopes), torch.get_num_threads()
    _C.norm_gradient_cpu(*pointers, *common)


def _shape(x: Tensor, batch: bool) -> tuple[int, int, int, int]:
    """Images, rows, columns, channels; with ``batch``, of all images of ``x`` one above the other."""
    n, h, w, c = image_shape(x)
    return (1, n * h, w, c) if batch else (n, h, w, c)


def _gpu_shape(x: Tensor, batch: bool) -> tuple[int, int, int, int, int, int]:
    """The shape and layout of ``x``, dense in NCHW or NHWC, and ``batch``: whether all images have one norm."""
    n, c, h, w = x.shape
    is_nhwc = c > 1 and x.is_contiguous(memory_format=torch.channels_last)
    assert is_nhwc or x.is_contiguous()
    return n, c, h, w, int(is_nhwc), int(batch)


def _gpu_partials(x: Tensor, batch: bool) -> Tensor:
    """Scratch of the kernels that add up channels of ``x``."""
    count = _C.norm_partials(_gpu_shape(x, batch), DTYPES[x.dtype])
    return torch.empty(count, dtype=torch.float32, device=x.device)


def _factors(state: NormState) -> tuple[int, int, int]:
    first, step = state.factors.data_ptr(), state.factors.stride(0) * state.factors.itemsize
    return first, first + step, first + 2 * step


def _statistics(state: NormState) -> tuple[tuple[int, int], int]:
    return (state.statistics.data_ptr(), state.counts.data_ptr()), int(state.counts.numel() > 1)


def _pointer(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
