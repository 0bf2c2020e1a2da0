"""Progress of long work on stderr: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

T = TypeVar("T")


class ProgressConsole(Console):
    """A console that falls silent where nobody reads it any more. The work goes on; rich would end the process."""

    def on_broken_pipe(self) -> None:
        self.quiet = True

    def _check_buffer(self) -> None:  # which writes
        try:
            super()._check_buffer()
        except OSError:  # the terminal was closed, or the disk of a log file is full
            self.on_broken_pipe()


console = ProgressConsole(stderr=True, highlight=False, soft_wrap=True, emoji=False)
SECONDS_BETWEEN_LINES = 15.0
SPEED_SECONDS = 30.0  # the speed shown is the mean over the last so many seconds


def say(line: str) -> None:
    """Prints ``line`` on stderr, above a running bar. Line breaks, which a file name may hold, become spaces."""
    console.print(" ".join(line.splitlines()), markup=False)


@contextmanager
def silent(silently: bool = True) -> Iterator[None]:
    """Suppresses this module's output while the block runs; does nothing with ``silently=False``."""
    before, console.quiet = console.quiet, console.quiet or silently
    try:
        yield
    finally:
        console.quiet = before


class TimeLeftColumn(TimeRemainingColumn):
    """The time left as :meth:`Meter.advance` was given it, or else by the speed."""

    def render(self, task: Task) -> Text:
        left = task.fields["seconds_left"]
        if left is None:
            return super().render(task)
        minutes, seconds = divmod(round(left), 60)
        return Text(f"{minutes // 60}:{minutes % 60:02}:{seconds:02}", style="progress.remaining")


class Meter:
    """A context manager that counts from ``start`` to ``total`` and shows count, note, speed and time left."""

    def __init__(self, title: str, total: int, start: int = 0) -> None:
        self.title, self.total, self.done = title, total, start
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeLeftColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(title, total=total, completed=start, note="", seconds_left=None)

    def __enter__(self) -> Meter:
        self._last_line = time.monotonic()
        self._recent = deque([(self._last_line, self.done)])  # (time, count), the oldest first
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def expect(self, total: int) -> None:
        """Counts to ``total`` from now on."""
        if total != self.total:
            self.total = total
            self._bar.update(self._task, total=total)

    def advance(self, note: str = "", seconds_left: float | None = None) -> None:
        """Adds one to the count and shows ``note`` beside it.

        The time left is ``seconds_left``, or by default what the recent speed says.
        """
        self.done += 1
        now = time.monotonic()
        self._recent.append((now, self.done))
        while now - self._recent[1][0] > SPEED_SECONDS:
            self._recent.popleft()
        before, done_before = self._recent[0]
        speed = (self.done - done_before) / max(now - before, 1e-9)
        note = f"{note}  {speed:.2f}/s".strip()
        left = (self.total - self.done) / speed if seconds_left is None else seconds_left
        self._bar.update(self._task, completed=self.done, note=note, seconds_left=seconds_left)
        if not console.is_terminal and (now - self._last_line > SECONDS_BETWEEN_LINES or self.done == self.total):
            say(f"{self.title}  {self.done}/{self.total}  {note}  {left:.0f} s left")
            self._last_line = now


def track(items: Iterable[T], title: str, total: int) -> Iterator[T]:
    """Yields ``items`` and counts them with a :class:`Meter`."""
    with Meter(title, total) as meter:
        for item in items:
            yield item
            meter.advance()


# A function that passes items on and shows how many are done: (items, title, total) → items. ``track`` is one.
Watch = Callable[[Iterable[int], str, int], Iterable[int]]


def unwatched(items: Iterable[int], title: str, total: int) -> Iterable[int]:
    """A :data:`Watch` that shows nothing."""
    return items
