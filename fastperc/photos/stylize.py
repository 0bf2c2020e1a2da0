"""Paints photos with a style network."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from fastperc import reference
from fastperc.engine.stroke import painted_size
from fastperc.errors import InputError
from fastperc.photos.jobs import Painter, paint_tiles
from fastperc.photos.photo import Photo, read_first_frame
from fastperc.presets import MINIMUM_SIDE
from fastperc.progress import Watch, unwatched


def stylize(
    painter: Painter,
    photo: Photo,
    strength: float = 1.0,
    keep_colors: bool = False,
    tile: int | str = "auto",
    watch: Watch = unwatched,
    stroke: float | str = 1,
) -> Photo:
    """Paints ``photo`` with ``painter``. The picture keeps the photo's size, alpha and metadata.

    Args:
        painter: a frozen style network, or another painter that keeps the size.
        photo: at least 16 pixels a side.
        strength: blends photo and painting: 0 gives the photo, 1 the painting.
        keep_colors: take the lightness from the painting and the colours from the photo.
        tile, watch, stroke: see :meth:`fastperc.engine.engine.Engine.tiles`.

    Raises:
        FloatingPointError: the network's output holds a NaN.
        InputError: not enough memory, or less than 16 pixels a side would be painted.
    """
    painting = stylize_levels(painter, photo.levels(), strength, keep_colors, tile, watch, stroke)
    return Photo(Image.fromarray(painting.numpy()), photo.alpha, photo.metadata)


def stylize_levels(
    painter: Painter,
    levels: Tensor,
    strength: float = 1.0,
    keep_colors: bool = False,
    tile: int | str = "auto",
    watch: Watch = unwatched,
    stroke: float | str = 1,
) -> Tensor:
    """The painting of ``levels``, both uint8 [H, W, 3]. Arguments and errors are those of :func:`stylize`."""
    painting = torch.empty_like(levels)
    for rows, columns, y in paint_tiles(painter, levels, tile, watch, stroke):
        x = levels[rows, columns].permute(2, 0, 1)[None].to(y.device).float() / 255
        if keep_colors:
            y = x + (reference.luma(y) - reference.luma(x))
        painting[rows, columns] = reference.to_levels(torch.lerp(x, y, strength))[0].permute(1, 2, 0)
    return painting


def read_photo(path: Path, size: int | None = None) -> Photo:
    """Reads a photo, and resizes it so that its longer side has ``size`` pixels if ``size`` is given.

    Prints a line if the file holds more frames than the first, which is read.

    Raises:
        InputError: the file cannot be read, or the photo is too small for a network or too large.
    """
    photo = read_first_frame(path)
    try:
        photo = photo if size is None else photo.resized(size)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    width, height = photo.rgb.size
    if min(width, height) < MINIMUM_SIDE:
        raise InputError(f"{path}: {width}×{height} is too small; both sides need at least {MINIMUM_SIDE} pixels")
    return photo


def check_stroke(path: Path, photo: Photo, stroke: float | str) -> None:
    """Checks that ``photo``, which was read from ``path``, can be painted with ``stroke``.

    Raises:
        InputError: less than 16 pixels a side would be painted.
    """
    width, height = photo.rgb.size
    try:
        painted_size(height, width, stroke)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
