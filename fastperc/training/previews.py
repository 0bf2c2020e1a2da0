"""Previews of a run: a contact sheet of a few photos and what the network makes of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastperc.files import write_atomically
from fastperc.photos.photo import contact_sheet
from fastperc.training.crops import PhotoCrops

PHOTOS = 4


def preview_photos(crops: PhotoCrops, device: torch.device) -> Tensor:
    """The first ``PHOTOS`` crops, or one of each photo if there are fewer: RGB in 0–1 [N, 3, size, size]."""
    count = min(PHOTOS, len(crops.paths))
    return torch.stack([crops[i][0] for i in range(count)]).to(device) / 255


def write_preview(net: nn.Module, photos: Tensor, degrade: Callable[[Tensor], Tensor] | None, path: Path) -> Tensor:
    """Writes a contact sheet: a row of what ``net`` sees, a row of its output and, if it sees degraded photos, a row of
    the photos. ``photos`` is [N, 3, H, W] in 0–1. Returns the output."""
    net.eval()
    with torch.inference_mode():
        inputs = photos if degrade is None else degrade(photos)
        rows = [F.interpolate(inputs, photos.shape[2:]), net(inputs), *([] if degrade is None else [photos])]
    net.train()
    with write_atomically(path) as temporary:
        contact_sheet(rows).save(temporary)
    return rows[1]


def paints_all_alike(photos: Tensor, pictures: Tensor) -> bool:
    """Whether ``pictures`` are all the same and ``photos`` are not, both [N, 3, H, W] in 0–1: the network is dead.

    A single picture counts as the same if it has one colour. Differences below a level of 8 bits do not count.
    """
    return _alike(pictures) and not _alike(photos)


def _alike(images: Tensor) -> bool:
    mean = images.mean(dim=0 if len(images) > 1 else (2, 3), keepdim=True)
    return bool((images - mean).abs().max() < 1 / 255)
