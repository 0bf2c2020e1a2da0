"""A layer that runs again and again: its second run prepares the call of a C++ kernel for the later ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastperc import _native, backends
from fastperc.rewriting.alone import Run


class Replay:
    """Runs a layer for one set of shapes, the first time as it chooses, and then by the same kernels."""

    def __init__(self, run: Run, x: int, skip: int | None) -> None:
        """
        Args:
            run: the layer, which returns new memory.
            x, skip: the numbers of the layer's inputs among the values; no skip, if the layer has none.
        """
        self._layer, self._x, self._skip = run, x, skip
        self._choices = backends.Choices()
        self._runs = 0
        self._prepared: Run | None = None

    def __call__(self, values: list[Any]) -> Any:
        """The layer's output."""
        if self._prepared is not None and (y := self._prepared(values)) is not None:
            return y
        with backends.remembering(self._choices):
            self._runs += 1
            return self._recorded(values) if self._runs == 2 else self._layer(values)

    def _recorded(self, values: list[Any]) -> Any:
        """The layer's output. If the layer is one call of a C++ kernel and nothing else, the call is prepared."""
        with _native.recorded_calls() as calls, _Operators() as operators:
            y = self._layer(values)
        if len(calls) == 1 and operators.only_allocate and calls[0].out is y:
            x, skip = values[self._x], None if self._skip is None else values[self._skip]
            if calls[0].x is x and calls[0].skip is skip:
                self._prepared = self._with(calls[0])
        return y

    def _with(self, call: _native.ConvCall) -> Run:
        """What runs the layer by ``call``; it returns ``None`` for inputs of other strides."""
        run, x, skip = call.prepared(), self._x, self._skip
        shape, strides, dtype = call.out.shape, call.out.stride(), call.out.dtype
        x_strides, skip_strides = call.x.stride(), None if call.skip is None else call.skip.stride()

        def prepared(values: list[Any]) -> Tensor | None:
            skipped = None if skip is None else values[skip]
            if values[x].stride() != x_strides or (skipped is not None and skipped.stride() != skip_strides):
                return None
            out = torch.empty_strided(shape, strides, dtype=dtype)
            run(values[x], skipped, out)
            return out

        return prepared


class _Operators(TorchDispatchMode):
    """Sees which of PyTorch's operators run."""

    only_allocate = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.only_allocate &= func is torch.ops.aten.empty.memory_format
        return func(*args, **kwargs or {})
