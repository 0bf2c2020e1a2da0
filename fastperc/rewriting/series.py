"""Layers that follow each other and are all prepared, as one call."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch

from fastperc._native import PreparedSeries, SeriesLayer
from fastperc.rewriting.replay import Prepared, Replay, Run

ALIGNMENT = 16  # floats, of the maps in memory: a line of the cache


class Layer(NamedTuple):
    """A step of a program that is a layer."""

    run: Run
    value: int  # the number of its output
    last_reads: Collection[int]  # values that no later step reads


class Series:
    """Prepared layers that run one after the other in one call; layer by layer, where strides are others."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        """
        Args:
            layers: whose runs are prepared :class:`Replay`.
        """
        self._layers = layers
        steps = [(layer.run, layer.run.prepared) for layer in layers if isinstance(layer.run, Replay)]
        replays = [(replay, prepared) for replay, prepared in steps if prepared is not None]
        assert len(replays) == len(layers), "a layer is not prepared"
        written = {layer.value: prepared for layer, (_, prepared) in zip(layers, replays)}
        last_reads = {value: i for i, layer in enumerate(layers) for value in layer.last_reads}
        self._inputs: dict[int, tuple[int, ...]] = {}  # strides of the values that are read from outside
        self._fits = True
        for replay, prepared in replays:
            for number, strides in ((replay.x, prepared.x_strides), (replay.skip, prepared.skip_strides)):
                if number is not None and strides is not None:
                    known = written[number].strides if number in written else self._inputs.setdefault(number, strides)
                    self._fits &= known == strides
        inside = [value for value in written if value in last_reads]
        self._outputs = [(value, prepared) for value, prepared in written.items() if value not in last_reads]
        maps = [*self._inputs, *(value for value, _ in self._outputs), *inside]
        numbers = {value: i for i, value in enumerate(maps)}
        offsets, self._floats = _places(
            [(i, written[one.value], last_reads.get(one.value)) for i, one in enumerate(layers)]
        )
        self._run = PreparedSeries(
            [
                SeriesLayer(
                    prepared.run,
                    numbers[replay.x],
                    None if replay.skip is None else numbers[replay.skip],
                    numbers[layer.value],
                )
                for layer, (replay, prepared) in zip(layers, replays)
            ],
            offsets,
        )

    def __call__(self, values: list[Any]) -> None:
        """Computes the values of all layers that others read."""
        inputs = [values[number] for number in self._inputs]
        if not self._fits or any(x.stride() != strides for x, strides in zip(inputs, self._inputs.values())):
            for layer in self._layers:
                values[layer.value] = layer.run(values)
            return
        outputs = [prepared.new_output() for _, prepared in self._outputs]
        self._run([*inputs, *outputs], torch.empty(self._floats, dtype=torch.float32))
        for (number, _), output in zip(self._outputs, outputs):
            values[number] = output


def in_series(layers: Sequence[Layer]) -> list[list[int]]:
    """The numbers of the layers, those that may run as one call together."""
    groups: list[list[int]] = []
    for i, layer in enumerate(layers):
        if i > 0 and _is_prepared(layers[i - 1].run) and _is_prepared(layer.run):
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def _is_prepared(run: Run) -> bool:
    return isinstance(run, Replay) and run.prepared is not None


def _places(maps: Sequence[tuple[int, Prepared, int | None]]) -> tuple[list[int], int]:
    """Offsets of maps in one memory, and how many floats it has.

    Args:
        maps: of each layer, its number, the layer, and which layer reads its output last; ``None``: it lies elsewhere.
    """
    offsets: list[int] = []
    taken: list[tuple[int, int, int]] = []  # first float, end, and the layer that may write there again
    size = 0
    for layer, prepared, last_read in maps:
        if last_read is None:
            continue
        floats, offset = -(-prepared.shape.numel() // ALIGNMENT) * ALIGNMENT, 0
        taken = sorted(one for one in taken if one[2] > layer)
        for first, end, _ in taken:
            if first - offset >= floats:
                break
            offset = max(offset, end)
        taken.append((offset, offset + floats, last_read + PreparedSeries.MOST))
        offsets.append(offset)
        size = max(size, offset + floats)
    return offsets, size
