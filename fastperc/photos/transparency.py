"""Continues the visible colours of an image into its transparent parts."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from PIL import Image

BAND = 512  # rows of the image that are converted to floats at once, an even number


def fill_transparent(rgb: Image.Image, alpha: Image.Image) -> Image.Image:
    """``rgb`` with the colours of nearby visible pixels where ``alpha`` is 0.

    Colours under an alpha of 0 are arbitrary. A resize or a network mixes them into the visible pixels beside them,
    where they show as a halo. The image is halved again and again, each pixel the mean of the visible pixels that it
    stands for. From the smallest image up, each gives its colours to the pixels of the next larger one that have none.

    Args:
        rgb: mode RGB.
        alpha: mode L, of the same size. An image without any visible pixel is returned as it is.
    """
    opacities = np.flatnonzero(alpha.histogram())
    if opacities[0] > 0 or opacities[-1] == 0:
        return rgb
    # Each level of the pyramid is [H, W, 4]: the colours times the weights, and the weights.
    pyramid = [np.concatenate([_halved(_weighted(*band)) for band in _bands(rgb, alpha)])]
    while (pyramid[-1][..., 3] < 1).any() and pyramid[-1].size > 4:
        pyramid.append(_halved(pyramid[-1]))
    filled = _colors(pyramid.pop())
    while pyramid:
        level = pyramid.pop()
        weights = level[..., 3:].clip(0, 1)  # colours that hardly show count little
        filled = _enlarged(_smoothed(filled), *level.shape[:2]) * (1 - weights) + _colors(level) * weights
    filled = _smoothed(filled).clip(0, 255).round().astype(np.uint8)
    out = Image.new("RGB", rgb.size)
    for row, (colors, opacity) in zip(range(0, rgb.height, BAND), _bands(rgb, alpha)):
        fill = _enlarged(filled[row // 2 :], *opacity.shape)
        out.paste(Image.fromarray(np.where(opacity[..., None] > 0, colors, fill)), (0, row))
    return out


def _bands(rgb: Image.Image, alpha: Image.Image) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Levels and opacity, uint8 [rows, W, 3] and [rows, W], a band of rows at a time."""
    for row in range(0, rgb.height, BAND):
        box = (0, row, rgb.width, min(row + BAND, rgb.height))
        yield np.asarray(rgb.crop(box)), np.asarray(alpha.crop(box))


def _weighted(colors: np.ndarray, opacity: np.ndarray) -> np.ndarray:
    weights = opacity[..., None].astype(np.float32) / 255
    return np.concatenate([colors * weights, weights], axis=2)


def _halved(level: np.ndarray) -> np.ndarray:
    """The sums of 2×2 pixels; an odd side is padded with pixels of weight 0."""
    height, width, _ = level.shape
    padded = np.pad(level, ((0, height % 2), (0, width % 2), (0, 0)))
    rows = padded[::2] + padded[1::2]
    return rows[:, ::2] + rows[:, 1::2]


def _enlarged(colors: np.ndarray, height: int, width: int) -> np.ndarray:
    """Each pixel as 2×2 pixels, cut to ``height`` and ``width``."""
    return colors[: (height + 1) // 2].repeat(2, axis=0)[:height].repeat(2, axis=1)[:, :width]


def _colors(level: np.ndarray) -> np.ndarray:
    return level[..., :3] / np.maximum(level[..., 3:], np.finfo(np.float32).tiny)


def _smoothed(colors: np.ndarray) -> np.ndarray:
    """Means over 3×3 pixels, which hide the squares of enlarged pixels."""
    padded = np.pad(colors, ((1, 1), (1, 1), (0, 0)), mode="edge")
    rows = padded[:-2] + padded[1:-1] + padded[2:]
    return (rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]) / 9
