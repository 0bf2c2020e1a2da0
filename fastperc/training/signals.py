"""Stop requests: SIGINT (Ctrl-C), SIGTERM and SIGHUP end a run after the step that is running."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from fastperc.progress import say

# Windows has no SIGHUP, which says that the terminal was closed.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class StopRequest:
    """Whether a signal has asked the run to stop."""

    requested = False


@contextmanager
def stop_requests(ignore_repeats: bool = False) -> Iterator[StopRequest]:
    """Turns SIGINT, SIGTERM and SIGHUP into a :class:`StopRequest` while the block runs.

    A signal that is ignored, as SIGHUP under ``nohup``, stays so. A second signal acts as it would without this block.
    With ``ignore_repeats`` it does nothing: a launcher such as ``torchrun`` sends its processes a signal that they may
    have received already.
    """
    stop = StopRequest()
    # None is a handler that was not set by Python, which could not be set again.
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    previous = {number: handler for number, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}

    def request(number: int, frame: FrameType | None) -> None:
        first, stop.requested = not stop.requested, True
        if not ignore_repeats:
            signal.signal(number, previous[signal.Signals(number)])
        if first:
            say("stopping after this step …")

    for number in previous:
        signal.signal(number, request)
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def ignore_signals() -> None:
    """Makes this process ignore SIGINT, SIGTERM and SIGHUP.

    For worker processes: the terminal and schedulers signal the whole process group, and the main process alone decides
    when to stop.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
