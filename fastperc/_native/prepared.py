"""Convolutions of frozen networks that run again and again: their calls are recorded, and prepared to be run again."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from fastperc._native.module import _C, strides_of


class ConvConstants(NamedTuple):
    """What a convolution's calls for one shape have in common."""

    weights: Tensor  # packed for the kernel
    bias: Tensor
    activation: str  # as ``activation_arguments`` has it
    slopes: Tensor | None
    shape: tuple[int, ...]  # of the kernel, with the steps of the pixels of ``x`` and ``out``


class ConvCall(NamedTuple):
    """A call of the kernel ``kernel``_cpu."""

    kernel: str  # "pointwise_conv" or "depthwise_conv"
    x: Tensor
    skip: Tensor | None
    out: Tensor
    constants: ConvConstants

    def prepared(self) -> PreparedConv:
        """What runs the convolution of other tensors with the same shapes and strides."""
        return PreparedConv(self)


class PreparedConv:
    """A convolution for one shape, whose arguments are checked and converted once. Its constants live as long as it."""

    def __init__(self, call: ConvCall) -> None:
        self._constants = call.constants
        self._run = getattr(_C, f"prepare_{call.kernel}")(*_constant_arguments(call.skip, call.constants))

    def __call__(self, x: Tensor, skip: Tensor | None, out: Tensor) -> None:
        """Fills ``out``. All tensors have the shapes and strides of the call that was prepared."""
        skip_address = 0 if skip is None else skip.data_ptr()
        self._run(x.data_ptr(), skip_address, out.data_ptr(), torch.get_num_threads())


class SeriesLayer(NamedTuple):
    """A convolution of a series, and the numbers of the maps that it reads and writes."""

    conv: PreparedConv
    x: int
    skip: int | None
    out: int


class PreparedSeries:
    """Convolutions that run one after the other in one call, each from maps that are given or that others wrote before.

    Where the maps between them may not fit the caches, they are computed in strips of rows, and do not exist as
    a whole (see csrc/conv_series.cpp). The results are those of the single calls.
    """

    MOST = 3  # layers that may run at the same time: the first one's maps are still read when the last one's is written

    def __init__(self, layers: Sequence[SeriesLayer], offsets: Sequence[int]) -> None:
        """
        Args:
            layers: in order.
            offsets: in floats, in the memory of a call, of the maps that are not the caller's: the last numbers.
        """
        self._layers = [layer.conv for layer in layers]
        calls = [(conv._run, (x, -1 if skip is None else skip, out)) for conv, x, skip, out in layers]
        self._run = _C.ConvSeries(calls, list(offsets))

    def __call__(self, maps: Sequence[Tensor], memory: Tensor) -> None:
        """Runs all layers. ``maps`` are the caller's, in the shapes and strides that were prepared."""
        self._run([one.data_ptr() for one in maps], memory.data_ptr(), torch.get_num_threads())


class _Record(threading.local):
    calls: list[ConvCall] | None = None


_record = _Record()


@contextmanager
def recorded_calls() -> Iterator[list[ConvCall]]:
    """A list that receives every call of :func:`convolve` that this thread makes in the block."""
    before, _record.calls = _record.calls, []
    try:
        yield _record.calls
    finally:
        _record.calls = before


def convolve(kernel: str, x: Tensor, skip: Tensor | None, out: Tensor, constants: ConvConstants) -> None:
    """Fills ``out`` by the kernel ``kernel``_cpu."""
    if _record.calls is not None:
        _record.calls.append(ConvCall(kernel, x, skip, out, constants))
    weights, bias, *others = _constant_arguments(skip, constants)
    skip_address = 0 if skip is None else skip.data_ptr()
    run = getattr(_C, f"{kernel}_cpu")
    run(x.data_ptr(), weights, bias, skip_address, out.data_ptr(), *others, torch.get_num_threads())


def _constant_arguments(
    skip: Tensor | None, constants: ConvConstants
) -> tuple[int, int, tuple[int, ...], tuple[int, ...], str, int]:
    """Weights, bias, shape, strides of the skip, activation and slopes, as the kernels take them."""
    weights, bias, activation, slopes, shape = constants
    strides = (0, 0, 0, 0) if skip is None else strides_of(skip)
    addresses = weights.data_ptr(), bias.data_ptr()
    return *addresses, shape, strides, activation, 0 if slopes is None else slopes.data_ptr()
