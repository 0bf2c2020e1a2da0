"""What ``stylize`` and ``sr upscale`` share about clips: their options, and running jobs of photos and of clips."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from fastperc.cli.options import fraction, natural, path
from fastperc.errors import BAD_INPUT, InputError

if TYPE_CHECKING:
    from fastperc.photos.jobs import Jobs
    from fastperc.photos.photo import Photo
    from fastperc.progress import Watch
    from fastperc.video.painters import FramePainter


LONGEST = 10_000_000  # seconds


def seconds(text: str) -> Fraction:
    """A time: ``90``, ``1:30`` or ``0:01:30.5``, in seconds.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    parts = text.split(":")
    try:
        values = [Fraction(part) for part in parts if "/" not in part]
    except ValueError:
        values = []
    if not 1 <= len(values) <= 3 or len(values) < len(parts) or not all(0 <= value < LONGEST for value in values):
        raise argparse.ArgumentTypeError(f"{text} is not a time like 90, 1:30 or 0:01:30.5")
    return sum((value * 60**power for power, value in enumerate(reversed(values))), Fraction(0))


def positive_seconds(text: str) -> Fraction:
    """A time above 0, as :func:`seconds`."""
    value = seconds(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def add_clips(parser: argparse.ArgumentParser) -> None:
    """Adds the options of clips."""
    clips = parser.add_argument_group("clips")
    clips.add_argument("--start", type=seconds, metavar="T", help="where to begin: 90, 1:30 or 0:01:30.5")
    clips.add_argument(
        "--duration", type=positive_seconds, metavar="T", help="how long a part to paint; default: to the end"
    )
    clips.add_argument(
        "--smooth",
        type=fraction,
        metavar="0..1",
        help="less flicker: keep what was painted where the clip does not change; 0: paint each frame by itself; "
        "default: 0",
    )
    clips.add_argument(
        "--codec",
        metavar="NAME",
        help="PyAV's encoder, such as libx264, libx265 or libsvtav1; default: H.264, in .webm VP9",
    )
    clips.add_argument(
        "--crf", type=natural, metavar="N", help="quality, smaller is better and larger; default: 18 with H.264"
    )
    clips.add_argument(
        "--frames-dir",
        type=path,
        metavar="DIR",
        help="write the pictures as DIR/000001.png and so on; without --out no clip is written",
    )


def run_photos_and_clips(
    arguments: argparse.Namespace, jobs: Jobs, title: str, paint: Callable[[Path, Watch], Photo], frames: FramePainter
) -> int:
    """Runs jobs that :class:`fastperc.video.formats.ClipFormats` allows; returns the exit status.

    Args:
        arguments: of a parser with :func:`add_clips`.
        jobs: of photos and clips.
        title: of the progress bar of photos.
        paint: makes the picture of a photo, see :func:`fastperc.photos.jobs.run_jobs`.
        frames: paints the frames of clips.

    Raises:
        InputError: as :func:`fastperc.photos.jobs.run_jobs` does, or an option for clips is given without a clip.
    """
    from fastperc.photos.jobs import Jobs, run_jobs
    from fastperc.video.formats import is_clip_job

    clips = [job for job in jobs if is_clip_job(*job)]
    photos = Jobs(job for job in jobs if job not in clips)
    photos.left_out = jobs.left_out
    if not clips:
        check_no_clip_options(arguments)
        return BAD_INPUT if run_jobs(photos, title, paint) else 0

    from fastperc.video.clip import Span
    from fastperc.video.film_writer import Encoding
    from fastperc.video.jobs import ClipOptions, run_clips

    options = ClipOptions(
        Span(arguments.start or 0, arguments.duration),
        getattr(arguments, "size", None),
        arguments.smooth or 0.0,
        Encoding(arguments.codec, arguments.crf),
        arguments.frames_dir,
    )
    failed = photos.left_out
    if photos:
        failed = run_jobs(photos, title, paint, alone=False)
    films = arguments.frames_dir is None or arguments.out is not None
    failed += run_clips(clips, frames, options, films, alone=len(jobs) == 1)
    return BAD_INPUT if failed else 0


def check_no_clip_options(arguments: argparse.Namespace) -> None:
    """Raises an InputError if an option for clips is given."""
    for name in ("start", "duration", "smooth", "codec", "crf", "frames_dir"):
        if getattr(arguments, name) is not None:
            raise InputError(f"--{name.replace('_', '-')} is for clips, and there is none among the inputs")
