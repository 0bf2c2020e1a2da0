"""Levels of 8 bits from images with larger samples: integers of 12 to 32 bits and floating-point numbers."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image

from fastperc.errors import InputError

WHITES = {"f": (1.0, 255.0, 65535.0), "i": (255.0, 65535.0, 2.0**31 - 1), "u": (255.0, 65535.0, 2.0**32 - 1)}
BRIGHTER = 0.01  # the share of the positive values that may be above twice the white


class Samples(NamedTuple):
    """What the samples of a grayscale image are."""

    kind: str  # "u": unsigned integers, "i": signed integers, "f": floating-point numbers
    bits: int
    white_is_zero: bool = False


def to_eight_bit(image: Image.Image, samples: Samples) -> Image.Image:
    """A grayscale image of Pillow's modes I, I;16 and F in 8 bits.

    Zero is black, and so are negative values. With up to 16 bits, white is the largest number. Files of 32-bit integers
    or floating-point numbers do not say what white is: it is 1 (floating-point numbers only), 255, 65535 or the largest
    integer, the first of these whose double at most 1 % of the finite positive values exceed. NaN counts as 0, and
    infinities are black or white.

    Raises:
        InputError: the numbers are too large for this rule.
    """
    values = np.asarray(image)
    if samples.kind == "u" and values.dtype == np.int32 and samples.bits == 32:
        values = values.view(np.uint32)
    white = float(2 ** (samples.bits - (samples.kind == "i")) - 1) if samples.bits <= 16 else _white(values, samples)
    levels = np.nan_to_num(values.astype(np.float32) / white * 255, posinf=255, neginf=0).clip(0, 255)
    levels = (255 - levels if samples.white_is_zero else levels).round().astype(np.uint8)
    gray = Image.fromarray(levels)
    if isinstance(transparent := image.info.get("transparency"), int):
        gray.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return gray


def _white(values: np.ndarray, samples: Samples) -> float:
    positive = (values > 0) & np.isfinite(values)
    most = BRIGHTER * np.count_nonzero(positive)
    for white in WHITES[samples.kind]:
        if np.count_nonzero(positive & (values > 2 * white)) <= most:
            return white
    raise InputError(f"floating-point levels up to {values[positive].max():.3g}, of no known range; scale them to 0–1")
