"""What films and animations have in common: frames with time stamps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor

MICROSECONDS = 1_000_000  # in a second


class Frame(NamedTuple):
    """A frame of a clip."""

    levels: Tensor  # uint8 [H, W, 3], in memory of its own
    pts: int  # when it is shown, in the clip's time base
    duration: int = 0  # how long, in the same unit; 0: until the next frame
    alpha: Tensor | None = None  # uint8 [H, W]


class Span(NamedTuple):
    """The part of a clip that is painted, in seconds."""

    start: float | Fraction = 0
    duration: float | Fraction | None = None  # None: to the end

    def exact(self) -> Span:
        """The same in microseconds, so that 0.3 is three tenths and not a little less."""
        duration = None if self.duration is None else Fraction(self.duration).limit_denominator(MICROSECONDS)
        return Span(Fraction(self.start).limit_denominator(MICROSECONDS), duration)

    def holds(self, time: float | Fraction) -> bool:
        """Whether a frame that is shown ``time`` seconds after ``start`` belongs to the part."""
        return time >= 0 and (self.duration is None or time < self.duration)


WHOLE = Span()  # of a clip


class Clip(Protocol):
    """A clip that was opened to read, :class:`fastperc.video.film.Film` or
    :class:`fastperc.video.animation.Animation`."""

    path: Path
    size: tuple[int, int]  # width and height of its frames in pixels, upright
    time_base: Fraction  # seconds
    rate: Fraction  # frames a second, on average
    total: int  # frames, as far as the file tells; 0: unknown
    loops: int | None  # how often it is played; 0: for ever, None: the file does not say
    transparent: bool  # whether frames have alpha

    def frames(self, copy: Callable[[Any], None] = ...) -> Iterator[Frame]:
        """Yields the frames in order. Calls ``copy`` with each packet of sound and subtitles, in the file's order.

        Raises:
            InputError: the file is damaged or cut short.
        """
        ...

    def close(self) -> None:
        """Closes the file."""
        ...


class Writer(Protocol):
    """Writes a clip."""

    def put(self, frame: Frame) -> None:
        """Writes a frame.

        Raises:
            OSError: the system refuses to write it.
        """
        ...

    def copy(self, packet: Any) -> None:
        """Writes a packet of sound or subtitles as it is."""
        ...

    def finish(self) -> None:
        """Writes what is left and closes the file; ``OSError`` as :meth:`put`."""
        ...

    def abandon(self) -> None:
        """Closes the file, in whatever state it is."""
        ...
