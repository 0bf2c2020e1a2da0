"""Reads animated GIF, WebP and PNG by Pillow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from PIL import Image

from fastperc.errors import InputError
from fastperc.files import PathLike, check_readable
from fastperc.photos.photo import MAX_PIXELS, Photo
from fastperc.video.clip import WHOLE, Frame, Span

UNSAID = 100  # milliseconds that a frame is shown where the file says 0, as browsers have it


class Animation:
    """An animated GIF, WebP or PNG, opened to read; see :class:`fastperc.video.clip.Clip`.

    Args:
        path: the animation.
        span: the part to read.
        long_side: pixels to which the longer side of the frames is resized. Default: no resizing.

    Raises:
        InputError: the file is missing, damaged or too large, or has no frame in ``span``.
    """

    time_base = Fraction(1, 1000)

    def __init__(self, path: PathLike, span: Span = WHOLE, long_side: int | None = None) -> None:
        self.path, self.span, self.long_side = check_readable(path), span.exact(), long_side
        try:
            self._image = Image.open(self.path)
        except Image.DecompressionBombError:
            raise InputError(f"{path}: larger than {MAX_PIXELS:,} pixels") from None
        except Exception as error:
            raise InputError(f"{path}: damaged or cut short ({error})") from None
        try:
            # A PNG may begin with a picture for programs that do not play it.
            self._first = int(bool(getattr(self._image, "default_image", False)))
            self.total = int(getattr(self._image, "n_frames", 1)) - self._first
            self.transparent = self._image.format != "GIF" and self._image.has_transparency_data
            self.loops = self._image.info.get("loop")
            self._remaining = self._frames()
            self._next = next(self._remaining, None)
            if self._next is None:
                raise InputError(f"{path}: has no frame in the part that --start and --duration choose")
            height, width, _ = self._next.levels.shape
            self.size = width, height
            self.transparent |= self._next.alpha is not None
            self.rate = Fraction(1000, self._next.duration)
        except BaseException as error:
            self._image.close()
            raise self._in_words(error) from None

    def frames(self, copy: Callable[[Any], None] = lambda packet: None) -> Iterator[Frame]:
        """See :meth:`fastperc.video.clip.Clip.frames`. Can be called once."""
        if self._next is not None:
            yield self._next
        yield from self._remaining

    def close(self) -> None:
        """Closes the file."""
        self._image.close()

    def _frames(self) -> Iterator[Frame]:
        start, end = round(1000 * self.span.start), 0
        for index in range(self._first, self._first + self.total):
            try:
                self._image.seek(index)
                self._image.load()
                photo = self._photo()
            except Exception as error:
                raise self._in_words(error) from None
            duration = round(self._image.info.get("duration", 0)) or UNSAID
            begin, end = end, end + duration
            if not self.span.holds(Fraction(begin - start, 1000)):
                if begin > start:
                    return
                continue
            alpha = None if photo.alpha is None else torch.from_numpy(np.array(photo.alpha))
            yield Frame(photo.levels(), begin - start, duration, alpha)

    def _photo(self) -> Photo:
        rgba = self._image.convert("RGBA")
        alpha = rgba.getchannel("A")
        photo = Photo(rgba.convert("RGB"), alpha if alpha.getextrema() != (255, 255) else None)
        return photo if self.long_side is None else photo.resized(self.long_side)

    def _in_words(self, error: BaseException) -> BaseException:
        if isinstance(error, (InputError, MemoryError)) or not isinstance(error, Exception):
            return error
        return InputError(f"{self.path}: damaged or cut short ({error})")
