"""Photographs through a style network, from files to files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from fastperc import reference
from fastperc.engine import Engine, Watch, unwatched
from fastperc.errors import InputError
from fastperc.images import SUFFIXES, Photo, check_format, find_images, read_image, write_image
from fastperc.presets import MINIMUM_SIDE
from fastperc.progress import say, track


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
        tile, watch: as :meth:`fastperc.engine.Engine.tiles` has them.

    Raises:
        FloatingPointError: the network's output is not a number.
        InputError: there is not enough memory.
    """
    levels = photo.levels()
    painting = torch.empty_like(levels)
    for place, part in engine.tiles(levels, tile, torch.float32, watch):
        rows, columns = slice(place.top, place.top + place.height), slice(place.left, place.left + place.width)
        x = levels[rows, columns].permute(2, 0, 1)[None].to(part.device).float() / 255
        y = part.clamp_(0, 1)
        if y.isnan().any():
            raise FloatingPointError("the network's output is not a number: it overflows on this photo")
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


def stylize_files(
    engine: Engine,
    jobs: Sequence[tuple[Path, Path]],
    size: int | None = None,
    strength: float = 1.0,
    keep_colors: bool = False,
    tile: int | str = "auto",
) -> int:
    """Stylizes each input file into its output file; returns how many inputs could not be used.

    One that cannot be used does not keep the others from being done: it is named on stderr.
    """
    failed = 0
    items, watch = (track(jobs, "stylizing", len(jobs)), unwatched) if len(jobs) > 1 else (jobs, track)
    for source, target in items:
        try:
            write_image(target, stylize(engine, read_photo(source, size), strength, keep_colors, tile, watch))
        except InputError as error:
            if len(jobs) == 1:
                raise
            say(f"skipped {error}")
            failed += 1
    return failed


def plan(inputs: Sequence[Path], out: Path | None, style: str) -> list[tuple[Path, Path]]:
    """Which file each input becomes: (input, output) pairs.

    A single file becomes ``out``, or ``NAME-STYLE.EXT`` beside it. Several, and the images of a folder, keep their
    names in the folder ``out``, or in ``FOLDER-STYLE`` beside a folder.

    Raises:
        InputError: an input that does not exist, an output that would overwrite an input or another output.
    """
    for path in inputs:
        if not os.path.exists(path):
            raise InputError(f"{path}: no such file or folder")
    jobs: list[tuple[Path, Path]] = []
    if len(inputs) == 1 and not inputs[0].is_dir() and out is not None and not _is_folder(out):
        jobs.append((inputs[0], check_format(out)))
    else:
        if out is not None and not os.path.isdir(out) and (os.path.exists(out) or out.suffix.lower() in SUFFIXES):
            raise InputError(f"{out}: several images need a folder to go to")
        for path in inputs:
            if path.is_dir():
                here = Path(os.path.abspath(path))  # which has a name where path is "."
                folder = out or here.parent / f"{here.name}-{style}"
                jobs += [(image, _writable_name(folder / image.relative_to(path))) for image in _inputs(path, folder)]
            elif out is not None:
                jobs.append((path, _writable_name(out / path.name)))
            else:
                jobs.append((path, _writable_name(path.with_name(f"{path.stem}-{style}{path.suffix}"))))

    jobs = list(dict.fromkeys(jobs))  # a file named twice is painted once
    sources = {os.path.realpath(source) for source, _ in jobs}
    taken: dict[str, Path] = {}
    for source, target in jobs:
        key = os.path.realpath(target)
        if key in sources:
            raise InputError(f"{target}: would overwrite an input; name another output")
        if key in taken:
            raise InputError(f"{source} and {taken[key]} would both become {target}; stylize them one by one")
        taken[key] = source
    return jobs


def _inputs(path: Path, folder: Path) -> list[Path]:
    """The images under ``path``, without those that an earlier run left in ``folder`` within it."""
    images, output = find_images(path), Path(os.path.realpath(folder))
    if Path(os.path.realpath(path)) in output.parents:
        images = [image for image in images if output not in Path(os.path.realpath(image)).parents]
    if not images:
        raise InputError(f"{path}: no images in this folder besides those in {folder}")
    return images


def _is_folder(path: Path) -> bool:
    return os.path.isdir(path) or not (path.suffix or os.path.exists(path))


def _writable_name(path: Path) -> Path:
    return path if path.suffix.lower() in SUFFIXES else path.with_name(f"{path.name}.png")
