"""Photographs for training, in an order that a seed and a position alone decide."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastperc.errors import InputError
from fastperc.files import PathLike
from fastperc.images import find_images, read_image

Sample = tuple[Tensor, frozenset[str]]


class PhotoCrops(Dataset[Sample]):
    """An endless stream of square crops of the photos under a folder, flat or nested.

    Crop ``i`` depends on the seed and ``i`` only: each epoch is a fresh permutation, and each crop (shorter side
    resized to ``size``, random position along the other, mirrored half the time) draws from a generator of its own.
    A run that starts again at ``i`` therefore sees what it would have seen, whatever the number of workers. Without
    ``resize`` crops are of the photos' own pixels, from anywhere; only photos too small are made larger.

    An item is a uint8 tensor [3, size, size] and the files found unreadable on the way to it: the next file of the
    permutation takes the place of one that cannot be read.

    Raises:
        InputError: no such folder, no images in it, or (from an item) none that can be read.
    """

    def __init__(self, folder: PathLike, size: int, seed: int = 0, resize: bool = True) -> None:
        self.folder, self.size, self.seed, self.resize = folder, size, seed, resize
        self.paths = find_images(folder)

    def __getitem__(self, i: int) -> Sample:
        epoch, position = divmod(i, len(self.paths))
        order = np.random.default_rng((self.seed, 0, epoch)).permutation(len(self.paths))
        unreadable: set[str] = set()
        for index in np.roll(order, -position):
            try:
                return self._crop(self.paths[index], np.random.default_rng((self.seed, 1, i))), frozenset(unreadable)
            except InputError:
                unreadable.add(str(self.paths[index]))
        raise InputError(f"{self.folder}: none of the {len(self.paths)} images can be read")

    def _crop(self, path: PathLike, rng: np.random.Generator) -> Tensor:
        image = read_image(path, enough=self.size if self.resize else None).rgb
        scale = self.size / min(image.size)
        scale = scale if self.resize else max(scale, 1.0)
        width, height = (max(self.size, round(side * scale)) for side in image.size)
        left, top = rng.integers(width - self.size + 1), rng.integers(height - self.size + 1)
        # Resizing the crop's own part of the photo, rather than all of it and cropping then.
        box = (left / scale, top / scale, (left + self.size) / scale, (top + self.size) / scale)
        box = (box[0], box[1], min(box[2], image.width), min(box[3], image.height))
        image = image.resize((self.size, self.size), Image.Resampling.BICUBIC, box=box)
        if rng.random() < 0.5:
            image = ImageOps.mirror(image)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def batches(crops: PhotoCrops, batch: int, start: int, stop: int, workers: int) -> Iterator[Sample]:
    """Batches ``start`` to ``stop`` of ``crops``: uint8 [batch, 3, size, size], and the files found unreadable."""
    loader: DataLoader[Sample] = DataLoader(
        crops,
        batch_size=batch,
        sampler=range(start * batch, stop * batch),
        collate_fn=_collate,
        num_workers=workers,
        worker_init_fn=_ignore_signals,
        pin_memory=torch.cuda.is_available(),
    )
    return iter(loader)


def _collate(samples: list[Sample]) -> Sample:
    images, unreadable = zip(*samples)
    return torch.stack(images), frozenset().union(*unreadable)


def _ignore_signals(worker: int) -> None:
    # A Ctrl-C or a scheduler's SIGTERM goes to every process of the group; the main one alone decides when to stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
