"""Work done by threads before its results are needed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def prefetch(work: Callable[[Item], Result], items: Iterable[Item], threads: int, depth: int) -> Iterator[Result]:
    """``work(item)`` for each of ``items``, in their order, computed by ``threads`` threads.

    At most ``depth`` results are computed before they are asked for. An exception in ``work`` is raised when its
    result is asked for.
    """
    remaining = iter(items)
    pool = ThreadPoolExecutor(threads)
    try:
        pending: deque[Future[Result]] = deque(pool.submit(work, item) for item in islice(remaining, depth))
        while pending:
            result = pending.popleft().result()
            pending.extend(pool.submit(work, item) for item in islice(remaining, 1))
            yield result
    finally:
        pool.shutdown(cancel_futures=True)
