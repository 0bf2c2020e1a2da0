"""A layer that runs again and again: its second run prepares the call of a C++ kernel for the later ones."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastperc import _native, backends
from fastperc.rewriting.alone import Run


class Prepared(NamedTuple):
    """A layer as a call of a C++ kernel, for maps of these strides."""

    run: _native.PreparedConv
    x_strides: tuple[int, ...]
    skip_strides: tuple[int, ...] | None
    shape: torch.Size  # of the output, which is float32
    strides: tuple[int, ...]

    def new_output(self) -> Tensor:
        """Memory for the output."""
        return torch.empty_strided(self.shape, self.strides, dtype=torch.float32)


class Replay:
    """Runs a layer for one set of shapes, the first time as it chooses, and then by the same kernels."""

    def __init__(self, run: Run, x: int, skip: int | None) -> None:
        """
        Args:
            run: the layer, which returns new memory.
            x, skip: the numbers of the layer's inputs among the values; no skip, if the layer has none.
        """
        self._layer, self.x, self.skip = run, x, skip
        self._choices = backends.Choices()
        self._runs = 0
        self.prepared: Prepared | None = None

    def __call__(self, values: list[Any]) -> Any:
        """The layer's output."""
        if self.prepared is not None and (y := self._replayed(self.prepared, values)) is not None:
            return y
        with backends.remembering(self._choices):
            self._runs += 1
            return self._recorded(values) if self._runs == 2 else self._layer(values)

    def _recorded(self, values: list[Any]) -> Any:
        """The layer's output. If the layer is one call of a C++ kernel and nothing else, the call is prepared."""
        with _native.recorded_calls() as calls, _Operators() as operators:
            y = self._layer(values)
        if len(calls) == 1 and operators.only_allocate and calls[0].out is y:
            (call,), x, skip = calls, values[self.x], None if self.skip is None else values[self.skip]
            if call.x is x and call.skip is skip:
                skip_strides = None if skip is None else skip.stride()
                self.prepared = Prepared(call.prepared(), x.stride(), skip_strides, y.shape, y.stride())
        return y

    def _replayed(self, prepared: Prepared, values: list[Any]) -> Tensor | None:
        """The layer's output by the prepared call; ``None`` for inputs of other strides."""
        x, skip = values[self.x], None if self.skip is None else values[self.skip]
        if x.stride() != prepared.x_strides or (skip is not None and skip.stride() != prepared.skip_strides):
            return None
        out = prepared.new_output()
        prepared.run(x, skip, out)
        return out


class _Operators(TorchDispatchMode):
    """Sees which of PyTorch's operators run."""

    only_allocate = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.only_allocate &= func is torch.ops.aten.empty.memory_format
        return func(*args, **kwargs or {})
