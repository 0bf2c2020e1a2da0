"""The losses of a run: shown on the terminal, written to ``losses.csv`` and to TensorBoard."""

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
from fastperc.training.run_folder import LOSSES

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

LONGEST_ROW = 1000  # characters of losses.csv
GPU_INTERVAL = 50  # iterations between two looks at the losses on a GPU: a look waits for the GPU to finish


class LossLog:
    """Collects the loss terms of each iteration on the device; :meth:`write` fetches and writes them now and then.

    Written are the means over the processes, by the first process alone. Whenever a run ends, even if it is killed,
    ``losses.csv`` holds whole rows.

    Args:
        recipe: the run's; it says how many iterations there are and whether TensorBoard gets the losses.
        out: the run's folder.
        start: the number of iterations done before; later rows of ``losses.csv``, which a resumed run repeats, are
            dropped.
        processes: those that train together.

    Raises:
        InputError: the recipe asks for TensorBoard, which is not installed.
    """

    def __init__(self, recipe: Recipe, out: Path, start: int, processes: Processes) -> None:
        self.interval = GPU_INTERVAL if processes.device.type == "cuda" else 1  # iterations between calls of `write`
        self._out, self._path, self._processes = out, out / LOSSES, processes
        self._written = start  # iterations
        self._pending: list[Tensor] = []  # [terms] each
        self._fields: tuple[str, ...] = ()
        # What a resumed run keeps of the file, until the file is first written.
        self._kept_lines: list[str] | None = lines_up_to(self._path, start) if start else []
        self._tensorboard = open_tensorboard(out, start) if recipe.tensorboard and processes.is_first else None
        self._meter = Meter("training", recipe.iterations, start).__enter__()

    def add(self, terms: Any) -> None:
        """Keeps the terms of the next iteration, a NamedTuple of scalars."""
        self._fields = terms._fields
        self._pending.append(torch.stack(terms))

    def write(self, saved: int) -> None:
        """Fetches the pending terms and writes them.

        Args:
            saved: the iteration of the last checkpoint, or 0.

        Raises:
            FloatingPointError: a loss is not finite. The iterations before it have been written.
        """
        rows = self._processes.mean(torch.stack(self._pending)).tolist() if self._pending else []
        self._pending.clear()
        lines = []
        finite = next((i for i, (total, *_) in enumerate(rows) if not math.isfinite(total)), len(rows))
        for row in rows[:finite]:
            self._written += 1
            lines.append(",".join([str(self._written), *(f"{value:.9g}" for value in row)]))
            self._show(dict(zip(self._fields, row)))
        self._append(lines)
        if finite < len(rows):
            kept = f"iteration {saved} is kept in {self._out}" if saved else "no checkpoint was saved yet"
            raise FloatingPointError(
                f"the loss is {rows[finite][0]} at iteration {self._written + 1}; {kept}; try a lower --lr"
            )

    def close(self) -> None:
        """Ends the display and closes TensorBoard's file."""
        self._meter.__exit__()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def _show(self, values: dict[str, float]) -> None:
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(f"loss/{name}", value, self._written)
        total = values.pop("total")
        parts = " + ".join(f"{name} {value:.4g}" for name, value in values.items())
        self._meter.advance(f"loss {total:.4g}" + f" = {parts}" * bool(parts))

    def _append(self, lines: list[str]) -> None:
        if not lines or not self._processes.is_first:
            return
        if self._kept_lines is not None:
            header = ",".join(["iteration", *self._fields])
            kept = self._kept_lines[1:] if self._kept_lines[:1] == [header] else []
            self._kept_lines = None
            with write_atomically(self._path) as temporary:
                temporary.write_text("\n".join([header, *kept, *lines]) + "\n", encoding="utf-8")
            return
        with self._path.open("ab", buffering=0) as file:
            file.write(("\n".join(lines) + "\n").encode())  # unbuffered and in one call: whole rows


def lines_up_to(path: Path, iteration: int) -> list[str]:
    """The header and the whole rows up to ``iteration`` of the ``losses.csv`` at ``path``; empty if it has none."""
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(LONGEST_ROW * (iteration + 2))  # no more of a file that is no such table
        lines = text.split("\n")[:-1]  # after the last line break there is half a row at most
    except (OSError, ValueError):
        return []
    rows = []
    for line in lines[1:]:
        number = line.partition(",")[0]
        if number.isdecimal() and int(number) <= iteration:
            rows.append(line)
    return [*lines[:1], *rows]


def open_tensorboard(out: Path, start: int) -> SummaryWriter:
    """A writer to ``out/tensorboard`` that drops what was logged after iteration ``start``.

    Raises:
        InputError: TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError("TensorBoard is not installed: pip install 'fastperc[tensorboard]'") from None
    return SummaryWriter(str(out / "tensorboard"), purge_step=start + 1)
