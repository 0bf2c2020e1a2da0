"""Photographs for training, in an order that a seed and a position alone decide."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastperc.errors import InputError
from fastperc.files import PathLike
from fastperc.photos.photo import find_images
from fastperc.training.packed import ahead, packed, prepared

Sample = tuple[Tensor, frozenset[str]]

BATCHES_AHEAD = 4  # cut before they are asked for


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
