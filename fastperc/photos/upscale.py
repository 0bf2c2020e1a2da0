"""Photographs enlarged by a super-resolution network."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from fastperc import reference
from fastperc.engine import freeze
from fastperc.engine.tiling import grid
from fastperc.errors import InputError
from fastperc.models import SRCNN
from fastperc.photos.jobs import Painter, painted
from fastperc.photos.photo import MAX_PIXELS, Photo
from fastperc.presets import MINIMUM_SIDE
from fastperc.progress import Watch, unwatched
from fastperc.types import Window

BAND_SIDE = 256  # pixels of the image: the parts in which SRCNN paints


def upscale(
    painter: Painter, photo: Photo, match: bool = True, tile: int | str = "auto", watch: Watch = unwatched
) -> Photo:
    """``photo``, ``painter.scale`` times as wide and high, with its alpha and metadata. Gray photos stay gray.

    Args:
        painter: a frozen super-resolution network, or what :func:`painter_of` makes of any.
        photo: of any size.
        match: give each channel of the result the histogram of the photo's, as the paper does (section 4.2). An SRCNN's
            is left as it is: its colours are the photo's already.
        tile, watch: as :meth:`fastperc.engine.engine.Engine.tiles` has them.

    Raises:
        FloatingPointError: the network's output is not a number.
        InputError: the result would be too large for a file or for memory.
    """
    width, height = (side * painter.scale for side in photo.rgb.size)
    if width * height > MAX_PIXELS:
        raise InputError(f"{width}×{height} is larger than {MAX_PIXELS:,} pixels")
    gray = photo.is_gray()
    beyond = [max(MINIMUM_SIDE - side, 0) for side in photo.rgb.size]  # what the network wants of a tiny image
    image = torch.from_numpy(np.pad(np.asarray(photo.rgb), ((0, beyond[1]), (0, beyond[0]), (0, 0)), mode="edge"))

    large = torch.empty(image.shape[0] * painter.scale, image.shape[1] * painter.scale, 3, dtype=torch.uint8)
    for rows, columns, part in painted(painter, image, tile, watch):
        part = reference.luma(part).expand(-1, 3, -1, -1) if gray else part
        large[rows, columns] = reference.to_levels(part)[0].permute(1, 2, 0)
    picture = Image.fromarray(large[:height, :width].numpy())
    if match and not isinstance(painter, Bands):
        picture = match_histograms(picture, photo.rgb)
    alpha = photo.alpha and photo.alpha.resize((width, height), Image.Resampling.BICUBIC)
    return Photo(picture, alpha, photo.metadata)


def match_histograms(image: Image.Image, target: Image.Image) -> Image.Image:
    """``image`` with each channel's distribution that of ``target``'s; of any sizes, both RGB in 8 bits.

    A level becomes the one at the same rank in the target.
    """
    tables = []
    for counts, wanted in zip(*(np.reshape(one.histogram(), (3, 256)) for one in (image, target))):
        there = wanted > 0
        tables.append(np.interp(_ranks(counts), _ranks(wanted)[there], np.flatnonzero(there)).round().astype(int))
    return image.point(np.concatenate(tables).tolist())


def _ranks(counts: np.ndarray) -> np.ndarray:
    """Which share of the pixels lies below each level, half of its own counted."""
    return (counts.cumsum() - counts / 2) / counts.sum()


def painter_of(net: nn.Module) -> Painter:
    """``net`` as fast as it paints: frozen, or an :class:`SRCNN` in parts."""
    return Bands(net) if isinstance(net, SRCNN) else freeze(net)


class Bands:
    """An :class:`SRCNN`, which is no chain of this project's layers and is not frozen, part by part."""

    def __init__(self, net: SRCNN) -> None:
        self.net, self.scale = net.eval(), net.scale

    @torch.no_grad()
    def tiles(
        self, image: Tensor, tile: int | str = "auto", dtype: torch.dtype | None = None, watch: Watch = unwatched
    ) -> Iterator[tuple[Window, Tensor]]:
        """As :meth:`fastperc.engine.engine.Engine.tiles`; the image is uint8 [H, W, 3], the parts RGB in 0–1."""
        x = image.permute(2, 0, 1)[None].to(self.net.conv1.weight.device, dtype) / 255
        height, width = x.shape[2:]
        side = max(height, width) if tile == "off" else BAND_SIDE if tile == "auto" else int(tile)
        regions = grid(height, width, side, multiple=1)
        for _, region in zip(watch(range(len(regions)), "painting", len(regions)), regions):
            top, left = max(region.top - self.net.margin, 0), max(region.left - self.net.margin, 0)
            bottom, right = region.top + region.height + self.net.margin, region.left + region.width + self.net.margin
            y = self.net(x[:, :, top:bottom, left:right])
            where = Window(*(self.scale * pixels for pixels in region))
            rows, columns = where.top - self.scale * top, where.left - self.scale * left
            yield where, y[:, :, rows : rows + where.height, columns : columns + where.width]
