"""Charts of losses: curves and bands against the iteration, on a logarithmic scale; by matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from fastperc.errors import InputError

INK, MUTED, RULE = "#1f2430", "#6b7280", "#e3e6eb"
ORANGE, BLUE, GRAY = "#d9480f", "#1c6fb8", "#8a94a6"
SIZE, DENSITY = (4.6, 3.0), 200  # of a panel, inches; pixels to an inch
STYLE: Any = {
    "font.size": 8.5,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "ytick.minor.left": False,
}


class Curve(NamedTuple):
    """A line through values at consecutive iterations."""

    values: Sequence[float]
    color: str
    label: str = ""  # in the legend
    first: int = 1  # iteration of the first value
    opacity: float = 1.0

    @property
    def edges(self) -> tuple[Sequence[float], ...]:
        return (self.values,)


class Band(NamedTuple):
    """The area between two such lines."""

    low: Sequence[float]
    high: Sequence[float]
    color: str
    label: str = ""
    first: int = 1
    opacity: float = 0.4

    @property
    def edges(self) -> tuple[Sequence[float], ...]:
        return self.low, self.high


class Panel(NamedTuple):
    """What shares a pair of axes, in the order of drawing."""

    title: str
    drawn: Sequence[Curve | Band]


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """The means of ``window`` consecutive values; the first is of the first ``window``."""
    sums = [0.0, *accumulate(values)]
    return [(after - before) / window for before, after in zip(sums, sums[window:])]


def check_available() -> None:
    """Raises an ``InputError`` where matplotlib is not installed: before the work whose result it is to draw."""
    if find_spec("matplotlib") is None:
        raise InputError("matplotlib is not installed: pip install 'fastperc[figures]'")


def loss_chart(panels: Sequence[Panel]) -> Image.Image:
    """``panels`` side by side, all to one scale: iterations to the right, losses upwards, logarithmic.

    Raises:
        ValueError: there is no value, or one is not a finite number above 0.
        InputError: matplotlib is not installed.
    """
    values = [value for panel in panels for one in panel.drawn for edge in one.edges for value in edge]
    if not values or not all(0 < value < math.inf for value in values):
        raise ValueError("a logarithmic scale needs finite values above 0, one at least")
    check_available()
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    with rc_context(STYLE):
        figure = Figure((SIZE[0] * len(panels), SIZE[1]), DENSITY, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        for axes, panel in zip(figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0], panels):
            axes.set_title(panel.title, loc="left", pad=22)
            axes.set_xlabel("iteration", loc="right")
            axes.set_ylabel("loss (log scale)", loc="top")
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.xaxis.set_major_formatter("{x:,.0f}")
            axes.tick_params(labelbottom=True, labelleft=True)
            axes.grid(axis="y", color=RULE)
            axes.set_axisbelow(True)
            axes.spines[["left", "top", "right"]].set_visible(False)
            for one in panel.drawn:
                iterations = range(one.first, one.first + len(one.edges[0]))
                style = dict(color=one.color, alpha=one.opacity, label=one.label or None)
                if isinstance(one, Band):
                    axes.fill_between(iterations, one.low, one.high, linewidth=0, **style)
                else:
                    axes.plot(iterations, one.values, linewidth=1.8 if one.opacity == 1 else 0.8, **style)
            if any(one.label for one in panel.drawn):
                axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, borderaxespad=0)
        canvas.draw()
        return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
