"""The losses of a run: on the screen, in losses.csv and in TensorBoard."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastperc.errors import InputError
from fastperc.files import write_atomically
from fastperc.progress import Meter
from fastperc.training.processes import Processes
from fastperc.training.recipe import Recipe

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

LOSSES = "losses.csv"  # a row for each iteration


LOG_EVERY = 50  # iterations on a GPU between looks at the losses, for which it must have finished them


class Log:
    """What becomes of the terms of each step: they wait on the device, and are fetched and written now and then.

    They go to the meter on the screen, to ``losses.csv``, a row for each iteration, and to TensorBoard; each the mean
    over the processes. A context's end, by whatever cause, leaves whole rows.
    """

    def __init__(self, recipe: Recipe, out: Path, start: int, together: Processes) -> None:
        self.every = LOG_EVERY if together.device.type == "cuda" else 1
        self._out, self._together, self._written = out, together, start
        self._waiting: list[Tensor] = []  # [terms] each
        self._fields: tuple[str, ...] = ()
        self._path = out / LOSSES
        self._kept: list[str] | None = rows_until(self._path, start) if start else []
        self._board = open_tensorboard(out, start) if recipe.tensorboard and together.first else None
        self._meter = Meter("training", recipe.iterations, start).__enter__()

    def add(self, terms: Any) -> None:
        """Keeps the terms of the next step, a NamedTuple of scalars."""
        self._fields = terms._fields
        self._waiting.append(torch.stack(terms))

    def write(self, saved: int) -> None:
        """Fetches what waits, and writes it.

        Raises:
            FloatingPointError: a loss is not finite; ``saved`` is the iteration of the last checkpoint.
        """
        rows = self._together.mean(torch.stack(self._waiting)).tolist() if self._waiting else []
        self._waiting.clear()
        lines = []
        bad = next((i for i, (total, *_) in enumerate(rows) if not math.isfinite(total)), len(rows))
        for row in rows[:bad]:
            self._written += 1
            lines.append(",".join([str(self._written), *(f"{value:.9g}" for value in row)]))
            self._show(dict(zip(self._fields, row)))
        self._append(lines)
        if bad < len(rows):
            kept = f"iteration {saved} is kept in {self._out}" if saved else "none was saved yet"
            raise FloatingPointError(
                f"the loss is {rows[bad][0]} at iteration {self._written + 1}; {kept}; try a lower --lr"
            )

    def _show(self, values: dict[str, float]) -> None:
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(f"loss/{name}", value, self._written)
        total = values.pop("total")
        parts = " + ".join(f"{name} {value:.4g}" for name, value in values.items())
        self._meter.advance(f"loss {total:.4g}" + f" = {parts}" * bool(parts))

    def _append(self, lines: list[str]) -> None:
        if not lines or not self._together.first:
            return
        if self._kept is not None:  # the first time: without what a resumed run repeats
            header = ",".join(["iteration", *self._fields])
            lines = [header, *(self._kept[1:] if self._kept[:1] == [header] else []), *lines]
            self._kept = None
            with write_atomically(self._path) as temporary:
                temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
            return
        with self._path.open("ab", buffering=0) as file:
            file.write(("\n".join(lines) + "\n").encode())  # in one piece

    def close(self) -> None:
        """Nothing more will come."""
        self._meter.__exit__()
        if self._board is not None:
            self._board.close()


def rows_until(path: Path, step: int) -> list[str]:
    """The header and the whole rows of the losses in ``path`` up to iteration ``step``; nothing if there are none."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # behind the last line break stands nothing, or half
    except (OSError, ValueError):
        return []
    found = [line for line in lines[1:] if (first := line.partition(",")[0]).isdecimal() and int(first) <= step]
    return [*lines[:1], *found]


def open_tensorboard(out: Path, start: int) -> SummaryWriter:
    """A writer of scalars to ``out/tensorboard``, without those of steps that a resumed run repeats."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError("TensorBoard is not installed: pip install 'fastperc[tensorboard]'") from None
    return SummaryWriter(str(out / "tensorboard"), purge_step=start + 1)
