"""Merges measured rows into results/<device>.json, and renders the README's tables and the figures from those.

    python benchmarks/report.py [DIR | rows.jsonl | pytest-benchmark.json ...]
    python benchmarks/report.py --check       the README is what the results render to (for CI; changes nothing)

Nothing is shown without a measured row, and a kernel whose files have changed since is shown as not measured.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from math import floor, log10
from pathlib import Path
from typing import NamedTuple

import rows
from rows import FUSED, RESULTS, ROOT, Row, is_current

README = ROOT / "README.md"
BEGIN, END = "<!-- performance -->", "<!-- /performance -->"
NOT_MEASURED = "*not measured*"

OPERATIONS = {  # in the order of the tables
    "tv_loss": "Total variation",
    "gram_loss": "Gram loss",
    "vgg_loss": "Loss network",
    "training": "Network",
    "inference": "Network",
    "norm_relu": "Norm, ReLU",
    "conv3x3": "3×3 conv",
    "conv_bn_relu": "Conv, norm, ReLU",
    "residual_block": "Residual block",
    "subpixel_conv_bn_relu": "½-stride conv, norm, ReLU",
    "rgb_conv": "9×9 conv",
}
PROVIDERS = {  # in the order of the columns
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
    """The rows of one case, by provider; those of kernels that changed since are left out."""

    rows: dict[str, Row]
    stale: bool  # whether fastperc's were left out

    @property
    def case(self) -> Row:
        return next(iter(self.rows.values()))

    def fastest(self, ours: bool) -> Row | None:
        """The fastest row of fastperc's, or of its peers."""
        found = [row for name, row in self.rows.items() if (name in FUSED) == ours]
        return min(found, key=lambda row: row["median_ms"], default=None)

    def ratio(self, peer: Row | None) -> float | None:
        """How many times faster than ``peer`` fastperc's fastest is."""
        ours = self.fastest(ours=True)
        return peer["median_ms"] / ours["median_ms"] if ours and peer else None


def compare(measured: Iterable[Row]) -> list[Comparison]:
    """A comparison for each case, in the order of ``OPERATIONS``."""
    order = list(OPERATIONS)
    ordered = sorted(
        measured, key=lambda row: (order.index(row["operation"]), row["shape"].split(",")[0], row["dtype"] != "fp32")
    )
    found = []
    for _, group in groupby(ordered, key=lambda row: rows.key(row, rows.CASE)):
        by_provider = {row["provider"]: row for row in group}
        current = {
            name: by_provider[name] for name in PROVIDERS if name in by_provider and is_current(by_provider[name])
        }
        if current:
            found.append(Comparison(current, stale=any(name in FUSED for name in by_provider.keys() - current.keys())))
    return found


def with_fastperc(measured: Iterable[Row]) -> list[Comparison]:
    """The cases that fastperc has, or had, a kernel for."""
    return [c for c in compare(measured) if c.stale or c.fastest(ours=True)]


def describe(row: Row) -> str:
    return f"{OPERATIONS[row['operation']]}, {row['direction']}"


def shape(row: Row) -> str:
    return re.sub(r"x(?=\d)", "×", row["shape"])


def number(x: float) -> str:
    """Three significant digits, no exponent."""
    return f"{x:.{max(0, 2 - floor(log10(x)))}f}"


def times(x: float | None) -> str:
    return "" if x is None else f"{x:.2f}×" if x < 2 else f"{x:.1f}×" if x < 20 else f"{x:.0f}×"


def markdown(lines: Sequence[Sequence[str]], left: int) -> str:
    """A table whose first line is its head; the first ``left`` columns are text."""
    rule = ["---"] * left + ["---:"] * (len(lines[0]) - left)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (lines[0], rule, *lines[1:]))


def cell(row: Row | None, best: bool = False) -> str:
    """Milliseconds."""
    return "" if row is None else f"**{number(row['median_ms'])}**" if best else number(row["median_ms"])


def table(comparisons: Sequence[Comparison]) -> str:
    """Milliseconds of eager PyTorch, of its best rival and of fastperc, and what that gains."""
    on_gpu = rows.is_gpu(comparisons[0].case)
    head = ["operation", "input", "dtype", "best peer", "its ms", "eager PyTorch", "fastperc", "over eager"]
    lines = [[*head, "over best peer"] + ["share of floor"] * on_gpu]
    for c in comparisons:
        ours, eager, peer = c.fastest(ours=True), c.rows.get("reference"), c.fastest(ours=False)
        cells = [describe(c.case), shape(c.case), c.case["dtype"], PROVIDERS[peer["provider"]] if peer else ""]
        cells += [cell(peer), cell(eager), cell(ours, best=True) or NOT_MEASURED]
        cells += [times(c.ratio(eager)), times(c.ratio(peer))]
        if on_gpu:
            cells.append(f"{ours['share_of_floor']:.0%}" if ours and ours["share_of_floor"] is not None else "")
        lines.append(cells)
    return markdown(lines, left=4)


def networks(comparisons: Sequence[Comparison]) -> str:
    """Every provider's milliseconds for the whole networks in eval mode, or nothing."""
    chosen = [c for c in comparisons if c.case["operation"] == "inference"]
    columns = [name for name in PROVIDERS if any(name in c.rows for c in chosen)]
    lines = [["a network's ms by", "dtype", *(PROVIDERS[name] for name in columns)]]
    for c in chosen:
        fastest = min(c.rows.values(), key=lambda row: row["median_ms"])
        values = [cell(c.rows.get(name), c.rows.get(name) is fastest) for name in columns]
        video = f", {c.case['direction']}" * (c.case["direction"] != "inference")
        lines.append([shape(c.case) + video, c.case["dtype"], *values])
    return markdown(lines, left=2) if chosen else ""


def memory(comparisons: Sequence[Comparison]) -> str:
    """Peak memory where it was tracked, or nothing."""
    lines = [["peak memory beyond inputs and weights", "input", "eager PyTorch", "fastperc", ""]]
    for c in comparisons:
        peaks = [c.rows[name]["peak_bytes"] for name in ("reference", "fused") if name in c.rows]
        if len(peaks) == 2 and all(peaks):
            peer, ours = peaks
            megabytes = [f"{peer / 2**20:.0f} MiB", f"**{ours / 2**20:.0f} MiB**"]
            lines.append([describe(c.case), shape(c.case), *megabytes, f"{peer / ours:.1f}× less"])
    return markdown(lines, left=2) if len(lines) > 1 else ""


def devices() -> Iterator[tuple[Path, list[Row]]]:
    """Each file of results with the rows of the device that was measured last; GPUs before CPUs."""
    found = []
    for path in sorted(RESULTS.glob("*.json")):
        measured = rows.read(path)
        if measured:
            latest = max(measured, key=lambda row: row["date"])["device"]
            found.append((path, [row for row in measured if row["device"] == latest]))
    return iter(sorted(found, key=lambda entry: not rows.is_gpu(entry[1][0])))


def render() -> str:
    """What stands between the README's markers."""
    parts = []
    on_gpu = False
    for path, measured in devices():
        comparisons = with_fastperc(measured)
        if not comparisons:
            continue
        on_gpu |= rows.is_gpu(measured[0]) and any(c.fastest(ours=True) for c in comparisons)
        latest = max(measured, key=lambda row: row["date"])
        stack = f"torch {latest['torch']}" + f", Triton {latest['triton']}" * rows.is_gpu(latest)
        parts.append(
            f"**{latest['device']}**, {stack}, {latest['date'][:10]}: medians in milliseconds "
            f"([the rows](benchmarks/results/{path.name}))."
        )
        parts += [table(comparisons), networks(comparisons)]
        if any(c.fastest(ours=True) for c in comparisons):
            parts.append(f"![How many times faster than eager PyTorch](benchmarks/results/{speedup_file(path).name})")
            if rows.is_gpu(latest):
                parts.append(f"![Arithmetic under the device's roof](benchmarks/results/{roofline_file(path).name})")
        parts.append(memory(comparisons))
    if not on_gpu:
        parts.append("On a GPU: not measured.")
    return "\n\n".join(part for part in parts if part)


def speedup_file(path: Path) -> Path:
    return path.with_name(f"{path.stem}-speedup.svg")


def roofline_file(path: Path) -> Path:
    return path.with_name(f"{path.stem}-roofline.svg")


def between_markers(text: str, new: str) -> str:
    """``text`` with ``new`` between its two markers.

    Raises:
        ValueError: a marker is missing, or stands twice.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"the README needs {BEGIN} and {END}, once each")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{new}\n{END}{rest.split(END)[1]}"


def draw() -> None:
    """The figures of each device; one that nothing current was measured for is removed."""
    from figures import draw_roofline, draw_speedup

    for path, measured in devices():
        comparisons = [c for c in with_fastperc(measured) if c.fastest(ours=True)]
        # A roof is a bound where caches start cold: on GPUs, whose caches are evicted before each round.
        on_gpu = rows.is_gpu(measured[0])
        for file, drawn, wanted in (
            (speedup_file(path), draw_speedup, comparisons),
            (roofline_file(path), draw_roofline, comparisons if on_gpu else []),
        ):
            if wanted:
                drawn(wanted, file)
            else:
                file.unlink(missing_ok=True)


def collect(paths: Iterable[Path]) -> Iterator[Row]:
    """The rows of files, and of the files in folders."""
    for path in paths:
        files = sorted([*path.glob("*.jsonl"), *path.glob("*.json")]) if path.is_dir() else [path]
        for file in files:
            yield from rows.read(file)


def keep(measured: Iterable[Row]) -> None:
    """Merges rows into the files of their devices."""
    by_file: dict[Path, list[Row]] = {}
    for row in measured:
        if row["commit"] is None and row["source"] == rows.source_hash(row["operation"]):
            row["commit"] = rows.commit()  # measured on a copy without a history, of the very files that are here
        by_file.setdefault(rows.results_file(row["device"], row["cuda"]), []).append(row)
    for file, new in by_file.items():
        rows.write(file, rows.merge(rows.read(file) if file.exists() else [], new))
        print(f"{len(new)} rows into {file.relative_to(ROOT)}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", type=Path, metavar="PATH", help="rows to merge")
    parser.add_argument("--check", action="store_true", help="fail if the README is not up to date; change nothing")
    arguments = parser.parse_args(argv)

    text = README.read_text(encoding="utf-8")
    if arguments.check:
        if between_markers(text, render()) == text:
            return 0
        print("README.md: its measurements are not what benchmarks/results render to, or a kernel has changed since.")
        print("Run: python benchmarks/report.py")
        return 1
    keep(collect(arguments.paths))
    README.write_text(between_markers(text, render()), encoding="utf-8")
    draw()
    return 0


if __name__ == "__main__":
    sys.exit(main())
