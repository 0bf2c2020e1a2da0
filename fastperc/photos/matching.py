"""Gives an enlarged picture the colours of its photo, as far as that makes the picture better."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageChops

UNSEEN = 1.75  # weight of the changes that do not show when the picture is made small; measured on a mixed set
LEVELS = np.arange(256)


def match_colors(picture: Image.Image, photo: Image.Image, visible: Image.Image | None = None) -> Image.Image:
    """Gives ``picture`` the colours of ``photo``: by histograms where that is sound, else by the means alone.

    Matched histograms suit photographs. In a picture of few levels, such as a logo or text, noise would become whole
    levels. Which of the two pictures is better shows when they are made small again: how far are they from the photo?
    What a match changes between the pixels of one pixel of the photo cannot be checked so, and counts as an error.

    Args:
        picture: 8-bit RGB, whose size is a multiple of the photo's.
        photo: 8-bit RGB.
        visible: the photo's alpha, mode L; pixels with an alpha of 0 do not count. Default: all count.
    """
    if visible is not None and visible.getextrema() == (0, 0):
        return picture
    return mapped(picture, matching_levels(picture, photo, visible))


def matching_levels(picture: Image.Image, photo: Image.Image, visible: Image.Image | None = None) -> np.ndarray:
    """The new level of each level of each channel, int [3, 256], by which :func:`match_colors` changes ``picture``.

    The arguments are those of :func:`match_colors`; some pixels must be visible.
    """
    counts, target_counts = _histogram(picture, visible), _histogram(photo, visible)
    small = picture.resize(photo.size, Image.Resampling.BOX)

    def error(table: np.ndarray) -> float:
        """An estimate of the squared error of the picture that ``table`` gives."""
        matched = mapped(picture, table).resize(photo.size, Image.Resampling.BOX)
        change = _mean_square(counts, table - LEVELS) - _mean_square(_difference(matched, small, visible), LEVELS)
        return _mean_square(_difference(matched, photo, visible), LEVELS) + UNSEEN * change

    tables = _shifts_of_means(counts, target_counts), _maps_of_ranks(counts, target_counts)
    return min(tables, key=error)


def match_histograms(image: Image.Image, target: Image.Image) -> Image.Image:
    """Gives each channel of ``image`` the distribution of levels of that channel of ``target``.

    Maps each level to the target's level of the same rank, with linear interpolation. Both images are 8-bit RGB, of any
    size.
    """
    return mapped(image, _maps_of_ranks(_histogram(image), _histogram(target)))


def _shifts_of_means(counts: np.ndarray, target: np.ndarray) -> np.ndarray:
    """New levels [3, 256]: shifted by whole levels towards the target's mean, never past it.

    The photo's mean is that of the true picture, so that the error can only shrink.
    """
    means, target_means = (channels @ LEVELS / channels.sum(axis=1) for channels in (counts, target))
    return (LEVELS + np.trunc(target_means - means)[:, None]).clip(0, 255).astype(int)


def _maps_of_ranks(counts: np.ndarray, target: np.ndarray) -> np.ndarray:
    """New levels [3, 256]: each is the target's level of the same rank, with linear interpolation."""
    tables = []
    for channel, target_channel in zip(counts, target):
        levels = np.flatnonzero(target_channel)
        tables.append(np.interp(_ranks(channel), _ranks(target_channel)[levels], levels).round())
    return np.stack(tables).astype(int)


def _ranks(counts: np.ndarray) -> np.ndarray:
    """For each level the share of pixels below it, plus half of the pixels at the level itself."""
    return (counts.cumsum() - counts / 2) / counts.sum()


def mapped(image: Image.Image, tables: np.ndarray) -> Image.Image:
    """``image``, 8-bit RGB, with new levels: ``tables``, int [3, 256]."""
    return image.point(tables.ravel().tolist())


def _histogram(image: Image.Image, visible: Image.Image | None = None) -> np.ndarray:
    """How many pixels of each channel have each level: [3, 256]."""
    mask = visible and visible.resize(image.size, Image.Resampling.NEAREST)
    return np.reshape(image.histogram(mask), (3, 256))


def _difference(image: Image.Image, other: Image.Image, visible: Image.Image | None) -> np.ndarray:
    """How often each absolute difference of two images of one size occurs: [3, 256]."""
    return _histogram(ImageChops.difference(image, other), visible)


def _mean_square(counts: np.ndarray, values: np.ndarray) -> float:
    """The mean of squared ``values`` of which there are as many as ``counts`` says."""
    return float((counts * np.square(values)).sum() / counts.sum())
