"""The report's figures, drawn with matplotlib (``pip install fastperc[bench]``).

Each figure is a light card that suits light and dark pages. The same rows give the same file, byte for byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from comparison import PROVIDER_TITLES, Comparison, shape, times, title
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from rows import Row

matplotlib.use("agg")

INK, MUTED, RULE, CARD = "#1f2430", "#6b7280", "#d6dae1", "#fbfbfa"
OURS, PEER = "#d9480f", "#a8b0bd"
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": INK,
    "svg.hashsalt": "fastperc",
}


class Card(NamedTuple):
    """A figure with rounded corners, its only axes, and its size in inches."""

    figure: Figure
    axes: Axes
    width: float
    height: float

    def place_axes(self, left: float, bottom: float, right: float, top: float) -> None:
        """Leaves these margins around the axes, in inches."""
        width, height = self.width - left - right, self.height - bottom - top
        self.axes.set_position((left / self.width, bottom / self.height, width / self.width, height / self.height))

    def write_titles(self, main: str, subtitle: str) -> None:
        """Two lines of text in the upper left corner."""
        self.figure.text(0.3 / self.width, 1 - 0.38 / self.height, main, size=12.5, weight="bold")
        self.figure.text(0.3 / self.width, 1 - 0.62 / self.height, subtitle, color=MUTED)

    def save(self, path: Path) -> None:
        """Writes the figure, without a date."""
        self.figure.savefig(path, metadata={"Date": None, "Creator": None}, transparent=True)


def make_card(width: float, height: float) -> Card:
    """An empty card of ``width`` × ``height`` inches."""
    figure = Figure(figsize=(width, height), facecolor="none")
    radius = 0.1
    figure.patches.append(
        FancyBboxPatch(
            (radius / width, radius / height),
            1 - 2 * radius / width,
            1 - 2 * radius / height,
            boxstyle=f"round,pad=0,rounding_size={radius / height}",
            mutation_aspect=width / height,
            transform=figure.transFigure,
            facecolor=CARD,
            edgecolor=RULE,
            linewidth=0.8,
            zorder=-1,
        )
    )
    axes = figure.add_axes((0, 0, 1, 1), facecolor="none")
    axes.spines[:].set_visible(False)
    return Card(figure, axes, width, height)


def label(comparison: Comparison) -> str:
    """A case in two lines."""
    case = comparison.case
    return f"{title(case)}\n{shape(case)}, {case['dtype']}"


def draw_speedup(comparisons: Sequence[Comparison], path: Path) -> None:
    """Draws how many times faster than eager PyTorch fastperc and its best peer are."""
    with matplotlib.rc_context(STYLE):
        row_height, head, foot = 0.5, 0.85, 0.3
        card = make_card(9, head + foot + row_height * len(comparisons))
        card.place_axes(left=3.5, bottom=foot, right=0.7, top=head)
        axes = card.axes
        centres = np.arange(len(comparisons))[::-1]
        for y, comparison in zip(centres, comparisons):
            draw_bars(axes, y, comparison)
        axes.axvline(1, color=INK, linewidth=0.8)
        axes.text(1, len(comparisons) - 0.42, "eager", ha="center", color=MUTED, size=8.5)
        axes.set(ylim=(-0.5, len(comparisons) - 0.5), yticks=centres, xticks=[])
        axes.set_xlim(0, axes.get_xlim()[1] * 1.08)
        axes.set_yticklabels([label(comparison) for comparison in comparisons], linespacing=1.25)
        axes.tick_params(length=0)
        newest = max((row for c in comparisons for row in c.rows.values()), key=lambda row: row["date"])
        card.write_titles(
            "Times faster than eager PyTorch",
            f"fastperc and the best of its peers · {newest['device']} · torch {newest['torch']}",
        )
        card.save(path)


def draw_bars(axes: Axes, y: float, comparison: Comparison) -> None:
    """fastperc's bar and its best peer's at height ``y``; nothing if one was not measured."""
    eager, best = comparison.eager, comparison.best_peer
    ours = comparison.speedup_over(eager)
    if eager is None or best is None or ours is None:
        return
    peer = eager["median_ms"] / best["median_ms"]
    axes.barh(y + 0.17, ours, 0.3, color=OURS)
    axes.text(ours, y + 0.17, f" {times(ours)}", va="center", weight="bold", color=OURS)
    axes.barh(y - 0.17, peer, 0.3, color=PEER)
    provider = PROVIDER_TITLES[best["provider"]].replace("`", "")
    axes.text(peer, y - 0.17, f" {times(peer)} {provider}", va="center", color=MUTED, size=8.5)


class Point(NamedTuple):
    """A case under the roofline."""

    comparison: Comparison
    ours: Row
    peer: Row

    @property
    def intensity(self) -> float:
        """Floating-point operations per byte."""
        return self.ours["flops"] / self.ours["bytes"]


def draw_roofline(comparisons: Sequence[Comparison], path: Path) -> None:
    """Draws the arithmetic reached over operations per byte, under the ceilings measured on the same device."""
    points = []
    for comparison in comparisons:
        ours, peer = comparison.ours, comparison.best_peer
        if ours and peer and ours["floor_ms"] and peer["floor_ms"]:
            points.append(Point(comparison, ours, peer))
    points.sort(key=lambda point: point.ours["tflop_per_s"])
    with matplotlib.rc_context(STYLE):
        card = make_card(9.6, 1.55 + max(3.4, 0.42 * len(comparisons)))
        card.place_axes(left=0.75, bottom=0.65, right=3.55, top=0.9)
        draw_ceilings(card.axes, points)
        for index, point in enumerate(points):
            draw_point(card.axes, point, label_height=(index + 0.5) / len(points))
        card.axes.grid(color=RULE, linewidth=0.5, alpha=0.6)
        card.axes.tick_params(length=0, which="both")
        card.write_titles("Roofline", f"fastperc (orange) and its best peer (grey) · {comparisons[0].case['device']}")
        card.save(path)


def draw_ceilings(axes: Axes, points: Sequence[Point]) -> None:
    """The memory bandwidth and the arithmetic of each dtype, as the highest that the rows' sessions measured."""
    measured = [row for point in points for row in (point.ours, point.peer)]
    bandwidth = max(row["bandwidth_gb_per_s"] for row in measured)
    rates: dict[str, float] = {}
    for row in measured:
        dtype = "fp32" if row["dtype"] == "fp32" else "bf16"  # autocast multiplies in bf16
        rates[dtype] = max(rates.get(dtype, 0), row["rate_tflop_per_s"])
    intensities = [point.intensity for point in points]
    x = np.geomspace(min(intensities) / 3, max(*intensities, 1e3 * max(rates.values()) / bandwidth) * 3, 300)
    for dtype, rate in rates.items():
        axes.plot(x, np.minimum(rate, x * bandwidth / 1e3), color=INK, linewidth=1.2)
        axes.text(x[-1], rate * 1.1, f"{rate:.3g} TFLOP/s, {dtype}", ha="right", color=MUTED)
    axes.text(x[100] / 1.4, x[100] * bandwidth / 1e3, f"{bandwidth / 1e3:.2g} TB/s", ha="right", color=MUTED)
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="TFLOP/s")


def draw_point(axes: Axes, point: Point, label_height: float) -> None:
    """fastperc and its best peer at one intensity, and a label in the column at the right."""
    x, ours, peer = point.intensity, point.ours["tflop_per_s"], point.peer["tflop_per_s"]
    axes.plot([x, x], [peer, ours], color=PEER, linewidth=1.2, zorder=1)
    axes.scatter(x, peer, s=28, color=PEER, zorder=2)
    axes.scatter(x, ours, s=36, color=OURS, zorder=3)
    axes.annotate(
        f"{label(point.comparison)}: {point.ours['share_of_floor']:.0%} of the roofline",
        (x, ours),
        xytext=(1.03, label_height),
        textcoords="axes fraction",
        arrowprops=dict(arrowstyle="-", color=RULE, linewidth=0.9, shrinkB=4, relpos=(0, 0.5)),
        va="center",
        size=8,
        linespacing=1.3,
    )
