"""Painting clips, one job after another."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from fastperc.errors import InputError
from fastperc.files import check_writable, make_folder, write_atomically
from fastperc.photos.jobs import Job, say_written
from fastperc.photos.photo import MAX_PIXELS, Photo, write_image
from fastperc.presets import MINIMUM_SIDE
from fastperc.progress import Meter, say
from fastperc.video.animation import Animation
from fastperc.video.animation_writer import AnimationWriter
from fastperc.video.clip import WHOLE, Clip, Frame, Span, Writer
from fastperc.video.film import Film
from fastperc.video.film_writer import Encoding, FilmWriter
from fastperc.video.formats import CONTAINERS, is_film
from fastperc.video.painters import FramePainter, painted
from fastperc.video.threads import Behind, ahead, giving_way

DEPTH = 4  # frames that wait between two threads


class ClipOptions(NamedTuple):
    """What to paint of clips, and how to write it."""

    span: Span = WHOLE
    long_side: int | None = None  # pixels to which frames are resized before they are painted
    smooth: float = 0.0  # see :func:`fastperc.video.painters.painted`
    encoding: Encoding = Encoding()
    frames_folder: Path | None = None  # for the pictures as PNG files


def open_clip(path: Path, span: Span = WHOLE, long_side: int | None = None) -> Clip:
    """Opens a film or an animation to read.

    Args:
        path: the clip.
        span: the part to read.
        long_side: pixels to which the longer side of the frames is resized. Default: no resizing.

    Raises:
        InputError: it cannot be read.
    """
    return Film(path, span, long_side) if is_film(path) else Animation(path, span, long_side)


class FramesWriter:
    """Writes frames as ``000001.png`` and so on into a folder; see :class:`fastperc.video.clip.Writer`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        make_folder(folder)

    def put(self, frame: Frame) -> None:
        """See :class:`fastperc.video.clip.Writer`."""
        self.count += 1
        alpha = None if frame.alpha is None else Image.fromarray(frame.alpha.numpy())
        write_image(self.folder / f"{self.count:06}.png", Photo(Image.fromarray(frame.levels.numpy()), alpha))

    def copy(self, packet: Any) -> None:
        """See :class:`fastperc.video.clip.Writer`."""

    def finish(self) -> None:
        """See :class:`fastperc.video.clip.Writer`."""

    def abandon(self) -> None:
        """See :class:`fastperc.video.clip.Writer`."""


@contextmanager
def clip_writer(target: Path, clip: Clip, size: tuple[int, int], encoding: Encoding) -> Iterator[Writer]:
    """Yields a writer of ``target``, which is written whole or not at all.

    Args:
        target: its suffix names the format.
        clip: what the pictures are made of.
        size: width and height of the pictures.
        encoding: of films.

    Raises:
        InputError: the pictures, the sound or the options do not suit the format.
        OSError: the system refuses to write the file.
    """
    with write_atomically(target) as temporary:
        writer: Writer
        if target.suffix.lower() in CONTAINERS:
            writer = giving_way(lambda: FilmWriter(temporary, target, clip, size, encoding))
        else:
            writer = AnimationWriter(temporary, target, clip, size)
        try:
            yield writer
            writer.finish()
        except BaseException:
            writer.abandon()
            raise


def paint_clip(source: Path, target: Path | None, painter: FramePainter, options: ClipOptions | None = None) -> int:
    """Paints a clip and returns the number of frames. Reading, painting and writing run side by side.

    Args:
        source: a film or an animation.
        target: the clip to write, whole or not at all; None: none, only the pictures in ``options.frames_folder``.
        painter: see :class:`fastperc.video.painters.FramePainter`.
        options: see :class:`ClipOptions`. Default: the whole clip, as it is.

    Raises:
        InputError: the clip cannot be read, or cannot be written as ``target``.
        OSError: the system refuses to write a file.
    """
    options = options or ClipOptions()
    with ExitStack() as stack:
        clip = stack.enter_context(closing(giving_way(lambda: open_clip(source, options.span, options.long_side))))
        size = _size_of_pictures(clip, painter.scale)
        writers: list[Writer] = []
        if target is not None:
            writers.append(stack.enter_context(clip_writer(target, clip, size, options.encoding)))
        if options.frames_folder is not None:
            writers.append(FramesWriter(options.frames_folder))

        def write(item: Any) -> None:
            for writer in writers:
                if isinstance(item, Frame):
                    writer.put(item)
                else:
                    writer.copy(item)

        meter = stack.enter_context(Meter(f"{source.name}, frames", clip.total))
        pictures = stack.enter_context(Behind(write, DEPTH))
        frames = stack.enter_context(closing(ahead(clip.frames(pictures.put), DEPTH)))
        for picture in painted(frames, painter, options.smooth):
            pictures.put(picture)
            if meter.done == meter.total:  # the file did not say how many there are
                meter.expect(meter.done + 1)
            meter.advance()
        meter.expect(meter.done)
        return meter.done


def _size_of_pictures(clip: Clip, scale: int) -> tuple[int, int]:
    width, height = clip.size
    if min(width, height) < MINIMUM_SIDE:
        raise InputError(f"{clip.path}: {width}×{height} is too small; both sides need at least {MINIMUM_SIDE} pixels")
    if width * height * scale**2 > MAX_PIXELS:
        raise InputError(f"{clip.path}: {width * scale}×{height * scale} is larger than {MAX_PIXELS:,} pixels")
    return width * scale, height * scale


def run_clips(jobs: Sequence[Job], painter: FramePainter, options: ClipOptions, films: bool, alone: bool) -> int:
    """Paints clips, says where the results are, and returns how many clips failed.

    Args:
        jobs: pairs of input file and output file.
        painter: see :class:`fastperc.video.painters.FramePainter`.
        options: of several clips, each gets a folder of its own in ``frames_folder``, with the clip's name.
        films: whether clips are written; if not, only the folders of frames are.
        alone: whether the one clip is all there is to do.

    Raises:
        InputError: an output cannot be written, or the only input cannot be used. Of several inputs, those that cannot
            be used are named on stderr and skipped.
    """
    for _, target in jobs if films else ():
        check_writable(target)
    start = time.monotonic()
    written: list[Path] = []
    for source, target in jobs:
        folder = options.frames_folder
        if folder is not None and not alone:
            folder = folder / target.name
        try:
            paint_clip(source, target if films else None, painter, options._replace(frames_folder=folder))
            written.append(target if films or folder is None else folder)
        except InputError as error:
            if alone:
                raise
            named = str(source) in str(error)  # errors of painting say nothing of the file
            say(f"skipped {error}" if named else f"skipped {source}: {error}")
    if written:
        say_written(written, time.monotonic() - start)
    return len(jobs) - len(written)
