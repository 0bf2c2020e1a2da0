"""Finds the images in a folder, and names what it leaves out."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from fastperc.errors import InputError
from fastperc.files import PathLike
from fastperc.photos.formats import READABLE_SUFFIXES, UNREADABLE_SUFFIXES, advice
from fastperc.progress import say

NAMED = 3  # how many of the files that are left out are named; the others are counted


class FolderImages(NamedTuple):
    """What a search of a folder finds, each list sorted by path."""

    images: list[Path]
    unreadable: list[Path]  # images in formats that cannot be read here, by their suffix
    closed: list[tuple[Path, str]]  # subfolders that cannot be listed, and the system's reason

    @property
    def left_out(self) -> int:
        """How many files and subfolders are left out."""
        return len(self.unreadable) + len(self.closed)

    def lines(self) -> Iterator[str]:
        """A line about the files that are left out and one about the subfolders, if there are any."""
        if self.unreadable:
            suffixes: dict[str, list[str]] = {}  # by what to do about them
            for suffix in dict.fromkeys(path.suffix.lower() for path in self.unreadable):
                suffixes.setdefault(advice(suffix), []).append(suffix)
            hints = "; ".join(f"{', '.join(group)}: {what}" for what, group in suffixes.items())
            yield f"skipped {listed(self.unreadable, 'file')}; {hints}"
        if self.closed:
            reasons = dict.fromkeys(reason for _, reason in self.closed)
            yield f"skipped {listed([path for path, _ in self.closed], 'folder')}: {'; '.join(reasons)}"


def listed(paths: Sequence[Path], noun: str) -> str:
    """How many paths there are, and the first few of them."""
    names = ", ".join(map(str, paths[:NAMED])) + f" and {len(paths) - NAMED} more" * (len(paths) > NAMED)
    return f"{len(paths)} {noun}{'s' * (len(paths) > 1)} ({names})"


def search(
    folder: PathLike,
    readable: Collection[str] = READABLE_SUFFIXES,
    unreadable: Collection[str] = UNREADABLE_SUFFIXES,
) -> FolderImages:
    """Searches ``folder`` for images, at any depth.

    Leaves out hidden files and folders. Follows links, but visits each folder once.

    Args:
        folder: where to search.
        readable, unreadable: the suffixes of files that can be read, and of files that cannot but are named.

    Raises:
        InputError: the folder does not exist, or cannot be listed.
    """
    folder = Path(folder)
    if not os.path.isdir(folder):
        raise InputError(f"{folder}: no such folder")
    files: list[Path] = []
    closed: list[tuple[Path, str]] = []
    visited: set[str] = set()

    def note(error: OSError) -> None:
        closed.append((Path(error.filename), error.strerror or str(error)))

    for directory, folders, names in os.walk(folder, onerror=note, followlinks=True):
        real = os.path.realpath(directory)
        if real in visited:  # links may form a circle
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files += (Path(directory, name) for name in names if not name.startswith("."))
    if closed and closed[0][0] == folder:
        raise InputError(f"{folder}: cannot be read ({closed[0][1]})")
    images, left_out = (
        sorted(path for path in files if path.suffix.lower() in suffixes) for suffixes in (readable, unreadable)
    )
    return FolderImages(images, left_out, sorted(closed))


def search_and_say(
    folder: PathLike,
    readable: Collection[str] = READABLE_SUFFIXES,
    unreadable: Collection[str] = UNREADABLE_SUFFIXES,
) -> FolderImages:
    """Searches ``folder`` for images as :func:`search` does, and prints lines about what is left out.

    Raises:
        InputError: the folder does not exist, cannot be listed or holds no image that can be read.
    """
    found = search(folder, readable, unreadable)
    lines = list(found.lines())
    if not found.images:
        raise InputError(f"{folder}: no images in this folder{''.join(f'; {line}' for line in lines)}")
    for line in lines:
        say(line)
    return found


def find_images(folder: PathLike) -> list[Path]:
    """The images under ``folder`` that :func:`search_and_say` finds, sorted by path."""
    return search_and_say(folder).images
