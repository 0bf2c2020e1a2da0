"""Packed photos: a folder of photos decoded and resized once, into a memory-mapped file that later runs use too."""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import shutil
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

from fastperc.errors import InputError
from fastperc.files import PathLike, cache_folder, check_readable, make_folder
from fastperc.photos.photo import MAX_PIXELS, read_image
from fastperc.progress import say, track
from fastperc.training.prefetch import prefetch

FORMAT = 2  # version of the two files
PIXELS_FILE, INDEX_FILE = "photos.u8", "index.json"
MAX_BYTES = 32 << 30  # photos that would take more than this, or more than half of the free disk space, are not packed
ABANDONED_AFTER = 3600.0  # seconds since the last write, after which a temporary folder is a killed run's


class PackedPhotos:
    """Packed photos, mapped into memory.

    The folder holds two files: the pixels of all photos, one after the other, and an index of each photo's offset and
    shape.

    Raises:
        OSError: a file is missing or cannot be read.
        ValueError: a file is damaged.
    """

    def __init__(self, folder: Path) -> None:
        index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
        self.entries: list[tuple[int, int, int] | None] = index["photos"]  # offset, height, width; None: unreadable
        self.pixels = np.memmap(folder / PIXELS_FILE, dtype=np.uint8, mode="r")
        if self.pixels.size != index["bytes"]:
            raise ValueError(f"{folder}: cut short")

    def __getitem__(self, i: int) -> np.ndarray[Any, Any]:
        """Photo ``i``, uint8 [H, W, 3]: a view of the mapped file.

        Raises:
            InputError: the photo could not be read when the folder was packed.
        """
        entry = self.entries[i]
        if entry is None:
            raise InputError("cannot be read")
        offset, height, width = entry
        return self.pixels[offset : offset + height * width * 3].reshape(height, width, 3)


# What a size in pixels means for a photo's shorter side: the photo is resized so that it has this size, is enlarged if
# it has less, or is made smaller if it has more.
Fit = Literal["exactly", "at least", "at most"]


class PhotoSource(NamedTuple):
    """The photos to pack, and what for."""

    folder: PathLike
    paths: Sequence[Path]  # all under `folder`
    size: int  # pixels
    fit: Fit  # what `size` means for each photo's shorter side


def open_or_pack(source: PhotoSource) -> PackedPhotos | None:
    """The packed photos of ``source``: those in the cache folder if there are any, else packed now.

    Packing removes what was packed from the same folder before one of its files changed. Returns ``None``, after a line
    on the terminal that says why, if the photos would take too much space or cannot be written.

    Raises:
        InputError: none of the photos can be read.
    """
    target = _cached_folder(source)
    with suppress(OSError, ValueError, KeyError):
        photos = PackedPhotos(target)
        say(f"using the photos packed in {target} ({_format_bytes(photos.pixels.size)})")
        return photos
    needed = _bytes_needed(source)
    if needed == 0:  # none of the files is an image: reading the first crop says so
        return None
    try:
        make_folder(target.parent)
        _remove_outdated(source, target)
        if needed > min(MAX_BYTES, shutil.disk_usage(target.parent).free // 2):
            say(f"not packing the photos, which would take {_format_bytes(needed)}; decoding them as needed")
            return None
        photos = _pack(source, target)
    except OSError as error:
        reason = error.strerror or error
        say(f"not packing the photos: {target} cannot be written ({reason}); decoding them as needed")
        return None
    say(f"packed the photos into {target} ({_format_bytes(photos.pixels.size)}); --cache off turns this off")
    return photos


def read_for_crops(path: PathLike, size: int, fit: Fit) -> np.ndarray[Any, Any]:
    """The photo that crops are cut from, uint8 [H, W, 3], its shorter side ``fit`` ``size`` pixels.

    Raises:
        InputError: it cannot be read, or is so long and thin that it would have more than ``MAX_PIXELS`` pixels.
    """
    image = read_image(path, enough=None if fit == "at least" else size).visible()
    scale = _scale_of(image, size, fit)
    width, height = (max(1 if fit == "at most" else size, round(side * scale)) for side in image.size)
    if width * height > MAX_PIXELS:
        raise InputError(f"{path}: {width}×{height} is larger than {MAX_PIXELS:,} pixels")
    return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


def _scale_of(image: Image.Image, size: int, fit: Fit) -> float:
    scale = size / min(image.size)
    return {"exactly": scale, "at least": max(scale, 1.0), "at most": min(scale, 1.0)}[fit]


def _pack(source: PhotoSource, target: Path) -> PackedPhotos:
    """Packs into a temporary folder beside ``target``, which is then renamed to ``target``."""
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    temporary.mkdir()
    try:
        _write_files(source, temporary)
        try:
            temporary.rename(target)
        except OSError:
            if not (target / INDEX_FILE).is_file():
                raise  # otherwise another run has packed the same photos in the meantime: use them
        return PackedPhotos(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_files(source: PhotoSource, folder: Path) -> None:
    def decode(path: Path) -> np.ndarray[Any, Any] | None:
        try:
            return read_for_crops(path, source.size, source.fit)
        except InputError:
            return None

    entries: list[tuple[int, int, int] | None] = []
    total, threads = 0, _usable_cores()
    # Reading changes the warning filters; several threads would restore them in the wrong order.
    with (folder / PIXELS_FILE).open("wb") as file, warnings.catch_warnings():
        decoded = prefetch(decode, source.paths, threads, 2 * threads)
        for photo in track(decoded, "packing photos", len(source.paths)):
            entries.append(None if photo is None else (total, *photo.shape[:2]))
            if photo is not None:
                total += file.write(photo.tobytes())
        if not total:
            raise InputError(f"{source.folder}: none of the {len(source.paths)} images can be read")
        file.flush()
        os.fsync(file.fileno())
    index = dict(format=FORMAT, bytes=total, photos=entries)
    (folder / INDEX_FILE).write_text(json.dumps(index), encoding="utf-8")


def _cached_folder(source: PhotoSource) -> Path:
    """Where the packed photos belong. The name is two hashes: of what they are packed for, and of the files' state."""
    files = []
    for path in source.paths:
        with suppress(OSError):  # a file that is gone counts as unreadable later
            status = path.stat()
            files.append([str(path.relative_to(source.folder)), status.st_size, status.st_mtime_ns])
    return cache_folder() / "photos" / f"{_purpose(source, FORMAT)}-{_hash(files)}"


def _purpose(source: PhotoSource, version: int) -> str:
    """A hash of what photos are packed for, in files of ``version``."""
    fit = {"exactly": True, "at least": False}.get(source.fit, source.fit)  # as version 1 has it
    return _hash([version, os.path.realpath(source.folder), source.size, fit])


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode("utf-8", "surrogateescape")).hexdigest()[:20]


def _remove_outdated(source: PhotoSource, target: Path) -> None:
    """Removes what ``target`` replaces: photos packed from older files or in an older version, or damaged.

    Removes the temporary folders that killed runs have left, too.
    """
    for version in range(1, FORMAT + 1):
        for outdated in target.parent.glob(f"{_purpose(source, version)}-*"):
            shutil.rmtree(outdated, ignore_errors=True)
    for temporary in target.parent.glob(".*"):
        with suppress(OSError):
            last_write = max(entry.stat().st_mtime for entry in (temporary, *temporary.iterdir()))
            if time.time() - last_write > ABANDONED_AFTER:
                shutil.rmtree(temporary)


def _bytes_needed(source: PhotoSource) -> int:
    """The size of the packed photos in bytes, estimated from the sizes in the files' headers."""

    def area(path: Path) -> float:
        try:
            with Image.open(check_readable(path)) as image:
                width, height = image.size
                return width * height * _scale_of(image, source.size, source.fit) ** 2
        except Exception:  # Pillow raises whatever the damage provokes
            return 0.0

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return math.ceil(3 * sum(prefetch(area, source.paths, _usable_cores(), 64)))


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _format_bytes(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
