"""Charts of losses: curves and bands against the iteration, on a logarithmic scale. Pillow draws them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from PIL import Image, ImageColor, ImageDraw, ImageFont

INK, MUTED, RULE, PAPER = "#1f2430", "#6b7280", "#e3e6eb", "#ffffff"
ORANGE, BLUE, GRAY = "#d9480f", "#1c6fb8", "#8a94a6"
WIDTH, HEIGHT = 460, 300  # of a panel, in units of which an image's pixel is half a one
LEFT, TOP, RIGHT, BOTTOM = 52, 46, 22, 40  # of them, around the axes
DENSITY, SUPERSAMPLED = 2, 2  # pixels of the image to a unit; finer ones to a pixel while drawing
TICKS = 6  # at most, on an axis


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


def loss_chart(panels: Sequence[Panel]) -> Image.Image:
    """``panels`` side by side, all to one scale: iterations to the right, losses upwards, logarithmic.

    Raises:
        ValueError: there is no value, or one is not a finite number above 0.
    """
    drawn = [one for panel in panels for one in panel.drawn]
    values = [value for one in drawn for edge in one.edges for value in edge]
    if not values or not all(0 < value < math.inf for value in values):
        raise ValueError("a logarithmic scale needs finite values above 0, one at least")
    last = max(one.first + len(edge) - 1 for one in drawn for edge in one.edges)
    margin = 1.01 * (max(values) / min(values)) ** 0.04
    axes = _Axes(max(last, 2), min(values) / margin, max(values) * margin, DENSITY * SUPERSAMPLED)

    sheet = Image.new("RGB", (WIDTH * len(panels) * axes.unit, HEIGHT * axes.unit), PAPER)
    for i, panel in enumerate(panels):
        sheet.paste(_draw(panel, axes), (i * WIDTH * axes.unit, 0))
    return sheet.reduce(SUPERSAMPLED)


class _Axes(NamedTuple):
    """Where iterations and losses lie in a panel, in pixels while drawing."""

    last: int  # iteration
    low: float
    high: float
    unit: int  # pixels

    def x(self, iteration: float) -> float:
        return (LEFT + (WIDTH - LEFT - RIGHT) * (iteration - 1) / (self.last - 1)) * self.unit

    def y(self, loss: float) -> float:
        share = math.log(loss / self.low) / math.log(self.high / self.low)
        return (HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * share) * self.unit

    def points(self, first: int, values: Sequence[float]) -> list[tuple[float, float]]:
        return [(self.x(first + i), self.y(value)) for i, value in enumerate(values)]


def _draw(panel: Panel, axes: _Axes) -> Image.Image:
    unit = axes.unit
    image = Image.new("RGB", (WIDTH * unit, HEIGHT * unit), PAPER)
    draw = ImageDraw.Draw(image)
    small, large = (ImageFont.load_default(size * unit) for size in (11, 13))
    left, right, top, bottom = (n * unit for n in (LEFT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM))
    draw.text((left, 8 * unit), panel.title, INK, large)
    draw.text((left, top - 8 * unit), "loss (log scale)", MUTED, small, anchor="ls")
    draw.text((right, bottom + 34 * unit), "iteration", MUTED, small, anchor="rs")
    for loss in loss_ticks(axes.low, axes.high):
        y = axes.y(loss)
        draw.line((left, y, right, y), RULE, unit)
        draw.text((left - 6 * unit, y), f"{loss:g}", MUTED, small, anchor="rm")
    for iteration in iteration_ticks(axes.last):
        x = axes.x(iteration)
        draw.line((x, bottom, x, bottom + 4 * unit), MUTED, unit)
        draw.text((x, bottom + 7 * unit), f"{iteration:,}", MUTED, small, anchor="mt")
    draw.line((left, bottom, right, bottom), MUTED, unit)

    legend = right  # grows to the left
    for one in panel.drawn[::-1]:
        if one.label:
            draw.text((legend, top - 8 * unit), one.label, INK, small, anchor="rs")
            legend -= round(small.getlength(one.label)) + 4 * unit
            half = (4 if isinstance(one, Band) else 1) * unit
            swatch = (legend - 18 * unit, top - 12 * unit - half, legend, top - 12 * unit + half)
            draw.rectangle(swatch, _mixed(one.color, one.opacity))
            legend -= 34 * unit
    for one in panel.drawn:
        # A layer to each, so that what lies beneath shines through.
        layer = Image.new("L", image.size)
        pen, lines = ImageDraw.Draw(layer), [axes.points(one.first, edge) for edge in one.edges]
        if isinstance(one, Band):
            pen.polygon(lines[0] + lines[1][::-1], round(255 * one.opacity))
        else:
            pen.line(lines[0], round(255 * one.opacity), 2 * unit if one.opacity == 1 else unit, joint="curve")
        image.paste(one.color, mask=layer)
    return image


def _mixed(color: str, opacity: float) -> tuple[int, ...]:
    """``color`` as it looks on paper."""
    return tuple(round(p + (c - p) * opacity) for c, p in zip(ImageColor.getrgb(color), ImageColor.getrgb(PAPER)))


def loss_ticks(low: float, high: float) -> list[float]:
    """Round numbers from ``low`` to ``high``, for a logarithmic scale; spaced evenly where it is less than a decade."""
    if high / low < 6:
        step = _round_step((high - low) / TICKS)
        return [float(f"{i * step:.12g}") for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for leading in ((1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
        ticks = [float(f"{digit}e{decade}") for decade in decades for digit in leading]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) <= TICKS:
            break
    return ticks


def iteration_ticks(last: int) -> list[int]:
    """Round numbers up to ``last``."""
    step = max(round(_round_step(last / TICKS)), 1)
    return list(range(step, last + 1, step))


def _round_step(at_least: float) -> float:
    """The smallest 1, 2 or 5 times a power of ten that is not below ``at_least``."""
    power = 10.0 ** math.floor(math.log10(at_least))
    return next(digit * power for digit in (1, 2, 5, 10) if digit * power >= at_least * (1 - 1e-9))
