"""The figures of the report, by matplotlib (``pip install fastperc[bench]``).

Each is a light card that stands on a light page and on a dark one, drawn the same, byte for byte, from the same rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

matplotlib.use("agg")

if TYPE_CHECKING:
    from report import Comparison

INK, MUTED, RULE, CARD = "#1f2430", "#6b7280", "#d6dae1", "#fbfbfa"
OURS, PEER = "#d9480f", "#a8b0bd"
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": INK,
    "svg.hashsalt": "fastperc",
}


def card(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of so many inches with rounded corners, and its axes without a frame."""
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
    return figure, axes


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None, "Creator": None}, transparent=True)


def name(comparison: Comparison) -> str:
    """A case in two lines."""
    from report import describe, shape

    row = comparison.case
    return f"{describe(row)}\n{shape(row)}, {row['dtype']}"


def draw_speedup(comparisons: Sequence[Comparison], path: Path) -> None:
    """How many times faster than eager PyTorch: fastperc, and the best of its peers."""
    from report import PROVIDERS, times

    with matplotlib.rc_context(STYLE):
        row_height, head, foot = 0.5, 0.85, 0.3
        width, height = 9, head + foot + row_height * len(comparisons)
        figure, axes = card(width, height)
        axes.set_position((3.5 / width, foot / height, (width - 4.2) / width, (height - head - foot) / height))
        centres = np.arange(len(comparisons))[::-1]
        for y, c in zip(centres, comparisons):
            eager, best = c.rows.get("reference"), c.fastest(ours=False)
            ours = c.ratio(eager)
            if eager is None or best is None or ours is None:
                continue
            peer = eager["median_ms"] / best["median_ms"]
            axes.barh(y + 0.17, ours, 0.3, color=OURS)
            axes.text(ours, y + 0.17, f" {times(ours)}", va="center", weight="bold", color=OURS)
            axes.barh(y - 0.17, peer, 0.3, color=PEER)
            label = PROVIDERS[best["provider"]].replace("`", "")
            axes.text(peer, y - 0.17, f" {times(peer)} {label}", va="center", color=MUTED, size=8.5)
        axes.axvline(1, color=INK, linewidth=0.8)
        axes.text(1, len(comparisons) - 0.42, "eager", ha="center", color=MUTED, size=8.5)
        axes.set(ylim=(-0.5, len(comparisons) - 0.5), yticks=centres, xticks=[])
        axes.set_xlim(0, axes.get_xlim()[1] * 1.08)
        axes.set_yticklabels([name(c) for c in comparisons], linespacing=1.25)
        axes.tick_params(length=0)
        figure.text(0.3 / width, 1 - 0.38 / height, "Times faster than eager PyTorch", size=12.5, weight="bold")
        rows = [row for c in comparisons for row in c.rows.values()]
        latest = max(rows, key=lambda row: row["date"])
        under = f"fastperc and the best of its peers · {latest['device']} · torch {latest['torch']}"
        figure.text(0.3 / width, 1 - 0.62 / height, under, color=MUTED)
        save(figure, path)


def draw_roofline(comparisons: Sequence[Comparison], path: Path) -> None:
    """Arithmetic reached over arithmetic per byte, under the roofs that the device itself reached."""
    with matplotlib.rc_context(STYLE):
        width, height = 9.6, 1.55 + max(3.4, 0.42 * len(comparisons))
        figure, axes = card(width, height)
        axes.set_position((0.75 / width, 0.65 / height, (width - 4.3) / width, (height - 1.55) / height))
        pairs = [(c, c.fastest(ours=True), c.fastest(ours=False)) for c in comparisons]
        pairs = [(c, ours, peer) for c, ours, peer in pairs if ours and peer and ours["floor_ms"] and peer["floor_ms"]]
        rows = [row for _, *both in pairs for row in both]
        bandwidth = max(row["bandwidth_gb_per_s"] for row in rows)
        roofs: dict[str, float] = {}
        for row in rows:
            dtype = "fp32" if row["dtype"] == "fp32" else "bf16"  # what autocast multiplies in
            roofs[dtype] = max(roofs.get(dtype, 0), row["rate_tflop_per_s"])
        intensities = [row["flops"] / row["bytes"] for row in rows]
        x = np.geomspace(min(intensities) / 3, max(*intensities, 1e3 * max(roofs.values()) / bandwidth) * 3, 300)
        for dtype, roof in roofs.items():
            axes.plot(x, np.minimum(roof, x * bandwidth / 1e3), color=INK, linewidth=1.2)
            axes.text(x[-1], roof * 1.1, f"{roof:.3g} TFLOP/s, {dtype}", ha="right", color=MUTED)
        axes.text(x[100] / 1.4, x[100] * bandwidth / 1e3, f"{bandwidth / 1e3:.2g} TB/s", ha="right", color=MUTED)
        axes.set(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="TFLOP/s")

        # Labels stand in a column at the right, in the order of their points.
        pairs.sort(key=lambda pair: pair[1]["tflop_per_s"])
        for i, (c, ours, peer) in enumerate(pairs):
            at, reached = ours["flops"] / ours["bytes"], ours["tflop_per_s"]
            axes.plot([at, at], [peer["tflop_per_s"], reached], color=PEER, linewidth=1.2, zorder=1)
            axes.scatter(at, peer["tflop_per_s"], s=28, color=PEER, zorder=2)
            axes.scatter(at, reached, s=36, color=OURS, zorder=3)
            axes.annotate(
                f"{name(c)}: {ours['share_of_floor']:.0%} of its roof",
                (at, reached),
                xytext=(1.03, (i + 0.5) / len(pairs)),
                textcoords="axes fraction",
                arrowprops=dict(arrowstyle="-", color=RULE, linewidth=0.9, shrinkB=4, relpos=(0, 0.5)),
                va="center",
                size=8,
                linespacing=1.3,
            )
        axes.grid(color=RULE, linewidth=0.5, alpha=0.6)
        axes.tick_params(length=0, which="both")
        figure.text(0.3 / width, 1 - 0.38 / height, "Under the roof", size=12.5, weight="bold")
        under = f"fastperc (orange) and its best peer (grey) · {comparisons[0].case['device']}"
        figure.text(0.3 / width, 1 - 0.62 / height, under, color=MUTED)
        save(figure, path)
