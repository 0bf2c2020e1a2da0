"""Painters of frames: an iterator of frames in, an iterator of pictures out."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastperc.photos.jobs import Painter
from fastperc.photos.matching import mapped, matching_levels
from fastperc.photos.stylize import stylize_levels
from fastperc.photos.upscale import enlarged, takes_colors
from fastperc.video.clip import Frame
from fastperc.video.smoothing import Smoother

STALE = 1.5  # levels: how far the mean colour of an enlarged frame may be off before its colours are matched anew


class FramePainter(Protocol):
    """Paints frames one after another."""

    scale: int  # size of the pictures relative to the frames

    def __call__(self, frames: Iterable[Tensor]) -> Iterator[Tensor]:
        """The pictures of ``frames``, each uint8 [H, W, 3] on the CPU, in order, in memory of their own.

        It may take a few frames more before it yields the picture of one.
        """
        ...


@dataclass
class StyleFrames:
    """Paints frames as :func:`fastperc.photos.stylize.stylize` paints photos.

    On a GPU, frames are copied to it and back while others are painted.

    Args:
        painter: a frozen style network, or another painter that keeps the size.
        strength, keep_colors, tile, stroke: see :func:`fastperc.photos.stylize.stylize`.
    """

    painter: Painter
    strength: float = 1.0
    keep_colors: bool = False
    tile: int | str = "auto"
    stroke: float | str = 1

    scale = 1

    def __call__(self, frames: Iterable[Tensor]) -> Iterator[Tensor]:
        """See :class:`FramePainter`."""
        stream = getattr(self.painter, "stream", None)
        if stream is not None and self.strength == 1 and not self.keep_colors and self.tile == "auto":
            return stream(frames, self.stroke)
        return (
            stylize_levels(self.painter, x, self.strength, self.keep_colors, self.tile, stroke=self.stroke)
            for x in frames
        )


class EnlargeFrames:
    """Enlarges frames as :func:`fastperc.photos.upscale.upscale` enlarges photos, with colours that do not flicker.

    How levels are matched to the colours of a frame stays the same for the next frames, until the mean of a channel is
    off by more than ``STALE`` levels, as after a cut.

    Args:
        painter: a super-resolution network that is ready to paint.
        match: whether colours are matched.
        tile: see :meth:`fastperc.engine.engine.Engine.tiles`.
    """

    def __init__(self, painter: Painter, match: bool = True, tile: int | str = "auto") -> None:
        self.painter, self.scale, self.tile = painter, painter.scale, tile
        self.match = match and takes_colors(painter)

    def __call__(self, frames: Iterable[Tensor]) -> Iterator[Tensor]:
        """See :class:`FramePainter`."""
        new_levels: np.ndarray | None = None
        for frame in frames:
            small = Image.fromarray(frame.numpy())
            picture = enlarged(self.painter, small, self.tile)
            if self.match:
                if new_levels is None or _is_off(mapped(picture, new_levels), small):
                    new_levels = matching_levels(picture, small)
                picture = mapped(picture, new_levels)
            yield torch.from_numpy(np.array(picture))


def _is_off(picture: Image.Image, small: Image.Image) -> bool:
    means = [np.asarray(image).mean(axis=(0, 1)) for image in (picture, small)]
    return bool(np.abs(means[0] - means[1]).max() > STALE)


def painted(frames: Iterable[Frame], painter: FramePainter, smooth: float = 0.0) -> Iterator[Frame]:
    """``frames`` with what ``painter`` makes of them in the place of their levels, in order, as they come.

    Args:
        frames: of a clip, or of a camera.
        painter: see :class:`FramePainter`.
        smooth: strength of the :class:`Smoother`, from 0, which is none, to 1.
    """
    waiting: deque[Frame] = deque()  # those that the painter has taken and not yet painted
    smoother = Smoother(smooth, painter.scale) if smooth else None

    def levels() -> Iterator[Tensor]:
        for frame in frames:
            waiting.append(frame)
            yield frame.levels

    for picture in painter(levels()):
        frame = waiting.popleft()
        if smoother is not None:
            picture = smoother(frame.levels, picture)
        alpha = frame.alpha
        if alpha is not None and alpha.shape != picture.shape[:2]:
            height, width, _ = picture.shape
            large = Image.fromarray(alpha.numpy()).resize((width, height), Image.Resampling.BICUBIC)
            alpha = torch.from_numpy(np.array(large))
        yield frame._replace(levels=picture, alpha=alpha)
