"""Photographs through a network, from files to files: which become which, and one after another."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from fastperc.errors import InputError
from fastperc.files import check_writable
from fastperc.photos.photo import SUFFIXES, Photo, check_format, find_images, write_image
from fastperc.progress import Watch, say, track, unwatched
from fastperc.types import Window

Job = tuple[Path, Path]  # what is read, and what it becomes


class Painter(Protocol):
    """What paints pictures part by part, as an :class:`~fastperc.engine.engine.Engine` does."""

    scale: int  # pixels of the picture to one of the image

    def tiles(
        self, image: Tensor, tile: int | str = ..., dtype: torch.dtype | None = ..., watch: Watch = ...
    ) -> Iterator[tuple[Window, Tensor]]: ...


def painted(painter: Painter, levels: Tensor, tile: int | str, watch: Watch) -> Iterator[tuple[slice, slice, Tensor]]:
    """The picture of an image, uint8 [H, W, 3], part by part: its rows and columns, and RGB in 0–1 [1, 3, h, w].

    Raises:
        FloatingPointError: the network's output is not a number.
        InputError: there is not enough memory.
    """
    for place, part in painter.tiles(levels, tile, torch.float32, watch):
        if part.isnan().any():
            raise FloatingPointError("the network's output is not a number: it overflows on this photo")
        rows, columns = slice(place.top, place.top + place.height), slice(place.left, place.left + place.width)
        yield rows, columns, part.clamp_(0, 1)


def paint_files(jobs: Sequence[Job], title: str, paint: Callable[[Path, Watch], Photo]) -> int:
    """Paints each input file into its output file; returns how many inputs could not be used.

    One that cannot be used does not keep the others from being done: it is named on stderr. Of a single one the parts
    are watched, of several the files.
    """
    for _, target in jobs:
        check_writable(target)
    failed = 0
    items, watch = (track(jobs, title, len(jobs)), unwatched) if len(jobs) > 1 else (jobs, track)
    for source, target in items:
        try:
            write_image(target, paint(source, watch))
        except InputError as error:
            if len(jobs) == 1:
                raise
            say(f"skipped {error}")
            failed += 1
    return failed


def jobs_of(inputs: Sequence[Path], out: Path | None, label: str) -> list[Job]:
    """Which file each input becomes: (input, output) pairs.

    A single file becomes ``out``, or ``NAME-LABEL.EXT`` beside it. Several, and the images of a folder, keep their
    names in the folder ``out``, or in ``FOLDER-LABEL`` beside a folder.

    Raises:
        InputError: an input that does not exist, an output that would overwrite an input or another output.
    """
    for path in inputs:
        if not os.path.exists(path):
            raise InputError(f"{path}: no such file or folder")
    jobs: list[Job] = []
    if len(inputs) == 1 and not inputs[0].is_dir() and out is not None and not _is_folder(out):
        jobs.append((inputs[0], check_format(out)))
    else:
        if out is not None and not os.path.isdir(out) and (os.path.exists(out) or out.suffix.lower() in SUFFIXES):
            raise InputError(f"{out}: several images need a folder to go to")
        for path in inputs:
            if path.is_dir():
                here = Path(os.path.abspath(path))  # which has a name where path is "."
                folder = out or here.parent / f"{here.name}-{label}"
                jobs += [(image, _writable_name(folder / image.relative_to(path))) for image in _inputs(path, folder)]
            elif out is not None:
                jobs.append((path, _writable_name(out / path.name)))
            else:
                jobs.append((path, _writable_name(path.with_name(f"{path.stem}-{label}{path.suffix}"))))

    jobs = list(dict.fromkeys(jobs))  # a file named twice is done once
    sources = {os.path.realpath(source) for source, _ in jobs}
    taken: dict[str, Path] = {}
    for source, target in jobs:
        key = os.path.realpath(target)
        if key in sources:
            raise InputError(f"{target}: would overwrite an input; name another output")
        if key in taken:
            raise InputError(f"{source} and {taken[key]} would both become {target}; name them one by one")
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
