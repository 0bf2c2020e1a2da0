"""The paper's Figure 2: a style network and its twin without residual connections, trained alike, loss by iteration."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image

from fastperc import checkpoints
from fastperc.errors import InputError
from fastperc.files import check_readable, check_writable, write_atomically
from fastperc.progress import say, silent
from fastperc.training.charts import BLUE, ORANGE, Curve, Panel, check_available, loss_chart, running_mean
from fastperc.training.log import LOSSES
from fastperc.training.loop import CHECKPOINT, train
from fastperc.training.processes import processes
from fastperc.training.style import StyleRecipe

RUNS = {"residual": True, "non-residual": False}  # folder → kind of block, in the order of training
FIGURE = "figure2.png"

Losses = Mapping[str, Sequence[float]]  # of each iteration, by run


def train_both(recipe: StyleRecipe, out: Path, resume: bool = False) -> dict[str, list[float]] | None:
    """Trains ``recipe``'s network with and without residual connections, in ``out/residual`` and ``out/non-residual``,
    and draws ``out/figure2.png``.

    With ``resume`` what is there goes on, or is left as it is where it is complete.

    Returns:
        The total loss of each iteration, by run; ``None`` if a signal stopped a run before its end, and of several
        processes to all but the first.

    Raises:
        InputError: as :func:`fastperc.training.train`; nothing is trained if ``out`` cannot be used or matplotlib
            is not installed.
        FloatingPointError: a loss or a weight is no longer finite.
    """
    check_available()
    figure = check_writable(out / FIGURE)
    with processes(recipe.device) as together, silent(not together.first):
        with together.one_first():
            if not resume and any((out / run / CHECKPOINT).exists() for run in RUNS):
                raise InputError(f"{out}: holds a run already; continue it with --resume, or name another folder")
        losses = {}
        for run, residual in RUNS.items():
            alike = replace(recipe, network=recipe.network | {"residual": residual})
            train(alike, out / run, resume)
            with together.one_first():  # which is later with its last checkpoint
                complete = is_complete(alike, out / run)
            if not complete:
                say("stopped before the figure was complete; the same command with --resume goes on")
                return None
            if together.first:
                losses[run] = read_losses(out / run / LOSSES, recipe.iterations)
        if not together.first:
            return None
        with write_atomically(figure) as temporary:
            chart(losses, Path(recipe.style).name).save(temporary)
        say(f"drawn: {figure}")
        return losses


def is_complete(recipe: StyleRecipe, out: Path) -> bool:
    """Whether the run in ``out`` came to the end of ``recipe``, rather than being stopped by a signal."""
    return checkpoints.read_training(out / CHECKPOINT)["step"] >= recipe.iterations


def read_losses(path: Path, iterations: int) -> list[float]:
    """The total losses of iterations 1 to ``iterations`` in a run's ``losses.csv``.

    Raises:
        InputError: they are not all there.
    """
    with check_readable(path).open(encoding="utf-8", newline="") as file:
        try:
            rows = [(int(row["iteration"]), float(row["total"])) for row in csv.DictReader(file)]
        except (KeyError, TypeError, ValueError, csv.Error):
            raise InputError(f"{path}: not the losses of a training run, or damaged") from None
    rows = rows[:iterations]
    if [iteration for iteration, _ in rows] != list(range(1, iterations + 1)):
        raise InputError(f"{path}: the losses of iterations 1 to {iterations} are not all there; train anew elsewhere")
    if not all(0 < loss < math.inf for _, loss in rows):
        raise InputError(f"{path}: holds a loss that is not a finite number above 0")
    return [loss for _, loss in rows]


def window(iterations: int) -> int:
    """Over how many iterations losses are averaged: each is of other photos, so they jump up and down."""
    return math.isqrt(iterations)


def chart(losses: Losses, title: str) -> Image.Image:
    """Each run's running mean over its losses."""
    colors = dict(zip(losses, (ORANGE, BLUE)))
    smoothed = {run: running_mean(values, window(len(values))) for run, values in losses.items()}
    raw = [Curve(values, colors[run], opacity=0.25) for run, values in losses.items()]
    means = [Curve(means, colors[run], run, window(len(losses[run]))) for run, means in smoothed.items()]
    return loss_chart([Panel(title, [*raw, *means])])


def table(losses: Losses) -> str:
    """The mean loss at the end of each run, and when the residual one's comes down to the other's."""
    iterations = min(map(len, losses.values()))
    over = window(iterations)
    means = {run: running_mean(values, over) for run, values in losses.items()}
    residual, other = means.values()
    reached = next((i for i, mean in enumerate(residual, over) if mean <= other[-1]), None)
    lines = [f"mean loss of the last {over} of {iterations} iterations:"]
    lines += [f"  {run:12}  {values[-1]:.4g}" for run, values in means.items()]
    lines += [
        "the residual network does not reach the other's"
        if reached is None
        else f"the residual network reaches the other's at iteration {reached}"
    ]
    return "\n".join(lines)
