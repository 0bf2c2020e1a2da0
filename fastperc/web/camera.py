"""A camera, read by PyAV, and its painted picture as a stream of JPEGs."""

from __future__ import annotations

import io
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from glob import glob
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastperc.errors import InputError
from fastperc.photos.photo import MAX_PIXELS
from fastperc.photos.stylize import stylize_levels
from fastperc.presets import MINIMUM_SIDE
from fastperc.video.formats import import_av
from fastperc.video.pixels import Converter, matrix_of
from fastperc.video.smoothing import Smoother
from fastperc.web.studio import Cancelled, Job, Studio, StyleOptions

FORMATS = {"linux": "v4l2", "darwin": "avfoundation", "win32": "dshow"}  # FFmpeg's names of the systems' cameras
NAMED_FORMATS = frozenset({*FORMATS.values(), "gdigrab", "lavfi", "x11grab"})  # that may stand before the device
SIDE = 640  # pixels: the longer side to which frames are resized by default
QUALITY = 85  # of the JPEGs
WAIT = 0.2  # seconds between two looks at whether to go on


class LiveOptions(NamedTuple):
    """How the camera's picture is painted."""

    style: StyleOptions
    smooth: float = 0.0  # see :class:`fastperc.video.smoothing.Smoother`


def device_address(device: str) -> tuple[str, str]:
    """What FFmpeg calls a camera: the format that reads it, and its name there.

    Args:
        device: a number, a name of the system such as ``/dev/video0``, or ``FORMAT:NAME`` as FFmpeg names it.
    """
    system = FORMATS.get(sys.platform, "v4l2")
    name, _, rest = device.partition(":")
    if name in NAMED_FORMATS and rest:
        return name, rest
    if device.isdecimal() and system == "v4l2":
        return system, f"/dev/video{device}"
    if system == "dshow" and not device.startswith(("video=", "@")):
        return system, f"video={device}"
    return system, device


class Camera:
    """Reads a camera in a thread and keeps the newest frame. A context manager.

    Args:
        device: see :func:`device_address`.

    Raises:
        InputError: it cannot be opened, or PyAV is not installed.
    """

    def __init__(self, device: str) -> None:
        self._av, self.device = import_av(), device
        self._errors = (self._av.error.FFmpegError, OSError, ValueError)
        self._container = self._opened()
        self._changed = threading.Condition()
        self._frame: Any = None
        self._number, self._ended = 0, False
        self._thread = threading.Thread(target=self._read, name="fastperc-camera", daemon=True)

    def _opened(self) -> Any:
        format_name, name = device_address(self.device)
        if format_name == "dshow" and self.device.isdecimal():
            raise InputError(f"camera {self.device}: Windows knows cameras by name; give --webcam 'NAME OF THE CAMERA'")
        try:
            container = self._av.open(name, format=format_name)
        except self._errors as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise InputError(f"camera {self.device}: cannot be opened ({reason}); {self._others()}") from None
        if not container.streams.video:
            container.close()
            raise InputError(f"camera {self.device}: gives no video")
        return container

    def _others(self) -> str:
        devices = sorted(glob("/dev/video*"))
        if sys.platform != "linux":
            return "give the number or the name of another"
        return f"there are {', '.join(devices)}" if devices else "this machine has no camera"

    def __enter__(self) -> Camera:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()
        self._thread.join(timeout=2)  # a camera that gives no frame keeps the thread; it is a daemon

    def _read(self) -> None:
        try:
            for frame in self._container.decode(video=0):
                with self._changed:
                    self._frame, self._number = frame, self._number + 1
                    self._changed.notify_all()
                    if self._ended:
                        break
        except self._errors:  # unplugged
            pass
        finally:
            with self._changed:
                self._ended = True
                self._changed.notify_all()
            self._container.close()

    @property
    def ended(self) -> bool:
        """Whether no more frames come."""
        return self._ended

    def newer(self, number: int) -> tuple[int, Any] | None:
        """The newest frame, of PyAV, with its number, which is above ``number``; None if none came for a while."""
        with self._changed:
            self._changed.wait_for(lambda: self._number > number or self._ended, timeout=WAIT)
            return (self._number, self._frame) if self._number > number else None


class Live:
    """Paints the newest frame of a camera over and over while somebody watches. A context manager.

    Args:
        camera: opened.
        studio: whose networks are used, in turn with the jobs of photos and clips.
        options: may be replaced at any time.
    """

    def __init__(self, camera: Camera, studio: Studio, options: LiveOptions) -> None:
        self.camera, self.studio, self.options = camera, studio, options
        self.picture, self.number, self.fault = b"", 0, ""  # the newest JPEG, how many there were, an error's message
        self._converter = Converter()
        self._watchers = 0
        self._stop = threading.Event()
        self._job = Job(studio.folder)
        self._thread = threading.Thread(target=self._run, name="fastperc-live", daemon=True)

    def __enter__(self) -> Live:
        self.camera.__enter__()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._job.cancel()
        self._thread.join(timeout=2)  # a network may be running
        self.camera.__exit__()

    @property
    def over(self) -> bool:
        """Whether no more pictures come."""
        return self._stop.is_set() or self.camera.ended

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Somebody watches while the block runs."""
        self._watchers += 1
        try:
            yield
        finally:
            self._watchers -= 1

    def _run(self) -> None:
        number, options, smoother = 0, self.options, None
        while not self.over:
            if not self._watchers:
                self._stop.wait(WAIT)
                continue
            newer = self.camera.newer(number)
            if newer is None:
                continue
            number, frame = newer
            if options is not self.options or smoother is None:
                options = self.options
                smoother = Smoother(options.smooth) if options.smooth else _unsmoothed
            try:
                self.picture = self._painted(frame, options.style, smoother)
                self.number, self.fault = self.number + 1, ""
            except Cancelled:
                return
            except (InputError, ArithmeticError, RuntimeError) as error:  # RuntimeError: also PyTorch's lack of memory
                self.fault = str(error)
                self._stop.wait(1)

    def _painted(self, frame: Any, options: StyleOptions, smoother: Any) -> bytes:
        """The painted frame as JPEG."""
        levels = self._levels(frame, options.long_side or SIDE)
        with self.studio.turn(self._job):
            painter = self.studio.engine(options.style)
            how = options.strength, options.keep_colors, self.studio.networks.tile
            picture = stylize_levels(painter, levels, *how, stroke=options.stroke)
        file = io.BytesIO()
        Image.fromarray(smoother(levels, picture).numpy()).save(file, "JPEG", quality=QUALITY)
        return file.getvalue()

    def _levels(self, frame: Any, long_side: int) -> Tensor:
        """The frame, resized as those of films are: uint8 [H, W, 3]."""
        scale = Fraction(long_side, max(frame.width, frame.height))
        width, height = (max(MINIMUM_SIDE, 2 * round(side * scale / 2)) for side in (frame.width, frame.height))
        if width * height > MAX_PIXELS:
            raise InputError(f"{width}×{height} is larger than {MAX_PIXELS:,} pixels")
        pixels = self._converter.to_rgb(frame, (width, height), matrix_of(frame.colorspace) or "ITU601")
        return torch.from_numpy(np.ascontiguousarray(pixels))


def _unsmoothed(levels: Tensor, picture: Tensor) -> Tensor:
    return picture
