"""Measured rows side by side: the providers of each case, and the words and numbers that tables and figures show."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import groupby
from math import floor, log10
from typing import NamedTuple

import operations
import rows
from rows import CASE, FUSED, Row

PROVIDER_TITLES = {  # by the names in providers.py, in the order of the columns
    "reference": "eager PyTorch",
    "graph": "eager, CUDA graph",
    "folded": "norm folded",
    "folded-graph": "norm folded, CUDA graph",
    "cudnn-fused": "cuDNN's fused conv",
    "compile": "`torch.compile`",
    "compile-freezing": "`torch.compile`, freezing",
    "max-autotune": "`max-autotune`",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "fused": "fastperc",
    "fused-graph": "fastperc, CUDA graph",
}


class Comparison(NamedTuple):
    """The rows of one case by provider, without rows of fastperc whose code has changed since."""

    rows: dict[str, Row]
    stale: bool  # whether such rows were left out

    @property
    def case(self) -> Row:
        """A row of the case, for its operation, direction, shape, dtype and device."""
        return next(iter(self.rows.values()))

    @property
    def key(self) -> tuple[str, ...]:
        """What is compared, on any device."""
        return rows.key(self.case, CASE)

    @property
    def ours(self) -> Row | None:
        """fastperc's fastest row."""
        return self._fastest(fused=True)

    @property
    def eager(self) -> Row | None:
        """The row of eager PyTorch."""
        return self.rows.get("reference")

    @property
    def best_peer(self) -> Row | None:
        """The fastest row that is not fastperc's; eager PyTorch counts."""
        return self._fastest(fused=False)

    def _fastest(self, fused: bool) -> Row | None:
        candidates = [row for provider, row in self.rows.items() if (provider in FUSED) == fused]
        return min(candidates, key=lambda row: row["median_ms"], default=None)

    def speedup_over(self, peer: Row | None) -> float | None:
        """How many times faster than ``peer`` fastperc is; ``None`` if either was not measured."""
        ours = self.ours
        return peer["median_ms"] / ours["median_ms"] if ours and peer else None


def compare(measured: Iterable[Row]) -> list[Comparison]:
    """A comparison for each case, in the order of ``operations.names()``; rows of other names are left out."""
    names = operations.names()
    ordered = sorted((row for row in measured if row["operation"] in names), key=place)
    comparisons = []
    for _, group in groupby(ordered, key=lambda row: rows.key(row, ("device", *CASE))):
        by_provider = {row["provider"]: row for row in group}
        current = {
            provider: by_provider[provider]
            for provider in PROVIDER_TITLES
            if provider in by_provider and rows.is_current(by_provider[provider])
        }
        stale = any(provider in FUSED for provider in by_provider.keys() - current.keys())
        if current:
            comparisons.append(Comparison(current, stale))
    return comparisons


def place(row: Row) -> tuple[int, str, bool]:
    """The place of a row in the tables, as a key to sort by."""
    return operations.names().index(row["operation"]), row["shape"].split(",")[0], row["dtype"] != "fp32"


def in_order(comparisons: Iterable[Comparison]) -> list[Comparison]:
    """Comparisons of several devices in the order of :func:`compare`."""
    return sorted(comparisons, key=lambda comparison: place(comparison.case))


def with_fastperc(measured: Iterable[Row]) -> list[Comparison]:
    """The comparisons that have a row of fastperc, current or stale."""
    return [comparison for comparison in compare(measured) if comparison.stale or comparison.ours]


def title(row: Row) -> str:
    """What was measured: ``Gram loss, forward+backward``."""
    return f"{operations.benchmark(row['operation']).title}, {row['direction']}"


def shape(row: Row) -> str:
    """The input's shape with ``×`` between numbers."""
    return re.sub(r"x(?=\d)", "×", row["shape"])


def number(x: float) -> str:
    """``x`` with three significant digits and no exponent."""
    return f"{x:.{max(0, 2 - floor(log10(x)))}f}"


def times(x: float | None) -> str:
    """A factor: ``1.15×``, ``2.3×``, ``23×``; empty for ``None``."""
    if x is None:
        return ""
    return f"{x:.2f}×" if x < 2 else f"{x:.1f}×" if x < 20 else f"{x:.0f}×"
