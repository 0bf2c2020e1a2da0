"""Writes animated GIF, WebP and PNG frame by frame, so that memory stays flat. Pillow encodes the single frames."""

from __future__ import annotations

import io
import struct
import zlib
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import GifImagePlugin, Image

from fastperc.errors import InputError
from fastperc.photos.formats import MAX_SIDES
from fastperc.video.clip import Clip, Frame
from fastperc.video.formats import ANIMATIONS

QUALITY = 90  # of WebP
LONGEST = {"GIF": 65_535 * 10, "WEBP": (1 << 24) - 1, "PNG": 65_535}  # milliseconds of a frame
OPAQUE = 128  # from this alpha up a pixel of a GIF shows


class AnimationWriter:
    """Writes an animation; see :class:`fastperc.video.clip.Writer`. Sound is left out.

    Args:
        path: of the file to write.
        target: the name of that file in messages, whose suffix says the format.
        clip: what the pictures are made of.
        size: width and height of the pictures.

    Raises:
        InputError: the format does not hold pictures of that size.
        OSError: the system refuses to write the file.
    """

    def __init__(self, path: Path, target: Path, clip: Clip, size: tuple[int, int]) -> None:
        format_name = ANIMATIONS[target.suffix.lower()]
        if max(size) > (limit := MAX_SIDES.get(format_name, 65_535)):
            raise InputError(f"{target}: {size[0]}×{size[1]} is larger than {limit:,} pixels a side")
        self._tick = clip.time_base * 1000  # milliseconds
        self._usual = 1000 / clip.rate
        self._least = 20 if format_name == "GIF" else 1  # milliseconds: players show shorter frames for longer
        self._unit = 10 if format_name == "GIF" else 1  # milliseconds in which the format counts
        self._longest = LONGEST[format_name]
        self._waiting: Frame | None = None  # it is written when the next frame says how long it is shown
        self._begin = 0  # of that frame, in milliseconds
        self._file = path.open("wb")
        self._format = FORMATS[format_name](self._file, size, clip.loops, clip.transparent)

    def put(self, frame: Frame) -> None:
        """See :class:`fastperc.video.clip.Writer`. Leaves out a frame that comes too soon after the last one."""
        time = self._rounded(frame.pts)
        if self._waiting is None:
            self._waiting, self._begin = frame, time
        elif time - self._begin >= self._least:
            self._format.write(self._waiting, min(time - self._begin, self._longest))
            self._waiting, self._begin = frame, time

    def copy(self, packet: object) -> None:
        """See :class:`fastperc.video.clip.Writer`."""

    def finish(self) -> None:
        """See :class:`fastperc.video.clip.Writer`."""
        if self._waiting is not None:
            usual = round(self._usual / self._tick)
            end = self._rounded(self._waiting.pts + (self._waiting.duration or usual))
            self._format.write(self._waiting, min(max(end - self._begin, self._least), self._longest))
        self._format.end()
        self._file.close()

    def abandon(self) -> None:
        """See :class:`fastperc.video.clip.Writer`."""
        with suppress(OSError):  # of a full disk; the file will be removed
            self._file.close()

    def _rounded(self, pts: int | Fraction) -> int:
        return round(pts * self._tick / self._unit) * self._unit


class AnimationFormat:
    """A format of animations: its beginning, which the constructor writes, its frames and its end.

    Args:
        file: where to write.
        size: width and height in pixels.
        loops: how often it is played; 0: for ever, None: once.
        transparent: whether frames may have alpha.
    """

    def __init__(self, file: BinaryIO, size: tuple[int, int], loops: int | None, transparent: bool) -> None:
        self.file, self.size, self.transparent = file, size, transparent
        self.loops = 1 if loops is None else loops
        self.count = 0
        self.begin(loops)

    def begin(self, loops: int | None) -> None:
        """Writes what stands before the first frame."""
        raise NotImplementedError

    def write(self, frame: Frame, duration: int) -> None:
        """Writes a frame that is shown for ``duration`` milliseconds."""
        raise NotImplementedError

    def end(self) -> None:
        """Writes what stands after the last frame, and what the beginning has to say about all of them."""
        raise NotImplementedError

    def image(self, frame: Frame) -> Image.Image:
        """The frame as RGB, or RGBA in a transparent animation."""
        image = Image.fromarray(frame.levels.numpy())
        if self.transparent:
            image.putalpha(255 if frame.alpha is None else Image.fromarray(frame.alpha.numpy()))
        return image


class Gif(AnimationFormat):
    """GIF: each frame has 256 colours of its own."""

    def begin(self, loops: int | None) -> None:
        """See :class:`AnimationFormat`."""
        self.file.write(b"GIF89a" + struct.pack("<HHBBB", *self.size, 0x70, 0, 0))  # without a table for all frames
        if loops is not None:
            self.file.write(b"!\xff\x0bNETSCAPE2.0\x03\x01" + struct.pack("<H", min(loops, 65_535)) + b"\0")

    def write(self, frame: Frame, duration: int) -> None:
        """See :class:`AnimationFormat`."""
        image = Image.fromarray(frame.levels.numpy()).quantize(256 if frame.alpha is None else 255)
        options: dict[str, Any] = dict(duration=duration, disposal=1, include_color_table=True)
        if frame.alpha is not None:
            indices = np.array(image)
            indices[frame.alpha.numpy() < OPAQUE] = 255
            palette = (image.getpalette() or [])[: 3 * 255]
            image = Image.fromarray(indices, "L")
            image.putpalette(palette + [0] * (3 * 256 - len(palette)))
            options |= dict(transparency=255, disposal=2)
        for block in GifImagePlugin.getdata(image, **options):
            self.file.write(block)

    def end(self) -> None:
        """See :class:`AnimationFormat`."""
        self.file.write(b";")


class Apng(AnimationFormat):
    """Animated PNG (APNG)."""

    def begin(self, loops: int | None) -> None:
        """See :class:`AnimationFormat`."""
        header = struct.pack(">IIBBBBB", *self.size, 8, 6 if self.transparent else 2, 0, 0, 0)
        self.file.write(b"\x89PNG\r\n\x1a\n")
        self._chunk(b"IHDR", header)
        self._control = self.file.tell()
        self._chunk(b"acTL", struct.pack(">II", 0, self.loops))
        self._sequence = 0

    def write(self, frame: Frame, duration: int) -> None:
        """See :class:`AnimationFormat`."""
        self._chunk(b"fcTL", struct.pack(">IIIIIHHBB", self._number(), *self.size, 0, 0, duration, 1000, 0, 0))
        encoded = io.BytesIO()
        self.image(frame).save(encoded, "PNG")
        content = encoded.getvalue()
        position = 8
        while position < len(content):
            length, name = struct.unpack_from(">I4s", content, position)
            data = content[position + 8 : position + 8 + length]
            position += 12 + length
            if name == b"IDAT" and self.count == 0:
                self._chunk(name, data)
            elif name == b"IDAT":
                self._chunk(b"fdAT", struct.pack(">I", self._number()) + data)
        self.count += 1

    def end(self) -> None:
        """See :class:`AnimationFormat`."""
        self._chunk(b"IEND", b"")
        self.file.seek(self._control)
        self._chunk(b"acTL", struct.pack(">II", self.count, self.loops))

    def _number(self) -> int:
        self._sequence += 1
        return self._sequence - 1

    def _chunk(self, name: bytes, data: bytes) -> None:
        self.file.write(struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)))


class WebP(AnimationFormat):
    """Animated WebP."""

    def begin(self, loops: int | None) -> None:
        """See :class:`AnimationFormat`."""
        self.file.write(b"RIFF\0\0\0\0WEBP")
        width, height = (_three_bytes(side - 1) for side in self.size)
        self._chunk(b"VP8X", bytes([0x12 if self.transparent else 0x02, 0, 0, 0]) + width + height)
        self._chunk(b"ANIM", bytes(4) + struct.pack("<H", min(self.loops, 65_535)))

    def write(self, frame: Frame, duration: int) -> None:
        """See :class:`AnimationFormat`."""
        encoded = io.BytesIO()
        self.image(frame).save(encoded, "WEBP", quality=QUALITY)
        content, position, picture = encoded.getvalue(), 12, b""
        while position < len(content):
            name, length = struct.unpack_from("<4sI", content, position)
            end = position + 8 + length + length % 2
            if name in (b"ALPH", b"VP8 ", b"VP8L"):
                picture += content[position:end]
            position = end
        width, height = (_three_bytes(side - 1) for side in self.size)
        replace = b"\x02"  # the last frame, instead of blending with it
        self._chunk(b"ANMF", bytes(6) + width + height + _three_bytes(duration) + replace + picture)

    def end(self) -> None:
        """See :class:`AnimationFormat`."""
        size = self.file.tell() - 8
        self.file.seek(4)
        self.file.write(struct.pack("<I", size))

    def _chunk(self, name: bytes, data: bytes) -> None:
        self.file.write(name + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2))


FORMATS: dict[str, type[AnimationFormat]] = {"GIF": Gif, "PNG": Apng, "WEBP": WebP}


def _three_bytes(number: int) -> bytes:
    return struct.pack("<I", number)[:3]
