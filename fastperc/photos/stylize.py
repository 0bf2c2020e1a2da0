"""Photographs painted by a style network."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from fastperc import reference
from fastperc.engine import Engine
from fastperc.errors import InputError
from fastperc.photos.jobs import painted
from fastperc.photos.photo import Photo, read_image
from fastperc.presets import MINIMUM_SIDE
from fastperc.progress import Watch, unwatched


def stylize(
    engine: Engine,
    photo: Photo,
    strength: float = 1.0,
    keep_colors: bool = False,
    tile: int | str = "auto",
    watch: Watch = unwatched,
) -> Photo:
    """``photo`` as ``engine`` paints it, with its alpha and metadata.

    Args:
        engine: a frozen style network.
        photo: any size from 16 pixels a side up.
        strength: from 0, the photo, to 1, the painting; a blend of the two between.
        keep_colors: take only the lightness of the painting and keep the colours of the photo.
        tile, watch: as :meth:`fastperc.engine.engine.Engine.tiles` has them.

    Raises:
        FloatingPointError: the network's output is not a number.
        InputError: there is not enough memory.
    """
    levels = photo.levels()
    painting = torch.empty_like(levels)
    for rows, columns, y in painted(engine, levels, tile, watch):
        x = levels[rows, columns].permute(2, 0, 1)[None].to(y.device).float() / 255
        if keep_colors:
            y = x + (reference.luma(y) - reference.luma(x))
        painting[rows, columns] = reference.to_levels(torch.lerp(x, y, strength))[0].permute(1, 2, 0)
    return Photo(Image.fromarray(painting.numpy()), photo.alpha, photo.metadata)


def read_photo(path: Path, size: int | None = None) -> Photo:
    """The photo in the file ``path``, its longer side resized to ``size`` if given.

    Raises:
        InputError: it cannot be read, or has too few pixels for a network, or too many.
    """
    photo = read_image(path)
    try:
        photo = photo if size is None else photo.resized(size)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    width, height = photo.rgb.size
    if min(width, height) < MINIMUM_SIDE:
        raise InputError(f"{path}: {width}×{height} is too small, both sides need {MINIMUM_SIDE} pixels")
    return photo
