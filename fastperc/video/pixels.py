"""Converts frames of PyAV from one kind of pixels to another, with what the installed version of PyAV can do."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastperc.video.formats import import_av

MATRICES = {"ITU709": 1, "FCC": 4, "ITU601": 6, "SMPTE240M": 7, "BT2020": 9}  # PyAV's names, FFmpeg's AVCOL_SPC_*
BT470BG = 5  # another number for the matrix of BT.601
FULL, LIMITED = "JPEG", "MPEG"  # PyAV's names of the ranges of levels


def matrix_of(code: int) -> str | None:
    """The name of the matrix that has FFmpeg's number ``code``, or None if that says nothing."""
    names = {number: name for name, number in MATRICES.items()} | {BT470BG: "ITU601"}
    return names.get(code)


class Converter:
    """Converts the frames of one clip."""

    def __init__(self) -> None:
        self._module = import_av().video.reformatter
        self._reformatter = self._module.VideoReformatter()
        self._options = {"threads": 1}  # more cost more than they gain; painting needs the cores

    def to_rgb(self, frame: Any, size: tuple[int, int], matrix: str, name: str = "rgb24") -> np.ndarray:
        """The levels of ``frame``, [H, W, 3].

        Args:
            frame: of PyAV.
            size: width and height of the result.
            matrix: of ``MATRICES``, by which the frame's colours are stored.
            name: FFmpeg's name of the result's pixels.
        """
        kinds = self._module.Interpolation
        # Between pixels of one size it is the chroma, of which there is less, that is interpolated.
        kind = kinds.BILINEAR if size == (frame.width, frame.height) else kinds.BICUBIC
        if hasattr(kinds, "FULL_CHR_H_INT"):  # PyAV 17.0 lacks it; there the nearest chroma is taken
            kind |= kinds.FULL_CHR_H_INT | kinds.ACCURATE_RND
        rgb = self._reformat(
            frame, width=size[0], height=size[1], format=name, src_colorspace=self._matrix(matrix), interpolation=kind
        )
        return rgb.to_ndarray()

    def from_rgb(self, levels: np.ndarray, matrix: str, name: str) -> Any:
        """A frame of PyAV.

        Args:
            levels: uint8 [H, W, 3].
            matrix: of ``MATRICES``, by which colours are to be stored.
            name: FFmpeg's name of the frame's pixels.
        """
        frame = import_av().VideoFrame.from_ndarray(np.ascontiguousarray(levels), format="rgb24")
        if name == "rgb24":
            return frame
        return self._reformat(
            frame,
            format=name,
            interpolation=self._module.Interpolation.BICUBIC,
            dst_colorspace=self._matrix(matrix),
            src_color_range=self._module.ColorRange[FULL],
            dst_color_range=self._module.ColorRange[FULL if name.startswith(("rgb", "gbr")) else LIMITED],
        )

    def _matrix(self, name: str) -> Any:
        # PyAV 17.0 lacks BT2020. Then frames are read and written by BT.709 alike, which cancels out.
        return getattr(self._module.Colorspace, name, self._module.Colorspace.ITU709)

    def _reformat(self, frame: Any, **options: Any) -> Any:
        try:
            return self._reformatter.reformat(frame, **options, **self._options)
        except TypeError:  # a version that has no such option
            if not self._options:
                raise
            self._options = {}
            return self._reformat(frame, **options)
