"""The paper's Figure 2: two style networks, with and without residual connections, trained alike, and their losses."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image

from fastperc.errors import InputError
from fastperc.files import check_readable, check_writable, write_atomically
from fastperc.progress import say, silent
from fastperc.training.charts import BLUE, ORANGE, Curve, Panel, check_available, loss_chart, running_mean
from fastperc.training.loop import train
from fastperc.training.processes import Processes, join_processes
from fastperc.training.resume import is_complete
from fastperc.training.run_folder import CHECKPOINT, FIGURE, LOSSES, RESIDUAL
from fastperc.training.style import StyleRecipe

RUNS = {RESIDUAL: True, "non-residual": False}  # folder → kind of block, in the order of training

Losses = Mapping[str, Sequence[float]]  # of each iteration, by run


def train_both(
    recipe: StyleRecipe, out: Path, resume: bool = False, command: str = "the same command with --resume"
) -> dict[str, list[float]] | None:
    """Trains the network of ``recipe`` with and without residual connections, in the folders ``out/residual`` and
    ``out/non-residual``, and draws ``out/figure2.png``.

    With ``resume`` each run goes on from its checkpoint; one that is complete stays as it is. ``command`` is the
    command line that resumes, for the line that says so.

    Returns:
        The total loss of each iteration, by run. ``None`` if a signal stopped a run before its end and, of several
        processes, in all but the first.

    Raises:
        InputError: as :func:`fastperc.training.train`. Nothing is trained if ``out`` cannot be used or matplotlib is
            not installed.
        FloatingPointError: a loss or a weight is no longer finite.
    """
    check_available()
    figure = check_writable(out / FIGURE)
    with join_processes(recipe.device) as processes, silent(not processes.is_first):
        with processes.first_before_others():
            if not resume and any((out / run / CHECKPOINT).exists() for run in RUNS):
                raise InputError(f"{out}: holds a run already; continue it with --resume, or name another folder")
        losses = {}
        for run, residual in RUNS.items():
            if not train_one(with_blocks(recipe, residual), out / run, resume, processes):
                say(f"stopped before the figure was complete; go on by: {command}")
                return None
            if processes.is_first:
                losses[run] = read_losses(out / run / LOSSES, recipe.iterations)
        if not processes.is_first:
            return None
        with write_atomically(figure) as temporary:
            chart(losses, Path(recipe.style).name).save(temporary)
        say(f"drew {figure}")
        return losses


def with_blocks(recipe: StyleRecipe, residual: bool) -> StyleRecipe:
    """``recipe`` with residual blocks, or with blocks without residual connections."""
    return replace(recipe, network=recipe.network | {"residual": residual})


def train_one(recipe: StyleRecipe, out: Path, resume: bool, processes: Processes) -> bool:
    """Trains in ``out``; returns whether the run is complete, in every process."""
    train(recipe, out, resume)
    with processes.first_before_others():  # the first process writes the checkpoint, the others must not read it before
        return is_complete(recipe, out)


def read_losses(path: Path, iterations: int) -> list[float]:
    """The total losses of iterations 1 to ``iterations`` in a run's ``losses.csv``.

    Raises:
        InputError: it cannot be read, does not hold all of them, or one is not a finite number above 0.
    """
    with check_readable(path).open(encoding="utf-8", newline="") as file:
        try:
            rows = [(int(row["iteration"]), float(row["total"])) for row in csv.DictReader(file)]
        except (KeyError, TypeError, ValueError, csv.Error):
            raise InputError(f"{path}: not the losses of a training run, or damaged") from None
    rows = rows[:iterations]
    if [iteration for iteration, _ in rows] != list(range(1, iterations + 1)):
        raise InputError(
            f"{path}: the losses of iterations 1 to {iterations} are not all there; train again in another folder"
        )
    if not all(0 < loss < math.inf for _, loss in rows):
        raise InputError(f"{path}: holds a loss that is not a finite number above 0")
    return [loss for _, loss in rows]


def window(iterations: int) -> int:
    """Over how many iterations losses are averaged. Each iteration is of other photos, so that its loss alone jumps."""
    return math.isqrt(iterations)


def chart(losses: Losses, title: str) -> Image.Image:
    """A chart of each run's losses, faint, and their running means, bold."""
    colors = dict(zip(losses, (ORANGE, BLUE)))
    smoothed = {run: running_mean(values, window(len(values))) for run, values in losses.items()}
    raw = [Curve(values, colors[run], opacity=0.25) for run, values in losses.items()]
    means = [Curve(means, colors[run], run, window(len(losses[run]))) for run, means in smoothed.items()]
    return loss_chart([Panel(title, [*raw, *means])])


def table(losses: Losses) -> str:
    """A text: each run's mean loss at the end, and the iteration at which the first run reaches the second's."""
    iterations = min(map(len, losses.values()))
    count = window(iterations)
    means = {run: running_mean(values, count) for run, values in losses.items()}
    residual, non_residual = means.values()
    reached = next((i for i, mean in enumerate(residual, count) if mean <= non_residual[-1]), None)
    lines = [f"mean loss of the last {count} of {iterations} iterations:"]
    lines += [f"  {run:12}  {values[-1]:.4g}" for run, values in means.items()]
    lines += [
        "the residual network does not reach the final loss of the other"
        if reached is None
        else f"the residual network reaches the final loss of the other at iteration {reached}"
    ]
    return "\n".join(lines)
