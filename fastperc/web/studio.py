"""Paints what people upload: one picture at a time, within limits, into a folder that is deleted at the end."""

from __future__ import annotations

import hashlib
import re
import secrets
import shutil
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from fastperc.errors import InputError
from fastperc.files import make_folder
from fastperc.photos.formats import check_size
from fastperc.photos.jobs import Painter, writable_name
from fastperc.photos.photo import Photo, read_first_frame, write_image
from fastperc.photos.sheet import SAMPLE
from fastperc.photos.stylize import read_photo, stylize
from fastperc.photos.upscale import upscale
from fastperc.progress import Watch, unwatched
from fastperc.web.limits import Limits, check_decoded, check_photo, check_pixels

ENGINES = 4  # networks that stay in memory
PREVIEW_SIDE = 1600  # pixels: the longer side of the pictures that the page shows
THUMBNAIL_SIDE = 360  # pixels: the longer side
WORDS = {"--duration": "Length", "--start": "Start"}  # options of the command line, as the page calls them
POLL = 0.1  # seconds between two looks at whether a waiting job was cancelled
UPLOADS = "uploads"  # the part of the temporary folder that the browser may see


class Cancelled(Exception):
    """Somebody pressed *Cancel*, closed the page, or stopped the server."""


class Networks(NamedTuple):
    """The networks that the page offers, and the functions that load them."""

    styles: Mapping[str, Path]  # name → file
    load_style: Callable[[Path], Painter]
    load_enlarger: Callable[[str, int], Painter]  # of a method and a scale
    tile: int | str = "auto"  # see :meth:`fastperc.engine.engine.Engine.tiles`


class StyleOptions(NamedTuple):
    """How to paint; see :func:`fastperc.photos.stylize.stylize`."""

    style: str
    strength: float = 1.0
    long_side: int | None = None  # pixels to which a larger input is resized
    keep_colors: bool = False
    stroke: float | str = "auto"


class Picture(NamedTuple):
    """The result of a photo: the full-size file, and the two small pictures that the page shows."""

    file: Path
    before: Path
    after: Path
    size: tuple[int, int]  # width and height of the full-size picture


class Job:
    """The work of one person in one tab of the page; ``cancel`` ends it at its next tile or frame."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder  # for its results
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """Ends the job, also one that waits for its turn."""
        self._cancelled.set()

    def check(self) -> None:
        """Raises :class:`Cancelled` if the job is."""
        if self._cancelled.is_set():
            raise Cancelled

    def done(self) -> None:
        """Deletes the results of earlier jobs of the same person in the same tab, which are not shown any more."""
        for folder in self.folder.parent.iterdir():
            if folder != self.folder:
                shutil.rmtree(folder, ignore_errors=True)

    def watching(self, watch: Watch) -> Watch:
        """``watch`` that raises :class:`Cancelled` before the next item if the job is."""

        def watch_and_check(items: Iterable[int], title: str, total: int) -> Iterator[int]:
            for item in watch(items, title, total):
                self.check()
                yield item

        return watch_and_check


def reduced(long_side: int | None, size: tuple[int, int]) -> int | None:
    """``long_side`` if the longer side of ``size`` is longer, else None: nothing is enlarged."""
    return None if long_side is None or long_side >= max(size) else long_side


def preview(photo: Photo, long_side: int) -> Photo:
    """``photo`` with a longer side of ``long_side`` pixels, and with no metadata but its colour profile."""
    small = photo if max(photo.rgb.size) == long_side else photo.resized(long_side)
    profile = photo.metadata.get("icc_profile")
    return Photo(small.rgb, small.alpha, {"icc_profile": profile} if profile else {})


class Studio:
    """Paints photos and clips for the page, one at a time.

    Args:
        networks: see :class:`Networks`.
        folder: holds uploads and results; whoever owns it deletes it.
        limits: see :class:`Limits`.
    """

    def __init__(self, networks: Networks, folder: Path, limits: Limits) -> None:
        self.networks, self.folder, self.limits = networks, folder, limits
        self.uploads = folder / UPLOADS
        self._engines: OrderedDict[object, Painter] = OrderedDict()
        self._engines_lock, self._running = threading.Lock(), threading.Lock()
        self._jobs: dict[tuple[str, str], Job] = {}
        self._closed = False

    # Jobs

    def begin(self, person: str, tab: str) -> Job:
        """A new job in place of the last one of this person in this tab, which is cancelled.

        Each has a folder of its own, since browsers keep what they once got under a name.
        """
        if (key := (person, tab)) in self._jobs:
            self._jobs[key].cancel()
        job = self._jobs[key] = Job(self._results(person, tab) / secrets.token_hex(8))
        if self._closed:
            job.cancel()
        return job

    def job(self, person: str, tab: str) -> Job:
        """The job of this person in this tab, a new one if there is none."""
        return self._jobs.get((person, tab)) or self.begin(person, tab)

    def end(self, person: str) -> None:
        """Cancels the jobs of a person who has left, and deletes their results."""
        for key in [key for key in self._jobs if key[0] == person]:
            self._jobs.pop(key).cancel()
        shutil.rmtree(self._results(person), ignore_errors=True)

    def close(self, patience: float = 0.0) -> bool:
        """Cancels all jobs, and those that may still come; returns whether no network runs after ``patience`` seconds.

        A network stops at its next tile or frame. A photo that is painted whole has none.
        """
        self._closed = True
        for job in list(self._jobs.values()):
            job.cancel()
        idle = self._running.acquire(timeout=patience)
        if idle:
            self._running.release()
        return idle

    def _results(self, person: str, tab: str = "") -> Path:
        # The browser chooses the name of a person: it must not become part of a path.
        return self.uploads / "results" / hashlib.sha256(person.encode(errors="replace")).hexdigest()[:32] / tab

    @contextmanager
    def turn(self, job: Job) -> Iterator[None]:
        """Waits until no other job runs a network, and keeps the others waiting while the block runs.

        Raises:
            Cancelled: the job is, before its turn.
        """
        while not self._running.acquire(timeout=POLL):
            job.check()
        try:
            job.check()
            yield
        finally:
            self._running.release()

    # Networks

    def engine(self, style: str) -> Painter:
        """The engine of a style, loaded when it is first used.

        Raises:
            InputError: no style of that name, or its file cannot be read.
        """
        source = self.networks.styles.get(style)
        if source is None:
            raise InputError(f"no style {style!r}; choose one of the pictures")
        return self._engine(source, lambda: self.networks.load_style(source))

    def enlarger(self, method: str, scale: int) -> Painter:
        """The engine that enlarges by ``scale`` with ``method``.

        Raises:
            InputError: no such network ships.
        """
        return self._engine((method, scale), lambda: self.networks.load_enlarger(method, scale))

    def _engine(self, key: object, load: Callable[[], Painter]) -> Painter:
        with self._engines_lock:
            if key not in self._engines:
                self._engines[key] = load()
            self._engines.move_to_end(key)
            while len(self._engines) > ENGINES:
                self._engines.popitem(last=False)
            return self._engines[key]

    def thumbnails(self) -> list[tuple[Image.Image, str]]:
        """A sample photo in every style, with the style's name.

        Raises:
            InputError: the file of a style cannot be read.
        """
        photo = read_photo(SAMPLE, THUMBNAIL_SIDE)
        return [(stylize(self.engine(style), photo).rgb, style) for style in self.networks.styles]

    # Photos

    def paint(self, path: Path, options: StyleOptions, job: Job, watch: Watch = unwatched) -> Picture:
        """Paints a photo as ``fastperc stylize`` does.

        Args:
            path: the upload.
            options: see :class:`StyleOptions`.
            job: gets the result, and may cancel the work.
            watch: shows progress; see :meth:`fastperc.engine.engine.Engine.tiles`.

        Raises:
            InputError: the photo or an option cannot be used, or memory is short.
            FloatingPointError: the network's output holds a NaN.
            Cancelled: the job is.
        """
        target = self.target(path, options.style, job)
        long_side = reduced(options.long_side, check_photo(path, self.limits))
        with self.turn(job):
            photo = check_decoded(path, read_photo(path, long_side), self.limits)
            check_size(target, *photo.rgb.size)
            painting = stylize(
                self.engine(options.style),
                photo,
                options.strength,
                options.keep_colors,
                self.networks.tile,
                job.watching(watch),
                options.stroke,
            )
            return self._written(job, target, photo, painting)

    def enlarge(self, path: Path, method: str, scale: int, job: Job, watch: Watch = unwatched) -> Picture:
        """Enlarges a photo as ``fastperc sr upscale --method METHOD --scale SCALE`` does; see :meth:`paint`."""
        target = self.target(path, f"x{scale}", job)
        width, height = check_photo(path, self.limits)
        enlarged_name = f"{path}, enlarged {scale} times"
        check_pixels(enlarged_name, width * scale, height * scale, self.limits)
        with self.turn(job):
            photo = read_first_frame(path)
            size = photo.rgb.size[0] * scale, photo.rgb.size[1] * scale
            check_pixels(enlarged_name, *size, self.limits)
            check_size(target, *size)
            painter = self.enlarger(method, scale)
            return self._written(
                job, target, photo, upscale(painter, photo, True, self.networks.tile, job.watching(watch))
            )

    def target(self, path: Path, label: str, job: Job) -> Path:
        """The file that the result of the upload ``path`` goes to: ``NAME-LABEL.EXT`` in the job's folder."""
        make_folder(job.folder)
        return job.folder / writable_name(Path(f"{path.stem}-{label}{path.suffix}"))

    def _written(self, job: Job, target: Path, photo: Photo, picture: Photo) -> Picture:
        """Writes the picture and the previews of both. A job has a folder of its own, so no name is taken."""
        job.check()
        write_image(target, picture)
        long_side = min(max(picture.rgb.size), PREVIEW_SIDE)
        before, after = (preview(image, long_side) for image in (photo, picture))
        suffix = ".png" if picture.alpha else ".jpg"
        result = Picture(
            target, target.with_name(f"before{suffix}"), target.with_name(f"after{suffix}"), picture.rgb.size
        )
        write_image(result.before, before)
        write_image(result.after, after)
        job.done()
        return result

    def sentence(self, message: str) -> str:
        """An error's message for the page: without the folders of uploads and results, in the page's words."""
        starts_with_name = message.startswith(str(self.folder))
        message = re.sub(re.escape(str(self.folder)) + r"/(\w+/)*", "", message)
        for option, word in WORDS.items():
            message = message.replace(option, word)
        message = " ".join(message.split())
        if not starts_with_name:
            message = message[:1].upper() + message[1:]
        return message + "." * (not message.endswith((".", "!", "?")))
