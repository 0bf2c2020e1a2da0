"""A sheet of thumbnails: one photo, painted in each of several styles."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

# Chelsea the cat, a photograph by Stéfan van der Walt in the public domain (CC0), from scikit-image's sample data.
SAMPLE = Path(__file__).with_name("sample.jpg")
GAP, BORDER = 12, 16  # pixels between cells and around all
FONT_SHARE, SMALLEST_FONT = 20, 13  # of a cell's longer side, one part is the height of letters; pixels
PAPER, INK = "white", "black"


def labelled_sheet(cells: Iterable[tuple[str, Image.Image]], columns: int | None = None) -> Image.Image:
    """The pictures, which have one size, in rows, each with its label below.

    Args:
        cells: pairs of a label and an 8-bit RGB picture; at least one.
        columns: pictures in a row. Default: so many that the rows are full and the sheet is wider than high.
    """
    labels, pictures = zip(*cells)
    width, height = pictures[0].size
    columns = columns or _columns(len(pictures), width, height)
    size = max(max(width, height) // FONT_SHARE, SMALLEST_FONT)
    font, line = ImageFont.load_default(size), round(1.6 * size)
    rows = math.ceil(len(pictures) / columns)
    shape = (columns * (width + GAP) - GAP, rows * (height + line + GAP) - GAP)
    sheet = Image.new("RGB", (shape[0] + 2 * BORDER, shape[1] + 2 * BORDER), PAPER)
    draw = ImageDraw.Draw(sheet)
    for index, (label, picture) in enumerate(zip(labels, pictures)):
        left = BORDER + index % columns * (width + GAP)
        top = BORDER + index // columns * (height + line + GAP)
        sheet.paste(picture, (left, top))
        draw.text((left + width // 2, top + height + line // 2), label, INK, font, anchor="mm")
    return sheet


def _columns(count: int, width: int, height: int) -> int:
    """How many pictures stand in a row: up to three, or so that the sheet is about half as wide again as high."""
    return count if count <= 3 else min(count, math.ceil((1.5 * count * height / width) ** 0.5 - 0.1))
