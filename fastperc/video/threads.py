"""Threads that read frames ahead of the painting and write pictures behind it, with bounded queues between them."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from queue import Empty, Full, Queue
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
NICE = 19  # how much less urgent reading and writing is than painting
POLL = 0.05  # seconds between two looks at whether the other side has ended


def give_way() -> None:
    """Lets painting go before this thread and those that it starts. Only Linux has priorities of single threads."""
    if sys.platform == "linux":
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)


def giving_way(call: Callable[[], Result]) -> Result:
    """What ``call`` returns, run in a thread that gives way, as do the threads that FFmpeg starts in it."""

    def run() -> Result:
        give_way()
        return call()

    with ThreadPoolExecutor(1, "fastperc-open") as pool:
        return pool.submit(run).result()


class Failed:
    """An exception of a thread, on its way to the other."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


END = object()


def ahead(items: Iterable[Item], depth: int) -> Generator[Item, None, None]:
    """``items``, which a thread takes from their iterator up to ``depth`` before they are asked for.

    An exception of the iterator is raised here. Closing this generator ends the thread and waits for it.
    """
    queue: Queue[Any] = Queue(depth)
    stop = threading.Event()

    def put(item: object) -> bool:
        while not stop.is_set():
            try:
                queue.put(item, timeout=POLL)
                return True
            except Full:
                continue
        return False

    def run() -> None:
        give_way()
        try:
            for item in items:
                if not put(item):
                    return
            put(END)
        except BaseException as error:
            put(Failed(error))

    thread = threading.Thread(target=run, name="fastperc-ahead", daemon=True)
    thread.start()
    try:
        while (item := queue.get()) is not END:
            if isinstance(item, Failed):
                raise item.error
            yield item
    finally:
        stop.set()
        thread.join()


class Behind(Generic[Item]):
    """A context manager: ``put(item)`` has a thread call ``work(item)``, in order, while at most ``depth`` items wait.

    An exception of ``work`` is raised by the next ``put``, or at the end of the block, which waits until all is done.
    If the block raises, what waits is dropped. Several threads may call ``put``.
    """

    def __init__(self, work: Callable[[Item], None], depth: int) -> None:
        self._work, self._queue = work, Queue[Any](depth)
        self._error: BaseException | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fastperc-behind", daemon=True)

    def __enter__(self) -> Behind[Item]:
        self._thread.start()
        return self

    def put(self, item: Item) -> None:
        """Waits for a place in the queue and leaves ``item`` there. Raises the exception of an earlier item."""
        self._put(item)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._put(END)
                self._thread.join()
                self._raise()
        finally:
            self._stop.set()
            self._thread.join()

    def _put(self, item: object) -> None:
        while True:
            self._raise()
            try:
                self._queue.put(item, timeout=POLL)
                return
            except Full:
                continue

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        give_way()
        while not self._stop.is_set():
            try:
                item = self._queue.get(timeout=POLL)
            except Empty:
                continue
            if item is END:
                return
            try:
                self._work(item)
            except BaseException as error:
                self._error = error
                return
