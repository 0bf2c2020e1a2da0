"""Paints the clips that people upload."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from fastperc.photos.jobs import Painter
from fastperc.video.clip import WHOLE, Span
from fastperc.video.formats import ClipFormats
from fastperc.video.jobs import ClipOptions, open_clip, paint_clip
from fastperc.video.painters import FramePainter, StyleFrames
from fastperc.web.limits import check_length, check_pixels
from fastperc.web.studio import Job, Studio, StyleOptions, reduced


class Part(NamedTuple):
    """Which part of a clip is painted, and how calm the picture is."""

    start: float = 0.0  # seconds
    length: float | None = None  # seconds; None: to the end
    smooth: float = 0.0  # see :func:`fastperc.video.painters.painted`


class WatchedFrames:
    """A :class:`FramePainter` that counts what it paints and stops when its job is cancelled.

    Args:
        painter: paints the frames.
        job: may cancel the work.
        advance: is called with the number of frames that are painted.
    """

    def __init__(self, painter: FramePainter, job: Job, advance: Callable[[int], None]) -> None:
        self.painter, self.scale, self.job, self.advance = painter, painter.scale, job, advance

    def __call__(self, frames: Iterable[Tensor]) -> Iterator[Tensor]:
        """See :class:`fastperc.video.painters.FramePainter`."""
        self.job.check()
        for count, picture in enumerate(self.painter(frames), 1):
            self.job.check()
            yield picture
            self.advance(count)


class Measures(NamedTuple):
    """What a clip says of itself."""

    size: tuple[int, int]  # width and height of its frames in pixels
    frames: int  # 0: unknown
    rate: Fraction  # frames a second

    def seconds(self, frames: int) -> float:
        """How long so many frames last."""
        return float(frames / self.rate)


def measure(path: Path, span: Span = WHOLE) -> Measures:
    """The measures of a clip, with the number of frames in ``span``.

    Raises:
        InputError: it cannot be read.
    """
    with closing(open_clip(path, span)) as clip:
        return Measures(clip.size, clip.total, clip.rate)


def paint_upload(
    studio: Studio, path: Path, options: StyleOptions, part: Part, job: Job, show: Callable[[int, int], None]
) -> Path:
    """Paints a clip as ``fastperc stylize`` does, and returns the file.

    Args:
        studio: whose networks, limits and folder are used.
        path: the upload.
        options: see :class:`StyleOptions`.
        part: see :class:`Part`.
        job: gets the result, and may cancel the work.
        show: is called with the number of painted frames and the number of all.

    Raises:
        InputError: the clip or an option cannot be used.
        Cancelled: the job is; no file is left.
    """
    name = Path(f"{path.stem}-{options.style}{path.suffix}")
    target = studio.target(path, options.style, job).with_name(ClipFormats().output_name(path, name).name)
    span = Span(part.start, part.length)
    clip = measure(path, span)
    seconds = clip.seconds(clip.frames)
    check_length(path, seconds if part.length is None else min(seconds, part.length), studio.limits)
    check_pixels(str(path), *clip.size, studio.limits)

    def advance(count: int) -> None:
        if count > clip.frames:  # the file told too few
            check_length(path, clip.seconds(count), studio.limits)
        show(count, max(count, clip.frames))

    with studio.turn(job):
        show(0, clip.frames)
        painter: Painter = studio.engine(options.style)
        frames = StyleFrames(painter, options.strength, options.keep_colors, studio.networks.tile, options.stroke)
        paint_clip(
            path,
            target,
            WatchedFrames(frames, job, advance),
            ClipOptions(span, reduced(options.long_side, clip.size), part.smooth),
        )
        job.done()
    return target
