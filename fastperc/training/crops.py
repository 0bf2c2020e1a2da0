"""Training crops: which part of which photo an iteration sees is a function of the seed and the position alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastperc.errors import InputError
from fastperc.files import PathLike
from fastperc.photos.photo import find_images
from fastperc.training.packed import PhotoSource, open_or_pack, read_for_crops
from fastperc.training.prefetch import prefetch
from fastperc.training.signals import ignore_signals

Sample = tuple[Tensor, frozenset[str]]  # crops, and the files that could not be read

BATCHES_AHEAD = 4  # cut before they are asked for


class PhotoCrops(Dataset[Sample]):
    """An endless sequence of square crops of the photos in a folder and its subfolders.

    Each epoch shows every photo once, in a new order. A crop is at a random position of the photo, whose shorter side
    is first resized to ``size``, and half of the crops are flipped left to right. Without ``resize`` crops show the
    photo's own pixels; only photos smaller than ``size`` are enlarged. Crop ``i`` depends on ``seed`` and ``i`` alone,
    so a run resumed at crop ``i`` sees what it would have seen, with any number of workers.

    An item is a uint8 tensor [3, size, size] and the files found to be unreadable: the next readable photo of the
    epoch takes the place of one that is not. With ``cache`` photos are decoded and resized once, see
    :func:`~fastperc.training.packed.open_or_pack`; the crops are the same, bit for bit.

    Raises:
        InputError: there is no such folder, there are no images in it, or (from an item) none can be read.
    """

    def __init__(self, folder: PathLike, size: int, seed: int = 0, resize: bool = True, *, cache: bool = False) -> None:
        self.folder, self.size, self.seed, self.resize = folder, size, seed, resize
        self.paths = find_images(folder)
        self.packed = open_or_pack(PhotoSource(folder, self.paths, size, resize)) if cache else None
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

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
        height, width, _ = photo.shape
        rng = np.random.default_rng((self.seed, 1, i))
        left, top = rng.integers(width - self.size + 1), rng.integers(height - self.size + 1)
        out.numpy()[...] = photo[top : top + self.size, left : left + self.size]
        if rng.random() < 0.5:
            out.copy_(out.flip(1))  # torch flips pixels of three bytes ten times as fast as NumPy

    def _photo(self, i: int, unreadable: set[str]) -> np.ndarray[Any, Any]:
        epoch, position = divmod(i, len(self.paths))
        if epoch != self._epoch:
            order = np.random.default_rng((self.seed, 0, epoch)).permutation(len(self.paths))
            self._epoch, self._order = epoch, order
        for k in range(len(self.paths)):
            index = self._order[(position + k) % len(self.paths)]
            path = self.paths[index]
            try:
                return read_for_crops(path, self.size, self.resize) if self.packed is None else self.packed[index]
            except InputError:
                unreadable.add(str(path))
        raise InputError(f"{self.folder}: none of the {len(self.paths)} images can be read")


def batches(
    crops: PhotoCrops, batch: int, start: int, stop: int, workers: int, rank: int = 0, processes: int = 1
) -> Iterator[Sample]:
    """Batches ``start`` to ``stop`` (exclusive) of ``crops``, and the unreadable files of each.

    A batch is uint8 [batch / processes, 3, size, size] in channels-last memory, which is pinned where there is a GPU.
    Each of several ``processes`` gets the part of its ``rank``; the parts together are what one process would get.

    A thread cuts the crops of packed photos; ``workers`` processes decode photos that are not packed (0: this process).
    """
    share = batch // processes
    shares = [range(first, first + share) for first in range(start * batch + rank * share, stop * batch, batch)]
    if crops.packed is not None:
        return prefetch(lambda indices: _pin(crops.__getitems__(indices)), shares, 1, BATCHES_AHEAD)
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
