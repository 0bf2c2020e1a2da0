"""Charts of losses by iteration, on a logarithmic scale, drawn by matplotlib."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from fastperc.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, MUTED, RULE = "#1f2430", "#6b7280", "#e3e6eb"
ORANGE, BLUE, GRAY = "#d9480f", "#1c6fb8", "#8a94a6"
PANEL_SIZE, DPI = (4.6, 3.0), 200  # inches; pixels per inch
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
        """The one line."""
        return (self.values,)


class Band(NamedTuple):
    """The area between two lines."""

    low: Sequence[float]
    high: Sequence[float]
    color: str
    label: str = ""
    first: int = 1
    opacity: float = 0.4

    @property
    def edges(self) -> tuple[Sequence[float], ...]:
        """The two lines, the lower one first."""
        return self.low, self.high


class Panel(NamedTuple):
    """One pair of axes, and what is drawn on it, the last on top."""

    title: str
    series: Sequence[Curve | Band]


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """The means of ``window`` consecutive values, the first over the first ``window`` values; empty if there are fewer.

    The result has ``window - 1`` entries less than ``values``.
    """
    sums = [0.0, *accumulate(values)]
    return [(after - before) / window for before, after in zip(sums, sums[window:])]


def check_available() -> None:
    """Checks that matplotlib is installed: call it before the work whose result is to be drawn.

    Raises:
        InputError: it is not.
    """
    if find_spec("matplotlib") is None:
        raise InputError("matplotlib is not installed: pip install 'fastperc[figures]'")


def loss_chart(panels: Sequence[Panel]) -> Image.Image:
    """The ``panels`` side by side, on equal axes: iterations to the right, the logarithm of the loss upwards.

    Raises:
        ValueError: there is no value, or one is not a finite number above 0.
        InputError: matplotlib is not installed.
    """
    values = [value for panel in panels for line in panel.series for edge in line.edges for value in edge]
    if not values or not all(0 < value < math.inf for value in values):
        raise ValueError("a logarithmic scale needs at least one value, and finite values above 0")
    check_available()
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure((PANEL_SIZE[0] * len(panels), PANEL_SIZE[1]), DPI, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        all_axes = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
        for axes, panel in zip(all_axes, panels):
            _draw(axes, panel)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about characters of a title that the font lacks
            canvas.draw()
        return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _draw(axes: Axes, panel: Panel) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    title = panel.title.encode("utf-8", "replace").decode()  # the name of a file may be no text
    axes.set_title(title, loc="left", pad=22, parse_math=False)
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
    for line in panel.series:
        iterations = range(line.first, line.first + len(line.edges[0]))
        style: Any = dict(color=line.color, alpha=line.opacity, label=line.label or None)
        if isinstance(line, Band):
            axes.fill_between(iterations, line.low, line.high, linewidth=0, **style)
        else:
            axes.plot(iterations, line.values, linewidth=1.8 if line.opacity == 1 else 0.8, **style)
    if any(line.label for line in panel.series):
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, borderaxespad=0)
