"""Reads films by PyAV: upright frames of 8-bit RGB with their time stamps, and packets of sound and subtitles."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch

from fastperc.errors import InputError
from fastperc.files import PathLike, check_readable
from fastperc.progress import say
from fastperc.video.clip import MICROSECONDS, WHOLE, Frame, Span
from fastperc.video.formats import codec_threads, import_av
from fastperc.video.hdr import TRANSFERS, ToneMap
from fastperc.video.pixels import Converter, matrix_of
from fastperc.video.rotation import UPRIGHT, Orientation, orientation_of

PLAYLISTS = frozenset({"hls", "concat", "dash", "imf", "sdp"})  # formats of files that name other files
HD_HEIGHT = 720  # from here up, a film that does not say it has the colours of BT.709
LONGEST_WAIT = 10  # seconds of the film after the end of a span in which late packets of sound are looked for


class Colors(NamedTuple):
    """How a film stores colours."""

    matrix: str  # see :mod:`fastperc.video.pixels`
    primaries: int  # FFmpeg's numbers
    transfer: int


class Film:
    """The best video stream of a film, opened to read; see :class:`fastperc.video.clip.Clip`.

    Args:
        path: the film.
        span: the part to read.
        long_side: pixels to which the longer side of the frames is resized, with even sides. Default: no resizing.

    Raises:
        InputError: the file is missing or damaged, holds no video or none in ``span``, or PyAV is not installed.
    """

    loops: int | None = 0
    transparent = False

    def __init__(self, path: PathLike, span: Span = WHOLE, long_side: int | None = None) -> None:
        self._av = import_av()
        self.path, self.span = check_readable(path), span.exact()
        self.container = self._opened()
        try:
            self._prepare(long_side)
        except BaseException:
            self.container.close()
            raise

    def _opened(self) -> Any:
        # "file:" keeps FFmpeg from taking the name for an address; other protocols stay closed to what the file names.
        name, options = f"file:{os.fspath(self.path)}", {"protocol_whitelist": "file"}
        try:
            container = self._av.open(name, options=options, metadata_errors="replace")
        except self._av.error.FFmpegError as error:
            raise self._damaged(error, "not a film, damaged or cut short") from None
        if PLAYLISTS & set(container.format.name.split(",")):
            container.close()
            raise InputError(f"{self.path}: a list of other files; give one of these")
        return container

    def _prepare(self, long_side: int | None) -> None:
        """Finds the streams and decodes the first frame, which says how large and which way up the film is."""
        self.video = self._video_stream()
        streams = self.container.streams
        self.copied = [stream for stream in (*streams.audio, *streams.subtitles) if stream.codec_context is not None]
        self.video.thread_type, self.video.thread_count = "AUTO", codec_threads()
        self.time_base = Fraction(self.video.time_base)
        self.rate = Fraction(self.video.average_rate or self.video.guessed_rate or 25)
        self._origin = Fraction(self.container.start_time or 0, MICROSECONDS) + Fraction(self.span.start)
        self._converter = Converter()
        self._decoded, self._last_pts = 0, -(1 << 62)
        self._end = self._reached = Fraction(0)  # of the video, and of all streams: seconds of the span
        if self.span.start:
            try:
                self.container.seek(math.floor(self._origin * MICROSECONDS))
            except self._av.error.FFmpegError:  # the film ends before
                self.container.seek(0)
        items, early, first = self._items(), [], None
        for item in items:
            early.append(item)
            if isinstance(item, self._av.VideoFrame):
                first = item
                break
        if first is None:
            raise InputError(f"{self.path}: has no frame {self._span_in_words()}")
        self._read_properties(first, long_side)
        self._remaining = chain(early, items)

    def _video_stream(self) -> Any:
        streams = [
            s for s in self.container.streams.video if not s.disposition & self._av.stream.Disposition.attached_pic
        ]
        if not streams:
            raise InputError(f"{self.path}: holds no video")
        best = self.container.streams.best("video")
        stream = next((stream for stream in streams if best is not None and stream.index == best.index), streams[0])
        if stream.codec_context is None:
            raise InputError(f"{self.path}: its video is in a format that PyAV cannot decode")
        return stream

    def _read_properties(self, frame: Any, long_side: int | None) -> None:
        width, height = frame.width, frame.height
        orientation = orientation_of(frame)
        if orientation is None:
            raise InputError(f"{self.path}: is turned by an angle that is no quarter turn; encode it upright first")
        self.orientation: Orientation = orientation
        if long_side is not None:
            scale = long_side / max(width, height)
            width, height = (max(2, 2 * round(side * scale / 2)) for side in (width, height))
        self._stored = width, height
        self.size = (height, width) if self.orientation.transposed else (width, height)
        aspect = self.video.sample_aspect_ratio or Fraction(1)
        self.aspect = 1 / aspect if self.orientation.transposed else aspect  # width by height of a pixel
        unspecified = "ITU709" if height >= HD_HEIGHT else "ITU601"
        context = self.video.codec_context
        self.tone_map = ToneMap(context.color_trc) if context.color_trc in TRANSFERS else None
        self._matrix = matrix_of(frame.colorspace) or ("BT2020" if self.tone_map else unspecified)
        primaries, transfer = (2 if code in (0, 3) else code for code in (context.color_primaries, context.color_trc))
        self.colors = Colors(self._matrix, primaries, transfer)  # 2: unspecified; 0 and 3 are reserved
        if self.tone_map:
            say(f"{self.path}: is HDR ({TRANSFERS[context.color_trc]}); the picture is made and written in SDR")
            self.colors = Colors("ITU709", 1, 1)
        if frame.interlaced_frame:
            say(
                f"{self.path}: is interlaced; for a better picture deinterlace it first, for example by "
                "ffmpeg -vf yadif"
            )
        self.total = self._count()

    def _duration(self) -> Fraction | None:
        """Seconds from the film's start to the end of its video, or of the whole film, as the file says."""
        if self.video.duration:
            return self.video.duration * self.time_base + self._start_of_video()
        return Fraction(self.container.duration, MICROSECONDS) if self.container.duration else None

    def _start_of_video(self) -> Fraction:
        start = Fraction(self.container.start_time or 0, MICROSECONDS)
        return (self.video.start_time or 0) * self.time_base - start

    def _count(self) -> int:
        whole = not self.span.start and self.span.duration is None
        if whole and self.video.frames:
            return self.video.frames
        duration = self._duration()
        seconds = self.span.duration
        if duration is not None:
            left = max(float(duration) - self.span.start, 0.0)
            seconds = left if seconds is None else min(seconds, left)
        return round(seconds * self.rate) if seconds is not None else 0

    def frames(self, copy: Callable[[Any], None] = lambda packet: None) -> Iterator[Frame]:
        """See :meth:`fastperc.video.clip.Clip.frames`. Can be called once."""
        for item in self._remaining:
            if isinstance(item, self._av.VideoFrame):
                yield Frame(torch.from_numpy(self._levels(item)), item.pts, item.duration or 0)
            else:
                copy(item)

    def close(self) -> None:
        """Closes the file."""
        self.container.close()

    def _levels(self, frame: Any) -> np.ndarray:
        """The upright frame as uint8 [H, W, 3], contiguous."""
        name = "gbrp16le" if self.tone_map else "rgb24"  # FFmpeg 8 gets rgb48le wrong where it interpolates chroma
        pixels = self._converter.to_rgb(frame, self._stored, self._matrix, name)
        if self.tone_map:
            pixels = self.tone_map(pixels)
        return np.ascontiguousarray(UPRIGHT[self.orientation](pixels))

    def _items(self) -> Iterator[Any]:
        """Frames and packets of the span, with time stamps that count from its start, in the file's order."""
        ended = {stream.index: stream.type == "subtitle" for stream in self.copied} | {self.video.index: False}
        try:
            for packet in self.container.demux(self.video, *self.copied):
                index = packet.stream.index
                if index == self.video.index:
                    for frame in self._frames_of(packet):
                        time = frame.pts * self.time_base
                        if self.span.holds(time):
                            yield frame
                        ended[index] |= time > 0 and not self.span.holds(time)
                        if self.span.duration is not None and time > self.span.duration + LONGEST_WAIT:
                            return
                elif packet.dts is not None:
                    time = self._shift(packet)
                    self._reached = max(self._reached, time)
                    late = self.span.duration is not None and time >= self.span.duration
                    if not late and (not self.span.start or time >= 0):
                        yield packet
                    ended[index] |= late
                if all(ended.values()):
                    return
        except self._av.error.FFmpegError as error:
            raise self._damaged(error, f"damaged at {float(self._end):.2f} s", self._end) from None
        self._check_length()

    def _shift(self, packet: Any) -> Fraction:
        """Makes the time stamps of ``packet`` count from the start of the span; returns that of its decoding."""
        offset = round(self._origin / packet.time_base)
        packet.dts -= offset
        packet.pts = packet.dts if packet.pts is None else packet.pts - offset
        return packet.dts * Fraction(packet.time_base)

    def _frames_of(self, packet: Any) -> Iterator[Any]:
        """The frames that ``packet`` completes, with time stamps that rise and count from the start of the span."""
        try:
            frames = packet.decode()
        except self._av.error.InvalidDataError:
            if self._decoded:
                raise
            frames = []  # before the first whole picture
        offset = round(self._origin / self.time_base)
        step = max(round(1 / (self.rate * self.time_base)), 1)
        for frame in frames:
            first = self._decoded == 0
            self._decoded += 1
            pts = frame.pts - offset if frame.pts is not None else 0 if first else self._last_pts + step
            frame.pts = self._last_pts = max(pts, self._last_pts + 1)
            frame.time_base = self.time_base
            self._end = (frame.pts + (frame.duration or step)) * self.time_base
            yield frame

    def _check_length(self) -> None:
        """Raises an InputError if the file ended long before the film does that it announces."""
        duration = self._duration()
        if duration is None or not self._decoded:
            return
        start, reached = Fraction(self.span.start), self._end
        if "mp4" not in self.container.format.name:  # other formats give the length of all streams together
            reached = max(self._end, self._reached)
        end, planned = start + reached, duration
        if self.span.duration is not None:
            planned = min(duration, start + Fraction(self.span.duration))
        tolerance = max(planned / 50, min(planned / 4, Fraction(1, 2)))
        if end < planned - tolerance:
            raise InputError(
                f"{self.path}: cut short: it ends after {float(end):.2f} s of {float(duration):.2f}; "
                f"--duration {float(self._end):.2f} paints what is there"
            )

    def _span_in_words(self) -> str:
        if not self.span.start and self.span.duration is None:
            return "that can be decoded"
        duration = self._duration()
        length = f"; it lasts {float(duration):.2f} s" if duration is not None else ""
        return f"in the part that --start and --duration choose{length}"

    def _damaged(self, error: Exception, fault: str, before: Fraction | None = None) -> Exception:
        """The error to raise: of the system as it is, of the file in words."""
        reason = getattr(error, "strerror", None) or str(error)
        if isinstance(error, OSError) and not isinstance(error, EOFError):
            return InputError(f"{self.path}: cannot be read ({reason})")
        hint = f"; --duration {float(before):.2f} paints what comes before" if before else ""
        return InputError(f"{self.path}: {fault} ({reason}){hint}")
