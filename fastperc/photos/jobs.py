"""Which output file each input file becomes, and running these jobs one after another."""

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

Job = tuple[Path, Path]  # input file, output file


class Painter(Protocol):
    """Paints an image in tiles, as :class:`fastperc.engine.engine.Engine` does."""

    scale: int  # size of the picture relative to the image

    def tiles(
        self, image: Tensor, tile: int | str = ..., dtype: torch.dtype | None = ..., watch: Watch = ...
    ) -> Iterator[tuple[Window, Tensor]]:
        """Yields the tiles of the picture: where each lies in it, and its pixels [1, 3, h, w]."""
        ...


def paint_tiles(
    painter: Painter, levels: Tensor, tile: int | str, watch: Watch
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Paints an image, uint8 [H, W, 3], and yields tiles: rows, columns, and RGB in 0–1, float32 [1, 3, h, w].

    Raises:
        FloatingPointError: the network's output holds a NaN.
        InputError: not enough memory.
    """
    for window, part in painter.tiles(levels, tile, torch.float32, watch):
        if part.isnan().any():
            raise FloatingPointError("the network's output is not a number: the network overflows on this photo")
        rows, columns = slice(window.top, window.top + window.height), slice(window.left, window.left + window.width)
        yield rows, columns, part.clamp_(0, 1)


def run_jobs(jobs: Sequence[Job], title: str, paint: Callable[[Path, Watch], Photo]) -> int:
    """Paints each input file, writes the pictures and returns how many inputs failed.

    Shows progress: over the tiles of a single file, over the files of several.

    Args:
        jobs: pairs of input file and output file.
        title: of the progress bar.
        paint: makes the picture of an input file, and reports progress to the given ``Watch``.

    Raises:
        InputError: an output cannot be written, or the only input cannot be used. Of several inputs, those that cannot
            be used are named on stderr and skipped.
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


def plan_jobs(inputs: Sequence[Path], out: Path | None, label: str) -> list[Job]:
    """The output file of each input file, as pairs (input, output). Creates nothing.

    A single file becomes ``out``, or ``NAME-LABEL.EXT`` in its own folder. Several files, and the images of a folder,
    keep their names and go to the folder ``out``; without ``out``, the images of FOLDER go to ``FOLDER-LABEL``.

    Args:
        inputs: files and folders.
        out: a file or a folder.
        label: names the outputs when ``out`` is None.

    Raises:
        InputError: an input does not exist, or an output would overwrite an input or another output.
    """
    for path in inputs:
        if not os.path.exists(path):
            raise InputError(f"{path}: no such file or folder")
    if len(inputs) == 1 and not inputs[0].is_dir() and out is not None and not _is_folder(out):
        jobs = [(inputs[0], check_format(out))]
    else:
        if out is not None and not os.path.isdir(out) and (os.path.exists(out) or out.suffix.lower() in SUFFIXES):
            raise InputError(f"{out}: several images need a folder as output")
        jobs = [job for path in inputs for job in _jobs_of_input(path, out, label)]
    jobs = list(dict.fromkeys(jobs))  # a file given twice is painted once
    _check_distinct(jobs)
    return jobs


def _jobs_of_input(path: Path, out: Path | None, label: str) -> list[Job]:
    if path.is_dir():
        absolute = Path(os.path.abspath(path))  # "." has no name of its own
        folder = out or absolute.parent / f"{absolute.name}-{label}"
        return [(image, _writable_name(folder / image.relative_to(path))) for image in _input_images(path, folder)]
    if out is not None:
        return [(path, _writable_name(out / path.name))]
    return [(path, _writable_name(path.with_name(f"{path.stem}-{label}{path.suffix}")))]


def _check_distinct(jobs: Sequence[Job]) -> None:
    """Raises an InputError if an output is an input, or the output of two inputs."""
    sources = {os.path.realpath(source) for source, _ in jobs}
    source_of: dict[str, Path] = {}
    for source, target in jobs:
        key = os.path.realpath(target)
        if key in sources:
            raise InputError(f"{target}: would overwrite an input; name another output")
        if key in source_of:
            raise InputError(f"{source} and {source_of[key]} would both become {target}; run them one at a time")
        source_of[key] = source


def _input_images(path: Path, folder: Path) -> list[Path]:
    """The images under ``path``, without those of an earlier run if the output ``folder`` is inside ``path``."""
    images, output = find_images(path), Path(os.path.realpath(folder))
    if Path(os.path.realpath(path)) in output.parents:
        images = [image for image in images if output not in Path(os.path.realpath(image)).parents]
    if not images:
        raise InputError(f"{path}: no images in this folder besides those in {folder}")
    return images


def _is_folder(path: Path) -> bool:
    """Whether ``path`` is a folder, or would become one because its name has no suffix."""
    return os.path.isdir(path) or not (path.suffix or os.path.exists(path))


def _writable_name(path: Path) -> Path:
    """``path``, with ``.png`` appended if its own format cannot be written."""
    return path if path.suffix.lower() in SUFFIXES else path.with_name(f"{path.name}.png")
