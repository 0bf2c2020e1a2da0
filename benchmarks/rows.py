"""A measured row: what it holds, where it is kept, and how it is told apart. Standard library only.

A row is a dict with exactly the keys of ``FIELDS``. ``KEY`` says which rows are of the same thing: of two such, the
newer one counts. ``source`` is the state of the kernel's files when it was measured; ``is_current`` compares it with
today's.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

Row = dict[str, Any]

FIELDS = {
    "operation": "its name, as in bench_<operation>.py",
    "direction": "forward, forward+backward, inference, video or training step",
    "shape": "as people write it: 4x3x256x256",
    "dtype": "fp32, bf16, or amp: float32 under autocast to bfloat16",
    "provider": "who computed it; see providers.py",
    "device": "the processor's name",
    "date": "UTC, to the second",
    "commit": "short hash of the checkout, with + when files differed from it; null outside a repository",
    "source": "hash of the kernel's files at the time; see source_hash",
    "torch": "version",
    "triton": "version, or null",
    "cuda": "version that torch was built with, or null",
    "median_ms": "of the rounds; of a video, for a frame",
    "iqr_ms": "spread: between the first and the third quartile",
    "rounds": "how many",
    "bytes": "the fewest to move, each input read and each output written once",
    "flops": "the floating-point operations to do",
    "gb_per_s": "bytes over the median",
    "tflop_per_s": "flops over the median",
    "bandwidth_gb_per_s": "the device's own, measured in the same session: a large copy, read plus written",
    "rate_tflop_per_s": "the device's own in this dtype, measured in the same session: a large matrix product",
    "floor_ms": "what bytes and flops take at those two",
    "share_of_floor": "floor over median; 1 is perfect, more means that a cache beat the memory",
    "error": "largest relative error of results and gradients against float64, before the timing",
    "peak_bytes": "most memory held at once beyond inputs and weights, or null where it was not tracked",
}
KEY = ("device", "operation", "direction", "shape", "dtype", "provider")
CASE = KEY[:-1]  # one case, several providers
OPTIONAL = {"commit", "source", "triton", "cuda", "peak_bytes"}
# What rows measured before these fields existed do not have.
ADDED = {
    "bytes",
    "flops",
    "tflop_per_s",
    "bandwidth_gb_per_s",
    "rate_tflop_per_s",
    "floor_ms",
    "share_of_floor",
    "error",
}

# What an operation runs on. In the kernels' folders, files of these names; of an operation not listed, its own name.
KERNEL_FOLDERS = ("csrc", "kernels", "fastperc/ops")
WINOGRAD = ("conv3x3", "frozen", "packing", "winograd", "winograd_gradient", "winograd_tile")
CONVOLUTION = (*WINOGRAD, "conv_bn_relu", "configs", "deferred", "image_io", "instance_norm", "norm_relu", "onednn")
CHAIN = ("conv_chain", "fold_gradient", "layer", "weight_gradient")
RGB = ("rgb_conv", "rgb_conv_head", "rgb_conv_stem")
LOSS = (*WINOGRAD, "vgg_loss", "configs", "gram_loss", "tv_loss", "vgg_chain")
KERNELS = {
    "conv3x3": WINOGRAD,
    "conv_bn_relu": (*CONVOLUTION, *CHAIN),
    "residual_block": (*CONVOLUTION, *CHAIN),
    "rgb_conv": (*CONVOLUTION, *RGB),
    "subpixel_conv_bn_relu": (*CONVOLUTION, *CHAIN, "subpixel_conv_bn_relu"),
    "inference": (*CONVOLUTION, *RGB, "subpixel_conv_bn_relu"),
    "vgg_loss": LOSS,
    "training": (*LOSS, *CONVOLUTION, *CHAIN, *RGB, "subpixel_conv_bn_relu"),
}
# Besides, these files, and the Python files in these folders.
MODULES = ("fastperc/models", "fastperc/modules")
OTHERS = {
    "inference": ("fastperc/engine", *MODULES),
    "vgg_loss": ("fastperc/losses", *MODULES),
    "training": ("fastperc/losses", *MODULES),
}
FUSED = ("fused", "fused-graph")


def check(row: Row) -> Row:
    """``row``, if it holds what ``FIELDS`` says and a median above zero.

    Raises:
        ValueError: naming the fields that are wrong.
    """
    wrong = sorted(row.keys() ^ FIELDS.keys())
    wrong += [f for f in FIELDS if row.get(f) is None and f not in OPTIONAL | ADDED and f not in wrong]
    if not wrong and not (row["median_ms"] > 0 and row["rounds"] >= 1):
        wrong = ["median_ms", "rounds"]
    if wrong:
        raise ValueError(f"a row with missing, unknown or empty fields: {', '.join(wrong)}: {row}")
    return row


def key(row: Row, fields: tuple[str, ...] = KEY) -> tuple[str, ...]:
    return tuple(row[field] for field in fields)


def merge(*batches: Iterable[Row]) -> list[Row]:
    """All rows in order of their keys; of those with the same key the newest (of equally new ones, the last)."""
    newest: dict[tuple[str, ...], Row] = {}
    for batch in batches:
        for row in batch:
            held = newest.get(key(row))
            if held is None or row["date"] >= held["date"]:
                newest[key(row)] = row
    return [newest[k] for k in sorted(newest)]


def read(path: Path) -> list[Row]:
    """The rows of a file: our own JSON, JSON lines as they are measured, or what ``--benchmark-json`` wrote.

    A last line that a killed run left unfinished is dropped.
    """
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        lines = text.split("\n")  # what follows the last line break was never finished
        return [check(json.loads(line)) for line in lines[:-1] if line]
    data = json.loads(text)
    if isinstance(data, dict):
        data = [benchmark["extra_info"] for benchmark in data["benchmarks"] if "provider" in benchmark["extra_info"]]
    return [check(row) for row in data]


def append(path: Path, row: Row) -> None:
    """Adds ``row`` to a file of JSON lines, at once and for good: a run killed later keeps it."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(check(row)) + "\n")
        file.flush()
        os.fsync(file.fileno())


def write(path: Path, rows: Iterable[Row]) -> None:
    """One row a line, so that a diff shows what was measured anew."""
    lines = ",\n  ".join(json.dumps({field: row[field] for field in FIELDS}) for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"[\n  {lines}\n]\n" if lines else "[]\n", encoding="utf-8")


def results_file(device: str, cuda: str | None) -> Path:
    """Where a device's rows are kept: all CPUs in one file, each GPU in its own."""
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") if cuda else "cpu"
    return RESULTS / f"{slug}.json"


def is_gpu(row: Row) -> bool:
    return row["cuda"] is not None


def sources(operation: str) -> Iterator[Path]:
    """The files that decide how fast ``operation`` is."""
    for folder in KERNEL_FOLDERS:
        for name in dict.fromkeys(KERNELS.get(operation, (operation,))):
            yield from sorted(p for p in (ROOT / folder).glob(f"{name}.*") if p.is_file())
    for name in OTHERS.get(operation, ()):
        path = ROOT / name
        yield from [path] if path.is_file() else sorted(path.glob("*.py"))


@cache
def source_hash(operation: str) -> str | None:
    """A short hash of the kernel's files, or ``None`` for an operation that has none yet."""
    digest, found = hashlib.sha256(), False
    for path in sources(operation):
        found = True
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12] if found else None


def is_current(row: Row) -> bool:
    """Whether what ``row`` measured is what the checkout holds. A peer does not depend on our kernels."""
    return row["provider"] not in FUSED or row["source"] == source_hash(row["operation"])


@cache
def commit() -> str | None:
    """The checkout's commit, with + when tracked files differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True).stdout

    try:
        differs = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short", "HEAD").strip() + "+" * bool(differs)
    except (OSError, subprocess.CalledProcessError):
        return None
