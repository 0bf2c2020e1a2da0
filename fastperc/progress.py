"""What long work shows while it runs: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")
console = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)
SECONDS_BETWEEN_LINES = 15.0
SECONDS_OF_SPEED = 30.0  # the speed shown is that of so long ago until now


def say(line: str) -> None:
    """Prints ``line`` on stderr, above the bar if one is running; as one line, whatever file names it holds."""
    console.print(" ".join(line.splitlines()), markup=False)


@contextmanager
def silent(silently: bool = True) -> Iterator[None]:
    """Nothing is shown while the block runs, unless not ``silently``."""
    before, console.quiet = console.quiet, console.quiet or silently
    try:
        yield
    finally:
        console.quiet = before


class Meter:
    """Counts from ``start`` towards ``total``, with a note, the speed and the time left; a context manager."""

    def __init__(self, title: str, total: int, start: int = 0) -> None:
        self.title, self.total, self.done = title, total, start
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(title, total=total, completed=start, note="")

    def __enter__(self) -> Meter:
        self._last_line = time.monotonic()
        self._recent = deque([(self._last_line, self.done)])  # moments and counts, the oldest first
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def advance(self, note: str = "") -> None:
        """One more done."""
        self.done += 1
        now = time.monotonic()
        self._recent.append((now, self.done))
        while now - self._recent[1][0] > SECONDS_OF_SPEED:
            self._recent.popleft()
        then, done_then = self._recent[0]
        speed = (self.done - done_then) / max(now - then, 1e-9)
        note = f"{note}  {speed:.2f}/s".strip()
        self._bar.update(self._task, completed=self.done, note=note)
        if not console.is_terminal and (now - self._last_line > SECONDS_BETWEEN_LINES or self.done == self.total):
            say(f"{self.title}  {self.done}/{self.total}  {note}  {(self.total - self.done) / speed:.0f} s left")
            self._last_line = now


def track(items: Iterable[T], title: str, total: int) -> Iterator[T]:
    """``items`` as they come, with a :class:`Meter` counting them."""
    with Meter(title, total) as meter:
        for item in items:
            yield item
            meter.advance()


Watch = Callable[[Iterable[int], str, int], Iterable[int]]  # shows how work gets on: items, title, total


def unwatched(items: Iterable[int], title: str, total: int) -> Iterable[int]:
    """For work that nobody watches."""
    return items
