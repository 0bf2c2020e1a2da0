"""Convolutions of frozen networks that run again and again: their calls are recorded, and prepared to be run again."""

from __future__ import annotations

import threading
from collections.abc import Iterator
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
