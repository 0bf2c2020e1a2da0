"""What a terminal can do to a command: print too few characters, be closed, or stop the command by a signal."""

from __future__ import annotations

import argparse
import io
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from types import FrameType

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


class Stopped(KeyboardInterrupt):
    """A signal other than Ctrl-C has stopped the command; ``number`` is that of the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def stop_signals() -> Iterator[None]:
    """Turns SIGTERM and SIGHUP into :class:`Stopped` while the block runs, so that no half-written file stays behind.

    A signal that is ignored, as under ``nohup``, stays so. In a thread other than the main one nothing is done.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    previous = {}
    try:
        for number in SIGNALS:
            if signal.getsignal(number) is signal.SIG_DFL:
                previous[number] = signal.signal(number, stop)
    except ValueError:  # not the main thread
        pass
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def print_any_name() -> None:
    """Makes the standard streams print characters that they cannot encode as escapes, instead of raising an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def guarded(run: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """The function ``run`` of a command, which SIGTERM and SIGHUP then end as Ctrl-C does.

    The exit status is then 128 plus the number of the signal, after one line on stderr.
    """

    @wraps(run)
    def guarded_run(arguments: argparse.Namespace) -> int:
        try:
            with stop_signals():
                return run(arguments)
        except Stopped as stop:
            print(f"{arguments.prog}: stopped by {signal.Signals(stop.number).name}", file=sys.stderr)
            return 128 + stop.number

    return guarded_run
