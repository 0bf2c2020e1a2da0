"""A made-up measured row. Importing this module puts ``benchmarks/`` on the path."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
if str(BENCHMARKS) not in sys.path:
    sys.path.insert(0, str(BENCHMARKS))

import rows  # noqa: E402


def row(**changes: Any) -> rows.Row:
    """A row of fastperc's total variation on an imaginary GPU, with today's sources and other fields as given."""
    plain = dict.fromkeys(rows.FIELDS, 1.0) | dict(
        operation="tv_loss",
        direction="forward+backward",
        shape="4x3x256x256",
        dtype="bf16",
        provider="fused",
        device="Imaginary G1",
        date="2026-01-02T03:04:05Z",
        commit="abcdef0",
        source=rows.source_hash("tv_loss"),
        torch="2.11.0",
        triton="3.6.0",
        cuda="13.0",
        median_ms=0.5,
        rounds=100,
        peak_bytes=None,
        timed_once=False,
    )
    return plain | changes
