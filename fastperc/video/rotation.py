"""Which way up a film is: the display matrix that cameras store with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class Orientation(NamedTuple):
    """How stored frames become upright: first transposed, then mirrored."""

    transposed: bool = False
    left_right: bool = False
    top_bottom: bool = False


def _turn(orientation: Orientation) -> Callable[[np.ndarray], np.ndarray]:
    def turned(pixels: np.ndarray) -> np.ndarray:
        if orientation.transposed:
            pixels = pixels.swapaxes(0, 1)
        rows = slice(None, None, -1 if orientation.top_bottom else 1)
        columns = slice(None, None, -1 if orientation.left_right else 1)
        return pixels[rows, columns]

    return turned


# For each orientation, a view of an array [H, W, …] as the upright picture.
UPRIGHT = {
    orientation: _turn(orientation)
    for orientation in (Orientation(bool(i & 1), bool(i & 2), bool(i & 4)) for i in range(8))
}


def orientation_of(frame: Any) -> Orientation | None:
    """The orientation of a frame of PyAV, or None if it is no multiple of a quarter turn."""
    data = frame.side_data.get("DISPLAYMATRIX")
    return Orientation() if data is None else orientation_of_matrix(np.frombuffer(bytes(data), np.int32)[:9])


def orientation_of_matrix(matrix: np.ndarray) -> Orientation | None:
    """The orientation that a display matrix, int32 [9], describes; as :func:`orientation_of`.

    Column x and row y of the stored picture are shown at column a·x + c·y and row b·x + d·y; the matrix is
    [a, b, ·, c, d, ·, ·, ·, ·] with 16 bits after the point.
    """
    a, b, _, c, d = (int(value) for value in matrix[:5])
    largest = max(abs(a), abs(b), abs(c), abs(d))
    small = largest / 100
    if largest and abs(b) <= small and abs(c) <= small:
        return Orientation(False, a < 0, d < 0)
    if largest and abs(a) <= small and abs(d) <= small:
        return Orientation(True, c < 0, b < 0)
    return None
