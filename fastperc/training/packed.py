"""Photos decoded once, into a memory-mapped file that later runs use too."""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import shutil
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from fastperc.errors import InputError
from fastperc.files import PathLike, cache_folder
from fastperc.photos.photo import MAX_PIXELS, read_image
from fastperc.progress import say, track

T = TypeVar("T")


R = TypeVar("R")


FORMAT = 1  # of packed photos


PIXELS, INDEX = "photos.u8", "index.json"


LARGEST = 32 << 30  # bytes; more than this, or than half of what is free, is not packed


ABANDONED = 3600.0  # seconds without a photo, after which what was being packed is nobody's


def prepared(path: PathLike, size: int, resize: bool) -> np.ndarray[Any, Any]:
    """The photo that crops of ``size`` are cut from, uint8 [H, W, 3]: its shorter side is ``size`` pixels long or,
    without ``resize``, at least.

    Raises:
        InputError: it cannot be read, or is so long and thin that it would become larger than ``MAX_PIXELS``.
    """
    image = read_image(path, enough=size if resize else None).rgb
    scale = size / min(image.size)
    scale = scale if resize else max(scale, 1.0)
    width, height = (max(size, round(side * scale)) for side in image.size)
    if width * height > MAX_PIXELS:
        raise InputError(f"{path}: {width}×{height} is larger than {MAX_PIXELS:,} pixels")
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


class PackedPhotos:
    """Photos as :func:`prepared` gives them, decoded before and mapped into memory.

    In ``folder`` lie the pixels of all of them, one after the other, and an index of where each begins and its shape.

    Raises:
        OSError, ValueError: there are none, or they are damaged.
    """

    def __init__(self, folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        self.entries: list[tuple[int, int, int] | None] = index["photos"]
        self.pixels = np.memmap(folder / PIXELS, dtype=np.uint8, mode="r")
        if self.pixels.size != index["bytes"]:
            raise ValueError(f"{folder}: cut short")

    def __getitem__(self, i: int) -> np.ndarray[Any, Any]:
        """Photo ``i``, uint8 [H, W, 3]: a view.

        Raises:
            InputError: it could not be read when the photos were packed.
        """
        entry = self.entries[i]
        if entry is None:
            raise InputError("cannot be read")
        offset, height, width = entry
        return self.pixels[offset : offset + height * width * 3].reshape(height, width, 3)


def packed(folder: PathLike, paths: Sequence[Path], size: int, resize: bool) -> PackedPhotos | None:
    """The photos ``paths`` under ``folder`` packed for crops of ``size``: as found in the cache folder, or packed now.

    Those packed before any of the files changed are removed. ``None``, after a line that says why, where they would
    take too much space or cannot be written.
    """
    place = _place(folder, paths, size, resize)
    with suppress(OSError, ValueError, KeyError):
        photos = PackedPhotos(place)
        say(f"photos as packed before: {place} ({_amount(photos.pixels.size)})")
        return photos
    needed = _bytes_needed(paths, size, resize)
    if needed == 0:  # not one is an image
        return None
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        _clear(place)
        allowed = min(LARGEST, shutil.disk_usage(place.parent).free // 2)
        if needed > allowed:
            say(f"photos are decoded as they are needed: packed they would take {_amount(needed)}")
            return None
        photos = _pack(folder, paths, size, resize, place)
    except OSError as error:
        say(f"photos are decoded as they are needed: {place}: cannot be written ({error.strerror or error})")
        return None
    say(f"photos packed: {place} ({_amount(photos.pixels.size)}); --cache off does without")
    return photos


def _pack(folder: PathLike, paths: Sequence[Path], size: int, resize: bool, place: Path) -> PackedPhotos:
    def decode(path: Path) -> np.ndarray[Any, Any] | None:
        try:
            return prepared(path, size, resize)
        except InputError:
            return None

    temporary = place.with_name(f".{place.name}.{secrets.token_hex(4)}")
    temporary.mkdir()
    try:
        entries: list[tuple[int, int, int] | None] = []
        total, workers = 0, _cores()
        with (temporary / PIXELS).open("wb") as file, warnings.catch_warnings():  # threads restore it in any order
            decoded = ahead(decode, paths, workers, 2 * workers)
            for photo in track(decoded, "packing photos", len(paths)):
                entries.append(None if photo is None else (total, *photo.shape[:2]))
                if photo is not None:
                    total += file.write(photo.tobytes())
                elif not total and len(entries) == len(paths):
                    raise InputError(f"{folder}: none of the {len(paths)} images can be read")
            file.flush()
            os.fsync(file.fileno())
        index = dict(format=FORMAT, bytes=total, photos=entries)
        (temporary / INDEX).write_text(json.dumps(index), encoding="utf-8")
        try:
            temporary.rename(place)
        except OSError:
            if not (place / INDEX).is_file():
                raise  # else another run was quicker
        return PackedPhotos(place)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _place(folder: PathLike, paths: Sequence[Path], size: int, resize: bool) -> Path:
    """Where the photos lie packed: a name of two parts, what they are packed for and what the files are."""
    root = Path(os.path.realpath(folder))
    purpose = [FORMAT, str(root), size, resize]
    listing = []
    for path in paths:
        with suppress(OSError):  # one that is gone will be found unreadable
            about = path.stat()
            listing.append([str(path.relative_to(folder)), about.st_size, about.st_mtime_ns])
    return cache_folder() / "photos" / f"{_hash(purpose)}-{_hash(listing)}"


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode("utf-8", "surrogateescape")).hexdigest()[:20]


def _clear(place: Path) -> None:
    """Removes what ``place`` is to replace: the same folder as it was, what is damaged, what a killed run left."""
    purpose = place.name.partition("-")[0]
    for other in place.parent.glob(f"{purpose}-*"):
        shutil.rmtree(other, ignore_errors=True)
    for other in place.parent.glob(".*"):
        with suppress(OSError):
            touched = max(entry.stat().st_mtime for entry in (other, *other.iterdir()))
            if time.time() - touched > ABANDONED:
                shutil.rmtree(other)


def _bytes_needed(paths: Sequence[Path], size: int, resize: bool) -> int:
    """How much the photos will take, by the sizes that their files declare."""

    def area(path: Path) -> float:
        try:
            with Image.open(path) as image:
                width, height = image.size
        except Exception:  # Pillow raises whatever the damage provokes
            return 0.0
        scale = size / min(width, height)
        return width * height * (scale if resize else max(scale, 1.0)) ** 2

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return math.ceil(3 * sum(ahead(area, paths, _cores(), 64)))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _amount(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def ahead(work: Callable[[T], R], items: Iterable[T], threads: int, depth: int) -> Iterator[R]:
    """``work(item)`` for each of ``items`` in their order, up to ``depth`` of them done before they are asked for."""
    remaining = iter(items)
    pool = ThreadPoolExecutor(threads)
    try:
        waiting: deque[Future[R]] = deque(pool.submit(work, item) for item in islice(remaining, depth))
        while waiting:
            result = waiting.popleft().result()
            waiting.extend(pool.submit(work, item) for item in islice(remaining, 1))
            yield result
    finally:
        pool.shutdown(cancel_futures=True)
