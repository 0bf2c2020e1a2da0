"""Stop requests: SIGINT (Ctrl-C) and SIGTERM end a run after the step that is running."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from fastperc.progress import say

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Whether a signal has asked the run to stop."""

    requested = False


@contextmanager
def stop_requests(ignore_repeats: bool = False) -> Iterator[StopRequest]:
    """Turns SIGINT and SIGTERM into a :class:`StopRequest` while the block runs.

    A second signal acts as it would without this block. With ``ignore_repeats`` it does nothing: a launcher such as
    ``torchrun`` sends its processes a signal that they may have received already.
    """
    stop = StopRequest()
    previous = {number: signal.getsignal(number) for number in SIGNALS}

    def request(number: int, frame: FrameType | None) -> None:
        if not stop.requested:
            say("stopping after this step …")
        stop.requested = True
        if not ignore_repeats:
            signal.signal(number, previous[signal.Signals(number)])

    for number in SIGNALS:
        signal.signal(number, request)
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def ignore_signals() -> None:
    """Makes this process ignore SIGINT and SIGTERM.

    For worker processes: the terminal and schedulers signal the whole process group, and the main process alone decides
    when to stop.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
