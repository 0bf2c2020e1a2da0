"""Draws ``docs/deferred.svg``, the picture of ``docs/how-it-works.md``: ``python docs/site/drawings.py``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

TARGET = Path(__file__).resolve().parents[1] / "deferred.svg"
WIDTH, MARGIN = 960, 24
HEIGHT_OF_BOX, GAP = 46, 24
LINE = 15  # pixels from a line of text to the next
COLOURS = {"kernel": ("#e0e7ff", "#4f46e5"), "map": ("#f1f5f9", "#94a3b8"), "kept": ("#fef3c7", "#d97706")}
WIDTHS = {"kernel": 154, "map": 46, "kept": 46}


class Box(NamedTuple):
    """A kernel, or a map in memory."""

    kind: str  # of COLOURS
    text: str  # its lines, separated by line breaks


class Row(NamedTuple):
    """What runs one after the other, from left to right."""

    title: str
    note: str
    boxes: Sequence[Box]


def kernel(text: str) -> Box:
    """A kernel, which reads the map to its left and writes the one to its right."""
    return Box("kernel", text)


ROWS = [
    Row(
        "Forward, plain PyTorch",
        "y is read twice for its norm; y and r are kept for the backward",
        [
            kernel("convolution"),
            Box("kept", "y"),
            kernel("norm: statistics,\nscale and shift"),
            Box("map", "z"),
            kernel("ReLU"),
            Box("kept", "r"),
            kernel("next convolution"),
        ],
    ),
    Row(
        "Forward, fastperc",
        "the convolution measures y as it stores it; y and five numbers a channel are kept",
        [
            kernel("convolution,\nstatistics of each tile"),
            Box("kept", "y"),
            kernel("scale · y + shift,\nReLU"),
            Box("map", "r"),
            kernel("next convolution"),
        ],
    ),
    Row(
        "Backward, plain PyTorch",
        "the norm reads dz and y twice: for two sums, and for dy",
        [
            kernel("next convolution's\ndata gradient"),
            Box("map", "dr"),
            kernel("ReLU"),
            Box("map", "dz"),
            kernel("norm: sums,\ngradient"),
            Box("map", "dy"),
            kernel("data gradient,\nweight gradient"),
        ],
    ),
    Row(
        "Backward, fastperc",
        "as it stores g, the data gradient applies the ReLU's mask and takes the norm's sums; r comes from y again",
        [
            kernel("next data gradient,\nReLU, sums of each tile"),
            Box("map", "g"),
            kernel("a · g + b + c · y"),
            Box("map", "dy"),
            kernel("data gradient,\nweight gradient"),
        ],
    ),
]


def text(x: float, y: float, words: str, style: str) -> str:
    """A line of text whose baseline begins, or is centred, at x and y."""
    return f'<text x="{x:g}" y="{y:g}" {style}>{escape(words)}</text>'


def drawn(box: Box, x: float, y: float) -> Iterable[str]:
    """A box whose upper left corner is at x and y."""
    fill, stroke = COLOURS[box.kind]
    width = WIDTHS[box.kind]
    radius = 6 if box.kind == "kernel" else HEIGHT_OF_BOX / 2
    yield (
        f'<rect x="{x:g}" y="{y:g}" width="{width}" height="{HEIGHT_OF_BOX}" rx="{radius:g}" fill="{fill}" '
        f'stroke="{stroke}" stroke-width="1.5"/>'
    )
    lines = box.text.split("\n")
    first = y + HEIGHT_OF_BOX / 2 + 4.5 - LINE * (len(lines) - 1) / 2
    for index, line in enumerate(lines):
        style = 'text-anchor="middle"' + ("" if box.kind == "kernel" else ' font-style="italic" font-size="15"')
        yield text(x + width / 2, first + LINE * index, line, style)


def drawn_row(row: Row, y: float) -> Iterable[str]:
    """A row whose title is at y."""
    yield text(MARGIN, y, row.title, 'font-weight="700" font-size="15"')
    yield text(MARGIN, y + 19, row.note, 'fill="#475569"')
    x, top = float(MARGIN), y + 34
    for index, box in enumerate(row.boxes):
        if index:
            middle = top + HEIGHT_OF_BOX / 2
            yield f'<path d="M{x + 3:g} {middle:g}h{GAP - 7}" stroke="#334155" marker-end="url(#tip)"/>'
            x += GAP
        yield from drawn(box, x, top)
        x += WIDTHS[box.kind]


def drawing() -> str:
    """The picture."""
    step = 34 + HEIGHT_OF_BOX + 40
    height = MARGIN + step * len(ROWS) + 36
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'font-family="system-ui, Segoe UI, Helvetica, Arial, sans-serif" font-size="12.5" fill="#0f172a">',
        "<title>A convolution, its batch norm and ReLU in training, in plain PyTorch and in fastperc</title>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0l8 4l-8 4z" fill="#334155"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{height}" rx="10" fill="#ffffff"/>',
    ]
    for index, row in enumerate(ROWS):
        parts += drawn_row(row, MARGIN + 16 + step * index)
    legend = MARGIN + step * len(ROWS) + 14
    x = float(MARGIN)
    for kind, meaning in (
        ("kernel", "a pass of a kernel"),
        ("map", "a map in memory"),
        ("kept", "a map kept for the backward"),
    ):
        fill, stroke = COLOURS[kind]
        parts.append(
            f'<rect x="{x:g}" y="{legend - 11}" width="22" height="14" rx="4" fill="{fill}" stroke="{stroke}"/>'
        )
        parts.append(text(x + 30, legend, meaning, 'fill="#475569"'))
        x += 210
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    TARGET.write_text(drawing(), encoding="utf-8")
