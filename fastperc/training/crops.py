"""Training crops: which part of which photo an iteration sees is a function of the seed and the position alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastperc.errors import InputError
from fastperc.files import PathLike
from fastperc.photos.photo import find_images
from fastperc.progress import say
from fastperc.training.packed import PhotoSource, open_or_pack, read_for_crops
from fastperc.training.prefetch import prefetch
from fastperc.training.run_folder import is_output
from fastperc.training.signals import ignore_signals

Sample = tuple[Tensor, frozenset[str]]  # crops, and the files that could not be read

BATCHES_AHEAD = 4  # cut before they are asked for
RESIZING_THREADS = 4  # of crops that are resized, which takes 2 ms each


class PhotoCrops(Dataset[Sample]):
    """An endless sequence of square crops of the photos in a folder and its subfolders.

    Each epoch shows every photo once, in a new order. A crop is at a random position of the photo, whose shorter side
    is first resized to ``size``, and half of the crops are flipped left to right. Without ``resize`` crops show the
    photo's own pixels; only photos smaller than ``size`` are enlarged. With a range of pixels as ``resize`` each crop
    is of a photo whose shorter side is resized to a side drawn from it, both ends included. Crop ``i`` depends on
    ``seed`` and ``i`` alone, so a run resumed at crop ``i`` sees what it would have seen, with any number of workers.

    An item is a uint8 tensor [3, size, size] and the files found to be unreadable: the next readable photo of the
    epoch takes the place of one that is not. With ``cache`` photos are decoded and resized once, see
    :func:`~fastperc.training.packed.open_or_pack`; the crops are the same, bit for bit.

    Raises:
        InputError: there is no such folder, there are no images in it, or (from an item) none can be read.
    """

    def __init__(
        self,
        folder: PathLike,
        size: int,
        seed: int = 0,
        resize: bool | tuple[int, int] = True,
        *,
        cache: bool = False,
    ) -> None:
        self.folder, self.size, self.seed, self.resize = folder, size, seed, resize
        self.paths = find_photos(folder)
        # A photo for several scales is kept at the largest, but never enlarged: each crop is resized once more.
        self.source = (
            PhotoSource(folder, self.paths, resize[1], "at most")
            if isinstance(resize, tuple)
            else PhotoSource(folder, self.paths, size, "exactly" if resize else "at least")
        )
        self.packed = open_or_pack(self.source) if cache else None
        self._latest_order = -1, np.empty(0, dtype=np.int64)  # an epoch and its order of photos

    def __getitem__(self, i: int) -> Sample:
        images, unreadable = self.__getitems__([i])
        return images[0], unreadable

    def __getitems__(self, indices: Sequence[int]) -> Sample:
        """The crops ``indices``, uint8 [N, 3, size, size] in channels-last memory, and the unreadable files."""
        images = torch.empty(len(indices), self.size, self.size, 3, dtype=torch.uint8)
        unreadable: set[str] = set()
        for image, i in zip(images, indices):
            self._cut(image, i, unreadable)
        return images.permute(0, 3, 1, 2), frozenset(unreadable)

    def _cut(self, out: Tensor, i: int, unreadable: set[str]) -> None:
        """Fills ``out`` [size, size, 3] with crop ``i``."""
        photo = self._photo(i, unreadable)
        rng = np.random.default_rng((self.seed, 1, i))
        if isinstance(self.resize, tuple):
            out.numpy()[...] = self._resized_window(photo, rng, *self.resize)
        else:
            height, width, _ = photo.shape
            left, top = rng.integers(width - self.size + 1), rng.integers(height - self.size + 1)
            out.numpy()[...] = photo[top : top + self.size, left : left + self.size]
        if rng.random() < 0.5:
            out.copy_(out.flip(1))  # torch flips pixels of three bytes ten times as fast as NumPy

    def _resized_window(
        self, photo: np.ndarray[Any, Any], rng: np.random.Generator, low: int, high: int
    ) -> np.ndarray[Any, Any]:
        """What a crop of ``photo`` would be, [size, size, 3], if its shorter side had ``low`` to ``high`` pixels."""
        height, width, _ = photo.shape
        side = self.size * min(height, width) / rng.integers(low, high + 1)  # of the window, in pixels of `photo`
        left, top = rng.random() * (width - side), rng.random() * (height - side)
        box = (left, top, min(left + side, width), min(top + side, height))
        size = (self.size, self.size)
        return np.asarray(Image.fromarray(photo).resize(size, Image.Resampling.BICUBIC, box))

    def _photo(self, i: int, unreadable: set[str]) -> np.ndarray[Any, Any]:
        epoch, position = divmod(i, len(self.paths))
        known_epoch, order = self._latest_order
        if epoch != known_epoch:
            order = np.random.default_rng((self.seed, 0, epoch)).permutation(len(self.paths))
            self._latest_order = epoch, order  # one assignment: several threads may be here
        for k in range(len(self.paths)):
            index = order[(position + k) % len(self.paths)]
            path = self.paths[index]
            try:
                source = self.source
                return read_for_crops(path, source.size, source.fit) if self.packed is None else self.packed[index]
            except InputError:
                unreadable.add(str(path))
        raise InputError(f"{self.folder}: none of the {len(self.paths)} images can be read")


def find_photos(folder: PathLike) -> list[Path]:
    """The images in ``folder`` and its subfolders without those that runs in them have left, which a line counts.

    Raises:
        InputError: there is no such folder, or there are no photos in it.
    """
    images = find_images(folder)
    photos = [path for path in images if not is_output(path)]
    if len(photos) < len(images):
        say(f"left out {len(images) - len(photos)} images that runs in {folder} have drawn")
    if not photos:
        raise InputError(f"{folder}: no images in this folder, besides those that runs have drawn")
    return photos


def batches(
    crops: PhotoCrops, batch: int, start: int, stop: int, workers: int, rank: int = 0, processes: int = 1
) -> Iterator[Sample]:
    """Batches ``start`` to ``stop`` (exclusive) of ``crops``, and the unreadable files of each.

    A batch is uint8 [batch / processes, 3, size, size] in channels-last memory, which is pinned where there is a GPU.
    Each of several ``processes`` gets the part of its ``rank``; the parts together are what one process would get.

    Threads cut the crops of packed photos; ``workers`` processes decode photos that are not packed (0: this process).
    """
    share = batch // processes
    shares = [range(first, first + share) for first in range(start * batch + rank * share, stop * batch, batch)]
    if crops.packed is not None:
        threads = RESIZING_THREADS if isinstance(crops.resize, tuple) else 1
        return prefetch(lambda indices: _pin(crops.__getitems__(indices)), shares, threads, BATCHES_AHEAD)
    loader: DataLoader[Sample] = DataLoader(
        crops,
        batch_sampler=shares,  # type: ignore[arg-type]
        collate_fn=_unchanged,
        num_workers=workers,
        worker_init_fn=_init_worker,
        pin_memory=torch.cuda.is_available(),
    )
    return iter(loader)


def _pin(sample: Sample) -> Sample:
    return (sample[0].pin_memory(), sample[1]) if torch.cuda.is_available() else sample


def _unchanged(sample: Any) -> Any:
    return sample  # `__getitems__` has made it a batch already


def _init_worker(worker: int) -> None:
    ignore_signals()
