"""Which files are clips, and which formats clips are written in."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image

from fastperc.errors import InputError
from fastperc.files import PathLike, check_readable
from fastperc.photos.formats import FILM_SUFFIXES, READABLE_SUFFIXES, SUFFIXES, UNREADABLE_SUFFIXES
from fastperc.photos.jobs import Formats

# Suffixes of films that are written, and FFmpeg's names of their formats.
CONTAINERS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska", ".webm": "webm"}
ANY_CODEC = ".mkv"  # holds what the other formats cannot
ANIMATIONS = {".gif": "GIF", ".webp": "WEBP", ".apng": "PNG", ".png": "PNG"}  # suffixes, and Pillow's names
FEW_CORES = 4
TRANSPORT_STREAM = ".ts"  # in a folder it may as well be a program


def import_av() -> Any:
    """The module ``av`` of PyAV, which logs nothing.

    Raises:
        InputError: it is not installed.
    """
    try:
        import av
        import av.logging
    except ImportError:
        raise InputError("films need PyAV; run `pip install 'fastperc[video]'`") from None
    os.environ.setdefault("SVT_LOG", "1")  # libsvtav1 prints by itself; errors alone
    av.logging.set_level(None)  # FFmpeg's errors are raised, and say what its log says
    return av


def codec_threads() -> int:
    """The threads of a decoder or an encoder, 0 for as many as it likes. On few cores, painting needs them all."""
    return 1 if (os.cpu_count() or 1) <= FEW_CORES else 0


def is_film(path: PathLike) -> bool:
    """Whether the name says that ``path`` is a film."""
    return Path(path).suffix.lower() in FILM_SUFFIXES | {TRANSPORT_STREAM}


def is_animation(path: PathLike) -> bool:
    """Whether ``path`` is a GIF, WebP or PNG with more than one frame."""
    if Path(path).suffix.lower() not in ANIMATIONS:
        return False
    try:
        with Image.open(check_readable(path)) as image:  # a pipe would block
            return image.format in ANIMATIONS.values() and bool(getattr(image, "is_animated", False))
    except Exception:  # damaged, or not there: reading it says so
        return False


def is_clip_job(source: PathLike, target: PathLike) -> bool:
    """Whether all frames of ``source`` are painted to ``target``: it is a film, or an animation to a format that plays.

    An animation of another format becomes a ``.png`` of its first frame, as a GIF does in ``-o photo.png``.
    """
    if is_film(source):
        return True
    suffix = Path(target).suffix.lower()
    if suffix == ".png" and ANIMATIONS.get(Path(source).suffix.lower()) != "PNG":
        return False
    return (suffix in ANIMATIONS or suffix in CONTAINERS) and is_animation(source)


class ClipFormats(Formats):
    """The files that are painted where clips are too."""

    def __init__(self) -> None:
        films_are_read = find_spec("av") is not None
        self.readable = READABLE_SUFFIXES | (FILM_SUFFIXES if films_are_read else frozenset())
        self.unreadable = UNREADABLE_SUFFIXES | (frozenset() if films_are_read else FILM_SUFFIXES)
        self.writable = SUFFIXES | CONTAINERS.keys() | ANIMATIONS.keys()
        self.appended = (".png", ANY_CODEC)

    def check(self, source: Path, target: PathLike) -> Path:
        """See :meth:`fastperc.photos.jobs.Formats.check`."""
        target = Path(target)
        if not is_clip_job(source, target):
            return super().check(source, target)
        suffix = target.suffix.lower()
        if suffix not in CONTAINERS and (suffix not in ANIMATIONS or (suffix == ".png" and is_film(source))):
            names = ", ".join([*CONTAINERS, *ANIMATIONS][:-1])
            fault = f"cannot write a clip as {target.suffix!r}" if suffix else "the name has no suffix"
            raise InputError(f"{target}: {fault}; use one of {names}, or --frames-dir for single frames")
        return target

    def output_name(self, source: Path, name: Path) -> Path:
        """See :meth:`fastperc.photos.jobs.Formats.output_name`."""
        if is_film(source):
            return name if name.suffix.lower() in CONTAINERS else name.with_name(f"{name.name}{ANY_CODEC}")
        return name if is_clip_job(source, name) else super().output_name(source, name)
