"""Enlarges photos with a super-resolution network."""

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
from fastperc.photos.jobs import Painter, paint_tiles
from fastperc.photos.matching import match_colors
from fastperc.photos.photo import MAX_PIXELS, Photo
from fastperc.presets import MINIMUM_SIDE
from fastperc.progress import Watch, unwatched
from fastperc.types import Window

SRCNN_TILE_SIDE = 256  # pixels of the image


def upscale(
    painter: Painter, photo: Photo, match: bool = True, tile: int | str = "auto", watch: Watch = unwatched
) -> Photo:
    """Enlarges ``photo`` by ``painter.scale``. The picture keeps its alpha and metadata, and gray photos stay gray.

    Args:
        painter: a frozen super-resolution network, or the result of :func:`make_painter`.
        photo: any size.
        match: give each channel of the picture the histogram of the photo's channel, as the paper does (section 4.2),
            where that makes the picture better, else the mean alone; see :func:`match_colors`. Ignored for an SRCNN,
            which takes its colours from the photo.
        tile, watch: see :meth:`fastperc.engine.engine.Engine.tiles`.

    Raises:
        FloatingPointError: the network's output holds a NaN.
        InputError: the picture would be too large for a file or for memory.
    """
    width, height = (side * painter.scale for side in photo.rgb.size)
    if width * height > MAX_PIXELS:
        raise InputError(f"{width}×{height} is larger than {MAX_PIXELS:,} pixels")
    visible = photo.visible()
    picture = enlarged(painter, visible, tile, watch)
    if match and takes_colors(painter):
        picture = match_colors(picture, visible, photo.alpha)
    alpha = photo.alpha and photo.alpha.resize((width, height), Image.Resampling.BICUBIC)
    return Photo(picture, alpha, photo.metadata)


def takes_colors(painter: Painter) -> bool:
    """Whether the colours of ``painter``'s pictures are matched to the photo's; those of an SRCNN are the photo's."""
    return not isinstance(painter, TiledSRCNN)


def enlarged(painter: Painter, image: Image.Image, tile: int | str = "auto", watch: Watch = unwatched) -> Image.Image:
    """``image`` enlarged by ``painter.scale``, both 8-bit RGB, with the network's own colours; gray stays gray.

    The arguments are those of :func:`upscale`.

    Raises:
        FloatingPointError: the network's output holds a NaN.
        InputError: the picture would be too large for memory.
    """
    levels = np.asarray(image)
    gray = bool((levels == levels[..., :1]).all())
    pad_right, pad_bottom = (max(MINIMUM_SIDE - side, 0) for side in image.size)  # up to the network's minimum
    padded = torch.from_numpy(np.pad(levels, ((0, pad_bottom), (0, pad_right), (0, 0)), mode="edge"))

    large = torch.empty(padded.shape[0] * painter.scale, padded.shape[1] * painter.scale, 3, dtype=torch.uint8)
    for rows, columns, part in paint_tiles(painter, padded, tile, watch):
        part = reference.luma(part).expand(-1, 3, -1, -1) if gray else part
        large[rows, columns] = reference.to_levels(part)[0].permute(1, 2, 0)
    width, height = (side * painter.scale for side in image.size)
    return Image.fromarray(large[:height, :width].numpy())


def make_painter(net: nn.Module) -> Painter:
    """The fastest painter of a super-resolution network: :func:`fastperc.freeze`, or :class:`TiledSRCNN`.

    Raises:
        TypeError: another kind of network.
    """
    return TiledSRCNN(net) if isinstance(net, SRCNN) else freeze(net)


class TiledSRCNN:
    """Runs an :class:`SRCNN` in tiles. ``freeze`` does not take this network, because it uses other layers."""

    def __init__(self, net: SRCNN) -> None:
        self.net, self.scale = net.eval(), net.scale

    @torch.no_grad()
    def tiles(
        self, image: Tensor, tile: int | str = "auto", dtype: torch.dtype | None = None, watch: Watch = unwatched
    ) -> Iterator[tuple[Window, Tensor]]:
        """See :meth:`fastperc.engine.engine.Engine.tiles`. The image is uint8 [H, W, 3], the tiles are RGB in 0–1."""
        x = image.permute(2, 0, 1)[None].to(self.net.conv1.weight.device, dtype) / 255
        height, width = x.shape[2:]
        side = max(height, width) if tile == "off" else SRCNN_TILE_SIDE if tile == "auto" else int(tile)
        regions = grid(height, width, side, multiple=1)
        for _, region in zip(watch(range(len(regions)), "painting", len(regions)), regions):
            top, left = max(region.top - self.net.margin, 0), max(region.left - self.net.margin, 0)
            bottom, right = region.top + region.height + self.net.margin, region.left + region.width + self.net.margin
            y = self.net(x[:, :, top:bottom, left:right])
            window = Window(*(self.scale * pixels for pixels in region))
            row, column = window.top - self.scale * top, window.left - self.scale * left
            yield window, y[:, :, row : row + window.height, column : column + window.width]
