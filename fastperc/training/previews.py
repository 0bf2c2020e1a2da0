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

FOLDER = "previews"
PHOTOS = 4


def preview_photos(crops: PhotoCrops, device: torch.device) -> Tensor:
    """The first ``PHOTOS`` crops, or one of each photo if there are fewer: RGB in 0–1 [N, 3, size, size]."""
    count = min(PHOTOS, len(crops.paths))
    return torch.stack([crops[i][0] for i in range(count)]).to(device) / 255


def write_preview(net: nn.Module, photos: Tensor, degrade: Callable[[Tensor], Tensor] | None, path: Path) -> None:
    """Writes a contact sheet: a row of what ``net`` sees, a row of its output and, if it sees degraded photos, a row of
    the photos. ``photos`` is [N, 3, H, W] in 0–1."""
    net.eval()
    with torch.inference_mode():
        inputs = photos if degrade is None else degrade(photos)
        rows = [F.interpolate(inputs, photos.shape[2:]), net(inputs), *([] if degrade is None else [photos])]
    net.train()
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(path) as temporary:
        contact_sheet(rows).save(temporary)
