"""Photos that tests draw, and their levels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """A smooth colourful image with some noise: not constant, not symmetric."""
    from PIL import Image  # here, for the tests of kernels do without

    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin((x * a + y * b) / 9 + c) for a, b, c in rng.uniform(0.3, 2.0, (3, 3))]
    pixels = 127 + 90 * np.stack(waves, axis=2) + rng.normal(0, 8, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def pixels(image: Image.Image) -> np.ndarray:
    """The levels of an image, as integers that may be subtracted."""
    return np.asarray(image).astype(int)
