"""Work done by threads before its results are needed."""

from __future__ import annotations

import time

import pytest

from fastperc.training.prefetch import prefetch


def test_results_come_in_order_and_no_more_than_the_depth_are_computed_ahead():
    begun = []

    def work(item):
        begun.append(item)
        time.sleep(0.01 * (item % 3))
        return item * item

    results = prefetch(work, iter(range(50)), threads=3, depth=5)
    assert [next(results) for _ in range(4)] == [0, 1, 4, 9]
    results.close()
    assert len(begun) <= 4 + 5, "no more than was asked for and five"
    assert list(prefetch(work, range(20), 3, 5)) == [item * item for item in range(20)]
    failing = prefetch(lambda item: 1 // (item - 2), range(9), 2, 4)
    assert [next(failing), next(failing)] == [-1, -1]
    with pytest.raises(ZeroDivisionError):
        next(failing)
