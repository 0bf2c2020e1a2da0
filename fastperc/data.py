"""Photographs for training, in an order that a seed and a position alone decide."""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import shutil
import signal
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
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastperc.dispatch import cache_folder
from fastperc.errors import InputError
from fastperc.files import PathLike
from fastperc.images import MAX_PIXELS, find_images, read_image
from fastperc.progress import say, track

T = TypeVar("T")
R = TypeVar("R")
Sample = tuple[Tensor, frozenset[str]]

BATCHES_AHEAD = 4  # cut before they are asked for
FORMAT = 1  # of packed photos
PIXELS, INDEX = "photos.u8", "index.json"
LARGEST = 32 << 30  # bytes; more than this, or than half of what is free, is not packed
ABANDONED = 3600.0  # seconds without a photo, after which what was being packed is nobody's


class PhotoCrops(Dataset[Sample]):
    """An endless stream of square crops of the photos under a folder, flat or nested.

    Crop ``i`` depends on the seed and ``i`` only: each epoch is a fresh permutation, and each crop (of the photo with
    its shorter side resized to ``size``, at a random position along the other, mirrored half the time) draws from a
    generator of its own. A run that starts again at ``i`` therefore sees what it would have seen, whatever the number
    of workers. Without ``resize`` crops are of the photos' own pixels, from anywhere; only photos too small are made
    larger.

    An item is a uint8 tensor [3, size, size] and the files found unreadable on the way to it: the next file of the
    permutation takes the place of one that cannot be read. With ``cache`` photos are decoded and resized once, into
    a file that later runs use too (:func:`packed`); the crops are the same, bit for bit.

    Raises:
        InputError: no such folder, no images in it, or (from an item) none that can be read.
    """

    def __init__(self, folder: PathLike, size: int, seed: int = 0, resize: bool = True, *, cache: bool = False) -> None:
        self.folder, self.size, self.seed, self.resize = folder, size, seed, resize
        self.paths = find_images(folder)
        self.packed = packed(folder, self.paths, size, resize) if cache else None
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def __getitem__(self, i: int) -> Sample:
        images, unreadable = self.__getitems__([i])
        return images[0], unreadable

    def __getitems__(self, indices: Sequence[int]) -> Sample:
        """The crops ``indices`` at once: uint8 [N, 3, size, size], channels-last, and the files found unreadable."""
        images = torch.empty(len(indices), self.size, self.size, 3, dtype=torch.uint8)
        unreadable: set[str] = set()
        for image, i in zip(images, indices):
            self._crop(image, i, unreadable)
        return images.permute(0, 3, 1, 2), frozenset(unreadable)

    def _crop(self, out: Tensor, i: int, unreadable: set[str]) -> None:
        """Fills ``out`` [size, size, 3] with crop ``i``."""
        photo = self._photo(i, unreadable)
        height, width, _ = photo.shape
        rng = np.random.default_rng((self.seed, 1, i))
        left, top = rng.integers(width - self.size + 1), rng.integers(height - self.size + 1)
        out.numpy()[...] = photo[top : top + self.size, left : left + self.size]
        if rng.random() < 0.5:
            out.copy_(out.flip(1))  # by torch: NumPy takes ten times as long to mirror pixels of three bytes

    def _photo(self, i: int, unreadable: set[str]) -> np.ndarray[Any, Any]:
        epoch, position = divmod(i, len(self.paths))
        if epoch != self._epoch:
            order = np.random.default_rng((self.seed, 0, epoch)).permutation(len(self.paths))
            self._epoch, self._order = epoch, order
        for k in range(len(self.paths)):
            index = self._order[(position + k) % len(self.paths)]
            path = self.paths[index]
            try:
                return prepared(path, self.size, self.resize) if self.packed is None else self.packed[index]
            except InputError:
                unreadable.add(str(path))
        raise InputError(f"{self.folder}: none of the {len(self.paths)} images can be read")


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


def batches(
    crops: PhotoCrops, batch: int, start: int, stop: int, workers: int, rank: int = 0, processes: int = 1
) -> Iterator[Sample]:
    """Batches ``start`` to ``stop`` of ``crops``: uint8 [batch, 3, size, size], channels-last, and the files found
    unreadable; in memory that a GPU copies from, if there is one.

    Of several ``processes`` each gets its share of every batch, [batch / processes, 3, size, size]: together they have
    what one alone would. Packed photos are cut by a thread; others are decoded by ``workers`` processes.
    """
    own = batch // processes
    shares = [range(first, first + own) for first in range(start * batch + rank * own, stop * batch, batch)]
    if crops.packed is not None:
        return ahead(lambda share: _pinned(crops.__getitems__(share)), shares, 1, BATCHES_AHEAD)
    loader: DataLoader[Sample] = DataLoader(
        crops,
        batch_sampler=shares,  # type: ignore[arg-type]
        collate_fn=_as_it_is,
        num_workers=workers,
        worker_init_fn=_ignore_signals,
        pin_memory=torch.cuda.is_available(),
    )
    return iter(loader)


def _pinned(sample: Sample) -> Sample:
    return (sample[0].pin_memory(), sample[1]) if torch.cuda.is_available() else sample


def _as_it_is(sample: Any) -> Any:
    return sample  # a batch already: the loader asks for it by __getitems__


def _ignore_signals(worker: int) -> None:
    # A Ctrl-C or a scheduler's SIGTERM goes to every process of the group; the main one alone decides when to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
