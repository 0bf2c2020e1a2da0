"""Writes films by PyAV: pictures are encoded, packets of sound and subtitles are copied."""

from __future__ import annotations

import errno
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastperc.errors import InputError
from fastperc.progress import say
from fastperc.video.clip import Clip, Frame
from fastperc.video.film import Colors, Film
from fastperc.video.formats import ANY_CODEC, CONTAINERS, codec_threads, import_av
from fastperc.video.pixels import MATRICES, Converter

ALIASES = {"h264": "libx264", "h265": "libx265", "hevc": "libx265", "vp9": "libvpx-vp9", "vp8": "libvpx"}
CRF = {"libx264": 18, "libx265": 20, "libvpx": 10, "libvpx-vp9": 30, "libaom-av1": 28, "libsvtav1": 30}  # defaults
OPTIONS = {  # of encoders, besides crf
    "libx264": {"preset": "superfast"},  # the processor has to paint; slower ones make files a sixth smaller
    "libx265": {"x265-params": "log-level=error"},
    "libvpx-vp9": {"deadline": "good", "cpu-used": "4", "row-mt": "1"},
    "libvpx": {"deadline": "good", "cpu-used": "4"},
}
OF_THE_SYSTEM = frozenset({errno.EACCES, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOSPC, errno.EROFS})
BITS_A_PIXEL = 0.5  # of encoders that aim at a bit rate, because they know no constant quality
ANY_SIDES = frozenset({"libvpx", "libvpx-vp9", "libaom-av1"})  # encoders that take odd sides with halved chroma
FORMATS = ("yuv420p", "yuv422p10le", "yuv444p", "rgb24", "gbrp")  # of pixels, those preferred first
OF_THE_FILE = frozenset({"major_brand", "minor_version", "compatible_brands", "encoder", "duration"})  # metadata
SDR = Colors("ITU709", 1, 1)


class Encoding(NamedTuple):
    """How films are encoded."""

    codec: str | None = None  # PyAV's name of an encoder; None: H.264, in .webm VP9
    crf: int | None = None  # constant quality, smaller is better; None: the encoder's entry in ``CRF``


class FilmWriter:
    """Writes a film; see :class:`fastperc.video.clip.Writer`.

    The sound, subtitles, chapters and metadata of ``clip`` are copied if it is a film.

    Args:
        path: of the file to write, which nobody reads before it is finished.
        target: the name of that file in messages, whose suffix says the format.
        clip: what the pictures are made of.
        size: width and height of the pictures.
        encoding: see :class:`Encoding`.

    Raises:
        InputError: the encoder does not exist or refuses the pictures, or the format cannot hold the sound.
        OSError: the system refuses to write the file.
    """

    def __init__(self, path: Path, target: Path, clip: Clip, size: tuple[int, int], encoding: Encoding) -> None:
        self._av, self.target = import_av(), target
        self._time_base = clip.time_base
        self._colors = clip.colors if isinstance(clip, Film) else SDR
        self._copies: dict[int, Any] = {}
        self._durations: dict[int, int] = {}  # of the frames in the encoder, by time stamp
        self._converter = Converter()
        name = CONTAINERS[target.suffix.lower()]
        options = {"movflags": "+faststart"} if name in ("mp4", "mov") else {}
        self.container = self._guarded(
            self._av.open, f"file:{path}", "w", format=name, container_options=options, metadata_errors="replace"
        )
        try:
            self._add_video(clip, size, encoding)
            if isinstance(clip, Film):
                self._add_copies(clip)
            self._guarded(self.container.start_encoding)
        except BaseException:
            self.abandon()
            raise

    def _add_video(self, clip: Clip, size: tuple[int, int], encoding: Encoding) -> None:
        webm = self.container.format.name == "webm"
        name = encoding.codec or ("libvpx-vp9" if webm else "libx264")
        name = ALIASES.get(name, name)
        codec = self._codec(name)
        if encoding.crf is not None and name not in CRF:
            raise InputError(f"--crf: {name} has no such quality; encoders that do: {', '.join(CRF)}")
        options = dict(OPTIONS.get(name, {}))
        if name in CRF:
            options["crf"] = str(CRF[name] if encoding.crf is None else encoding.crf)
        try:
            stream = self.container.add_stream(name, rate=clip.rate, options=options)
        except ValueError:
            raise InputError(f"{self.target}: this format does not hold {name}{self._hint()}") from None
        known = [video_format.name for video_format in codec.video_formats or ()]
        stream.pix_fmt = next((name for name in FORMATS if name in known), known[0] if known else FORMATS[0])
        halved = stream.pix_fmt.startswith(("yuv420", "yuv422")) and name not in ANY_SIDES
        self._padding = tuple(side % 2 if halved else 0 for side in size)
        stream.width, stream.height = (side + more for side, more in zip(size, self._padding))
        if any(self._padding):
            say(
                f"{self.target}: {size[0]}×{size[1]} is written as {stream.width}×{stream.height}, with the last "
                f"column or row twice: {name} needs even sides"
            )
        context = stream.codec_context
        context.time_base, context.thread_count = self._time_base, codec_threads()
        context.bit_rate = 0 if name in CRF else round(BITS_A_PIXEL * stream.width * stream.height * clip.rate)
        if isinstance(clip, Film):
            context.sample_aspect_ratio = clip.aspect
        self._pixels = stream.pix_fmt
        if not self._pixels.startswith(("rgb", "gbr")):
            context.colorspace, context.color_range = MATRICES[self._colors.matrix], 1
            context.color_primaries, context.color_trc = self._colors.primaries, self._colors.transfer
        if name == "libx265" and self.container.format.name in ("mp4", "mov"):
            context.codec_tag = "hvc1"  # the only one that Apple's players take
        self._stream, self._step = stream, max(round(1 / (clip.rate * self._time_base)), 1)

    def _hint(self) -> str:
        return "" if self.target.suffix.lower() == ANY_CODEC else f"; use {ANY_CODEC}"

    def _codec(self, name: str) -> Any:
        codec = self._av.codec
        try:
            found = codec.Codec(name, "w")
        except (codec.codec.UnknownCodecError, ValueError):
            found = None
        if found is None or found.type != "video":
            raise InputError(f"--codec {name}: PyAV has no such encoder of video; try {', '.join(CRF)}")
        return found

    def _add_copies(self, film: Film) -> None:
        for source in film.copied:
            try:
                stream = self.container.add_stream_from_template(source, opaque=True)
            except (ValueError, self._av.error.FFmpegError):
                codec = source.codec_context.name
                if source.type == "audio":
                    raise InputError(
                        f"{self.target}: this format does not hold the sound ({codec}){self._hint()}"
                    ) from None
                say(f"{self.target}: left out subtitles ({codec}), which this format does not hold{self._hint()}")
                continue
            stream.metadata.update(source.metadata)
            stream.disposition = source.disposition.value
            self._copies[source.index] = stream
        metadata = {key: value for key, value in film.container.metadata.items() if key.lower() not in OF_THE_FILE}
        self.container.metadata.update(metadata)
        if not film.span.start and film.span.duration is None and hasattr(self.container, "set_chapters"):
            self.container.set_chapters(film.container.chapters())
        self._add_attachments(film)

    def _add_attachments(self, film: Film) -> None:
        """Copies the fonts of subtitles."""
        attachments = getattr(film.container.streams, "attachments", ())
        if self.container.format.name == "matroska" and hasattr(self.container, "add_attachment"):
            for one in attachments:
                self.container.add_attachment(one.name or "attachment", one.mimetype or "", one.data)

    def put(self, frame: Frame) -> None:
        """See :class:`fastperc.video.clip.Writer`."""
        levels = frame.levels.numpy()
        if frame.alpha is not None:  # on white
            alpha = frame.alpha.numpy()[..., None].astype(np.uint16)
            levels = ((levels * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
        right, bottom = self._padding
        if right or bottom:
            levels = np.pad(levels, ((0, bottom), (0, right), (0, 0)), mode="edge")
        picture = self._converter.from_rgb(levels, self._colors.matrix, self._pixels)
        picture.pts, picture.time_base = frame.pts, self._time_base
        if hasattr(picture, "duration"):
            picture.duration = frame.duration
        self._durations[frame.pts] = frame.duration or self._step
        self._encode(picture)

    def copy(self, packet: Any) -> None:
        """See :class:`fastperc.video.clip.Writer`."""
        stream = self._copies.get(packet.stream.index)
        if stream is not None:
            packet.stream = stream
            self._guarded(self.container.mux, packet)

    def finish(self) -> None:
        """See :class:`fastperc.video.clip.Writer`."""
        self._encode(None)
        self._guarded(self.container.close)

    def abandon(self) -> None:
        """See :class:`fastperc.video.clip.Writer`."""
        with suppress(self._av.error.FFmpegError, OSError, ValueError, RuntimeError):  # the file will be removed
            self.container.close()

    def _encode(self, picture: Any) -> None:
        for packet in self._guarded(self._stream.encode, picture):
            packet.duration = self._durations.pop(packet.pts, self._step)
            self._guarded(self.container.mux, packet)

    def _guarded(self, call: Any, *arguments: Any, **options: Any) -> Any:
        """What ``call`` returns; FFmpeg's errors become those of the system, or are told in words."""
        try:
            return call(*arguments, **options)
        except self._av.error.FFmpegError as error:
            if isinstance(error, OSError) and error.errno in OF_THE_SYSTEM:  # encoders give other numbers
                raise OSError(error.errno, error.strerror, str(self.target)) from None
            raise InputError(f"{self.target}: the encoder or the format refuses this clip ({error.strerror})") from None
