"""Gives an enlarged picture the colours of its photo, as far as that makes the picture better."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageChops

UNSEEN = 1.75  # weight of the changes that do not show when the picture is made small; measured on a mixed set


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
    shifted = _match_means(picture, photo, visible)
    matched = match_histograms(picture, photo, visible)
    return min(shifted, matched, key=lambda candidate: _error(candidate, picture, photo, visible))


def _error(candidate: Image.Image, picture: Image.Image, photo: Image.Image, visible: Image.Image | None) -> float:
    """An estimate of the squared error of ``candidate``, which was made from ``picture``."""
    small, small_picture = (image.resize(photo.size, Image.Resampling.BOX) for image in (candidate, picture))
    change = _difference(candidate, picture, visible) - _difference(small, small_picture, visible)
    return _difference(small, photo, visible) + UNSEEN * change


def _difference(image: Image.Image, other: Image.Image, visible: Image.Image | None) -> float:
    """The mean squared difference of two images of one size."""
    counts = np.reshape(ImageChops.difference(image, other).histogram(_mask(visible, image)), (3, 256)).sum(axis=0)
    return float(counts @ np.arange(256) ** 2 / counts.sum())


def _mask(visible: Image.Image | None, image: Image.Image) -> Image.Image | None:
    return visible and visible.resize(image.size, Image.Resampling.NEAREST)


def _match_means(picture: Image.Image, photo: Image.Image, visible: Image.Image | None) -> Image.Image:
    """Shifts each channel by whole levels towards the photo's mean, never past it: the error can only shrink."""
    means, target = (_means(image, _mask(visible, image)) for image in (picture, photo))
    tables = np.arange(256) + np.trunc(target - means)[:, None]
    return picture.point(tables.clip(0, 255).astype(int).ravel().tolist())


def _means(image: Image.Image, mask: Image.Image | None) -> np.ndarray:
    counts = np.reshape(image.histogram(mask), (3, 256))
    return counts @ np.arange(256) / counts.sum(axis=1)


def match_histograms(image: Image.Image, target: Image.Image, visible: Image.Image | None = None) -> Image.Image:
    """Gives each channel of ``image`` the distribution of levels of that channel of ``target``.

    Maps each level to the target's level of the same rank, with linear interpolation. Both images are 8-bit RGB, of any
    size. Pixels where ``visible``, an image of mode L and of the target's size, is 0 do not count.
    """
    tables = []
    histograms = image.histogram(_mask(visible, image)), target.histogram(visible)
    for counts, target_counts in zip(*(np.reshape(histogram, (3, 256)) for histogram in histograms)):
        target_levels = np.flatnonzero(target_counts)
        table = np.interp(_ranks(counts), _ranks(target_counts)[target_levels], target_levels)
        tables.append(table.round().astype(int))
    return image.point(np.concatenate(tables).tolist())


def _ranks(counts: np.ndarray) -> np.ndarray:
    """For each level the share of pixels below it, plus half of the pixels at the level itself."""
    return (counts.cumsum() - counts / 2) / counts.sum()
