"""Which output file each input file becomes, and running these jobs one after another."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fastperc.errors import InputError
from fastperc.files import PathLike, check_overwrites, check_writable, file_key
from fastperc.photos.folders import listed, search_and_say
from fastperc.photos.formats import READABLE_SUFFIXES, SUFFIXES, UNREADABLE_SUFFIXES, check_format
from fastperc.photos.photo import Photo, write_image
from fastperc.progress import Watch, console, say, track, unwatched
from fastperc.types import Window

Job = tuple[Path, Path]  # input file, output file
SEPARATORS = tuple({"/", os.sep, os.altsep or "/"})


class Painter(Protocol):
    """Paints an image in tiles, as :class:`fastperc.engine.engine.Engine` does."""

    scale: int  # size of the picture relative to the image

    def tiles(
        self, image: Tensor, tile: int | str = ..., dtype: torch.dtype | None = ..., watch: Watch = ...
    ) -> Iterator[tuple[Window, Tensor]]:
        """Yields the tiles of the picture: where each lies in it, and its pixels [1, 3, h, w].

        A painter that keeps the size takes the keyword ``stroke`` too, as an engine does. Default: 1.
        """
        ...


def paint_tiles(
    painter: Painter, levels: Tensor, tile: int | str, watch: Watch, stroke: float | str = 1
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Paints an image, uint8 [H, W, 3], and yields tiles: rows, columns, and RGB in 0–1, float32 [1, 3, h, w].

    Raises:
        FloatingPointError: the network's output holds a NaN.
        InputError: not enough memory, or less than 16 pixels a side would be painted.
    """
    keywords: dict[str, Any] = {} if stroke == 1 else {"stroke": stroke}
    for window, part in painter.tiles(levels, tile, torch.float32, watch, **keywords):
        if part.isnan().any():
            raise FloatingPointError("the network's output is not a number: the network overflows on this photo")
        rows, columns = slice(window.top, window.top + window.height), slice(window.left, window.left + window.width)
        yield rows, columns, part.clamp_(0, 1)


class Jobs(list[Job]):
    """Jobs, and how many images of the input folders none of them can read."""

    left_out: int = 0


def run_jobs(jobs: Sequence[Job], title: str, paint: Callable[[Path, Watch], Photo], alone: bool | None = None) -> int:
    """Paints each input file, writes the pictures and returns how many images failed or were left out.

    Shows progress: over the tiles of a single file, over the files of several. Says at the end where the pictures lie.

    Args:
        jobs: pairs of input file and output file.
        title: of the progress bar.
        paint: makes the picture of an input file, and reports progress to the given ``Watch``.
        alone: whether the one job is all there is to do. Default: whether there is one.

    Raises:
        InputError: an output cannot be written, or the only input cannot be used. Of several inputs, those that cannot
            be used are named on stderr and skipped.
    """
    for _, target in jobs:
        check_writable(target)
    alone = len(jobs) == 1 if alone is None else alone
    start = time.monotonic()
    written: list[Path] = []
    items, watch = (track(jobs, title, len(jobs)), unwatched) if len(jobs) > 1 else (jobs, track)
    for source, target in items:
        try:
            write_image(target, paint(source, watch))
            written.append(target)
        except InputError as error:
            if alone:
                raise
            say(f"skipped {error}")
    if written:
        say_written(written, time.monotonic() - start)
    return len(jobs) - len(written) + getattr(jobs, "left_out", 0)


def say_written(files: Sequence[Path], seconds: float) -> None:
    """Prints where pictures lie and how long they took, on a terminal; a run without one needs no line for success."""
    if not console.is_terminal:
        return
    if len(files) == 1:
        say(f"wrote {files[0]} in {seconds:.1f} s")
    else:
        folder = os.path.commonpath([os.path.abspath(file.parent) for file in files])
        say(f"wrote {len(files)} pictures in {seconds:.1f} s, in {os.path.relpath(folder)}")


class Formats:
    """Which files are read and written: photos. :mod:`fastperc.video.formats` adds clips."""

    readable: Collection[str] = READABLE_SUFFIXES  # in folders; a file by itself may have any suffix
    unreadable: Collection[str] = UNREADABLE_SUFFIXES  # files in folders that are named and left out
    writable: Collection[str] = SUFFIXES
    appended: tuple[str, ...] = (".png",)  # suffixes that :meth:`output_name` appends

    def check(self, source: Path, target: PathLike) -> Path:
        """Checks that ``source`` can be painted to the file ``target``, and returns that as a ``Path``.

        Raises:
            InputError: it cannot.
        """
        return check_format(target)

    def output_name(self, source: Path, name: Path) -> Path:
        """``name``, with a suffix appended if what ``source`` becomes cannot be written in the format of ``name``."""
        return writable_name(name)


def plan_jobs(
    inputs: Sequence[Path],
    out: PathLike | None,
    label: str,
    labels: Iterable[str] = (),
    formats: Formats | None = None,
) -> Jobs:
    """The output file of each input file, as pairs (input, output). Creates nothing.

    A single file becomes ``out``, or ``NAME-LABEL.EXT`` in its own folder. Several files, and the images of a folder,
    keep their names and go to the folder ``out``; without ``out``, the images of FOLDER go to ``FOLDER-LABEL``. Earlier
    results of other inputs, which bear such names, are left out, and a line says so.

    Args:
        inputs: files and folders.
        out: a file or a folder; a string that ends in a slash is a folder.
        label: names the outputs when ``out`` is None.
        labels: those of earlier results, besides ``label``.
        formats: which files are read and written. Default: photos.

    Raises:
        InputError: an input does not exist, or an output would overwrite an input or another output.
    """
    for path in inputs:
        if not os.path.exists(path):
            raise InputError(f"{path}: no such file or folder")
    formats = formats or Formats()
    folder = _output_folder(out, len(inputs) > 1 or any(map(os.path.isdir, inputs)), formats)
    jobs = Jobs()
    if out is not None and folder is None:
        jobs.append((inputs[0], formats.check(inputs[0], out)))
    for path in inputs if not jobs else ():
        found, left_out = _jobs_of_input(path, folder, label, formats)
        jobs += found
        jobs.left_out += left_out
    unique = {(file_key(source), target): (source, target) for source, target in jobs}  # a file given twice
    jobs[:] = _without_results(list(unique.values()), {label, *labels}, formats.appended)
    _check_distinct(jobs)
    return jobs


def _output_folder(out: PathLike | None, several: bool, formats: Formats) -> Path | None:
    """``out`` as a folder, or None if it is a file or None. It is one if there are ``several`` images, if it ends in a
    slash, exists as one, or is new and has no suffix.

    Raises:
        InputError: it should be a folder, but is or names a file.
    """
    if out is None:
        return None
    path, slash = Path(out), str(out).endswith(SEPARATORS)
    if os.path.isdir(path):
        return path
    if os.path.exists(path) and (slash or several):
        raise InputError(f"{path}: {'is a file' if slash else 'several images need a folder as output'}")
    if several and not slash and path.suffix.lower() in formats.writable:
        raise InputError(f"{path}: several images need a folder as output")
    return path if several or slash or not (path.suffix or os.path.exists(path)) else None


def _jobs_of_input(path: Path, out: Path | None, label: str, formats: Formats) -> tuple[list[Job], int]:
    """The jobs of an input, and how many images of a folder are left out."""
    if path.is_dir():
        absolute = Path(os.path.abspath(path))  # "." has no name of its own
        folder = out or absolute.parent / f"{absolute.name}-{label}"
        images, left_out = _input_images(path, folder, formats)
        return [(image, formats.output_name(image, folder / image.relative_to(path))) for image in images], left_out
    name = path.with_name(f"{path.stem}-{label}{path.suffix}") if out is None else out / path.name
    return [(path, formats.output_name(path, name))], 0


def _without_results(jobs: Sequence[Job], labels: Collection[str], appended: Sequence[str]) -> list[Job]:
    """The jobs but those of earlier results of other jobs' inputs; prints a line about these."""
    sources = {os.path.abspath(source) for source, _ in jobs}
    results = {source for source, _ in jobs if _is_result(Path(os.path.abspath(source)), sources, labels, appended)}
    if results:
        say(f"skipped {listed(sorted(results), 'earlier result')}")
    return [job for job in jobs if job[0] not in results]


def _is_result(path: Path, sources: Collection[str], labels: Collection[str], appended: Sequence[str]) -> bool:
    """Whether ``path`` is what one of ``sources`` becomes by default: NAME-LABEL.EXT, or a file in FOLDER-LABEL."""
    # Without the suffix too, for inputs whose format cannot be written.
    names = {path.name, *(path.name.removesuffix(suffix) for suffix in appended)}
    for label in labels:
        for name in map(Path, names):
            if name.stem.endswith(f"-{label}"):
                original = name.stem.removesuffix(f"-{label}") + name.suffix
                if str(path.with_name(original)) in sources:
                    return True
        for folder in path.parents:
            if folder.name.endswith(f"-{label}"):
                original_folder = folder.with_name(folder.name.removesuffix(f"-{label}"))
                original_path = original_folder / path.relative_to(folder)
                if any(str(original_path.with_name(name)) in sources for name in names):
                    return True
    return False


def _check_distinct(jobs: Sequence[Job]) -> None:
    """Raises an InputError if an output is an input, or the output of two inputs."""
    check_overwrites((target for _, target in jobs), (source for source, _ in jobs))
    source_of: dict[object, Path] = {}
    for source, target in jobs:
        first = source_of.setdefault(file_key(target), source)
        if first is not source:
            raise InputError(f"{source} and {first} would both become {target}; run them one at a time")


def _input_images(path: Path, folder: Path, formats: Formats) -> tuple[list[Path], int]:
    """The images under ``path``, and how many there cannot be read, about which it prints lines.

    If the output ``folder`` is inside ``path``, the images in it are an earlier run's and left out.
    """
    found, output = search_and_say(path, formats.readable, formats.unreadable), Path(os.path.realpath(folder))
    images = found.images
    if Path(os.path.realpath(path)) in output.parents:
        images = [image for image in images if output not in Path(os.path.realpath(image)).parents]
    if not images:
        raise InputError(f"{path}: no images in this folder besides those in {folder}")
    return images, found.left_out


def writable_name(path: Path) -> Path:
    """``path``, with ``.png`` appended if its own format cannot be written."""
    return path if path.suffix.lower() in SUFFIXES else path.with_name(f"{path.name}.png")
