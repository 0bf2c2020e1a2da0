"""Measured rows: their fields, and the files that hold them. Standard library only.

A row is a dict with exactly the keys of ``FIELDS``. Two rows with the same ``KEY`` measure the same thing, and the
newer one counts. ``source`` is a hash of the kernel's source files at the time; ``is_current`` compares it with now.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import operations
from operations import ROOT

RESULTS = ROOT / "benchmarks" / "results"

Row = dict[str, Any]

FIELDS = {
    "operation": "the benchmark's name, as in bench_<operation>.py",
    "direction": "forward, forward+backward, inference, video or training step",
    "shape": "of the input: 4x3x256x256",
    "dtype": "fp32, bf16, or amp: float32 under autocast to bfloat16",
    "provider": "who computed it; see providers.py",
    "device": "the GPU's name, or the processor's model, cores and vector instructions",
    "date": "UTC, to the second",
    "commit": "short hash of the checkout, with + when files differed from it; null outside a repository",
    "source": "hash of the kernel's files at the time; see source_hash",
    "torch": "version",
    "triton": "version, or null",
    "cuda": "version that torch was built with, or null",
    "median_ms": "median of the rounds; for a video, per frame",
    "iqr_ms": "spread: from the first to the third quartile",
    "rounds": "number of rounds",
    "timed_once": "whether it was so much slower than the best that it was timed once; see harness.CLIFF",
    "bytes": "the fewest bytes to move: each input read once and each output written once",
    "flops": "the floating-point operations to do",
    "gb_per_s": "bytes over the median",
    "tflop_per_s": "flops over the median",
    "bandwidth_gb_per_s": "the device's own, measured in the same session: a large copy, read plus written",
    "rate_tflop_per_s": "the device's own in this dtype, measured in the same session: a large matrix product",
    "floor_ms": "the time that bytes and flops take at those two rates",
    "share_of_floor": "floor over median; 1 is perfect, more means that a cache beat the memory",
    "error": "largest relative error of results and gradients against float64, before the timing",
    "peak_bytes": "most memory held at once beyond inputs and weights, or null where it was not tracked",
}
CASE = ("operation", "direction", "shape", "dtype")  # a case has one row for each provider on each device
KEY = ("device", *CASE, "provider")
OPTIONAL = {"commit", "source", "triton", "cuda", "peak_bytes"}
# Fields that rows measured before they existed do not have.
ADDED = {
    "bytes",
    "flops",
    "tflop_per_s",
    "bandwidth_gb_per_s",
    "rate_tflop_per_s",
    "floor_ms",
    "share_of_floor",
    "error",
    "timed_once",
}
EMULATED = ", emulated"  # ends the name of a device whose better instructions are hidden
FUSED = ("fused", "fused-graph")  # fastperc's own providers


def check(row: Row) -> Row:
    """Returns ``row`` if it has exactly the fields of ``FIELDS``, a median above zero and at least one round.

    Raises:
        ValueError: the message names the fields that are wrong.
    """
    wrong = sorted(row.keys() ^ FIELDS.keys())
    wrong += [
        field for field in FIELDS if row.get(field) is None and field not in OPTIONAL | ADDED and field not in wrong
    ]
    if not wrong and not (row["median_ms"] > 0 and row["rounds"] >= 1):
        wrong = ["median_ms", "rounds"]
    if wrong:
        raise ValueError(f"row with missing, unknown or empty fields: {', '.join(wrong)}: {row}")
    return row


def key(row: Row, fields: tuple[str, ...] = KEY) -> tuple[str, ...]:
    """The values of ``fields`` in ``row``."""
    return tuple(row[field] for field in fields)


def merge(*batches: Iterable[Row]) -> list[Row]:
    """All rows, sorted by key. Of rows with the same key it keeps the newest; of equally new ones, the last."""
    newest: dict[tuple[str, ...], Row] = {}
    for batch in batches:
        for row in batch:
            known = newest.get(key(row))
            if known is None or row["date"] >= known["date"]:
                newest[key(row)] = row
    return [newest[k] for k in sorted(newest)]


def read(path: Path) -> list[Row]:
    """The rows of a file: JSON of :func:`write`, JSON lines of :func:`append`, or pytest's ``--benchmark-json``.

    Skips a last line that a killed run left unfinished.

    Raises:
        ValueError: a row has wrong fields.
    """
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        complete_lines = text.split("\n")[:-1]
        return [check(json.loads(line)) for line in complete_lines if line]
    data = json.loads(text)
    if isinstance(data, dict):
        data = [benchmark["extra_info"] for benchmark in data["benchmarks"] if "provider" in benchmark["extra_info"]]
    return [check(row) for row in data]


def append(path: Path, row: Row) -> None:
    """Appends ``row`` to a file of JSON lines and flushes it to disk, so that a run killed later keeps it."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(check(row)) + "\n")
        file.flush()
        os.fsync(file.fileno())


def write(path: Path, rows: Iterable[Row]) -> None:
    """Writes JSON with one row per line, so that a diff shows which rows are new."""
    lines = ",\n  ".join(json.dumps({field: row[field] for field in FIELDS}) for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"[\n  {lines}\n]\n" if lines else "[]\n", encoding="utf-8")


def results_file(device: str) -> Path:
    """The file of a device's rows: its name in lower case, with hyphens between words.

    Raises:
        ValueError: the device is emulated, so that its rows are no machine's.
    """
    if device.endswith(EMULATED):
        raise ValueError(f"{device}: rows with hidden instruction sets are not kept as results")
    return RESULTS / f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.json"


def is_gpu(row: Row) -> bool:
    """Whether ``row`` was measured on a GPU."""
    return row["cuda"] is not None


def sources(operation: str) -> list[Path]:
    """The files that decide how fast ``operation`` is; see operations.py."""
    return operations.sources(operation)


@cache
def source_hash(operation: str) -> str | None:
    """A short hash of the files of :func:`sources`, or ``None`` if there are none."""
    files = sources(operation)
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.relative_to(operations.ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12] if files else None


def is_current(row: Row) -> bool:
    """Whether the code that ``row`` measured is the checkout's. Rows of other libraries are always current."""
    return row["provider"] not in FUSED or row["source"] == source_hash(row["operation"])


@cache
def commit() -> str | None:
    """The checkout's short commit hash, with + when tracked files differ from it; ``None`` outside a repository."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True).stdout

    try:
        differs = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short", "HEAD").strip() + "+" * bool(differs)
    except (OSError, subprocess.CalledProcessError):
        return None
