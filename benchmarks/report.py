"""Merges measured rows into results/<device>.json, and renders docs/performance.md, README's table and the figures.

    python benchmarks/report.py [DIR | rows.jsonl | pytest-benchmark.json ...]
    python benchmarks/report.py --check       fail if a document is not what the results render to; change nothing

Only measured rows are shown. A row of fastperc whose source files have changed since is shown as not measured.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import rows
from comparison import PROVIDER_TITLES, Comparison, in_order, number, shape, times, title, with_fastperc
from rows import RESULTS, ROOT, Row

README, PERFORMANCE = ROOT / "README.md", ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- performance -->", "<!-- /performance -->"
NOT_MEASURED = "*not measured*"
NOT_MEASURED_NOTE = f"{NOT_MEASURED}: fastperc's code has changed since this was last measured."
TIMED_ONCE = " (once)"  # after the time of such a row
TIMED_ONCE_NOTE = "*(once)*: so much slower than the best that it was timed once."
NO_GPU = "On a GPU: not measured."
PROCESSORS_SHOWN = 2  # side by side
NETWORKS = ("inference", "gallery")  # benchmarks of whole networks

# README's rows: of each operation and direction the first case whose shape starts so.
HIGHLIGHTS = (
    ("inference", "inference", "great_wave"),
    ("inference", "inference", "x4"),
    ("training", "training step", "paper"),
    ("vgg_loss", "forward+backward", ""),
    ("gram_loss", "forward+backward", ""),
    ("conv_bn_relu", "inference", ""),
)


class Device(NamedTuple):
    """The rows of one device."""

    file: Path  # that holds them
    rows: list[Row]
    comparisons: list[Comparison]  # not empty

    @property
    def on_gpu(self) -> bool:
        """Whether it is a GPU."""
        return rows.is_gpu(self.rows[0])

    @property
    def is_measured(self) -> bool:
        """Whether any row of fastperc is current."""
        return any(comparison.ours for comparison in self.comparisons)

    @property
    def heading(self) -> str:
        """The device, the software and the date of the newest row."""
        newest = max(self.rows, key=lambda row: row["date"])
        triton = f", Triton {newest['triton']}" if self.on_gpu else ""
        return f"**{self.name}**, torch {newest['torch']}{triton}, {newest['date'][:10]}"

    @property
    def name(self) -> str:
        """The device, as its rows name it."""
        return self.rows[0]["device"]

    @property
    def date(self) -> str:
        """When the newest row was measured."""
        return max(row["date"] for row in self.rows)

    @property
    def is_mostly_measured(self) -> bool:
        """Whether fastperc has a current row in more than half of the comparisons."""
        return 2 * sum(comparison.ours is not None for comparison in self.comparisons) > len(self.comparisons)

    def figure(self, kind: str) -> Path:
        """The file of a figure: ``speedup`` or ``roofline``."""
        return self.file.with_name(f"{self.file.stem}-{kind}.svg")


def all_devices() -> list[Device]:
    """The device of each file of results, without those that fastperc has no row of."""
    files = ((path, rows.read(path)) for path in sorted(RESULTS.glob("*.json")))
    measured = (Device(path, of_file, with_fastperc(of_file)) for path, of_file in files if of_file)
    return [device for device in measured if device.comparisons]


def devices() -> list[Device]:
    """The devices that the documents show: every GPU, then the processors measured last.

    A processor whose rows are mostly of changed code is left out, unless there is no better one.
    """
    gpus = [device for device in all_devices() if device.on_gpu]
    processors = [device for device in all_devices() if not device.on_gpu]
    processors.sort(key=lambda device: device.date, reverse=True)
    current = [device for device in processors if device.is_mostly_measured]
    return gpus + (current or processors[:1])[:PROCESSORS_SHOWN]


def markdown_table(lines: Sequence[Sequence[str]], text_columns: int) -> str:
    """A table whose first line is its head; columns after the first ``text_columns`` are numbers."""
    rule = ["---"] * text_columns + ["---:"] * (len(lines[0]) - text_columns)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (lines[0], rule, *lines[1:]))


def milliseconds(row: Row | None, bold: bool = False) -> str:
    """The median of ``row``, marked if it was timed once; empty for ``None``."""
    if row is None:
        return ""
    text = f"**{number(row['median_ms'])}**" if bold else number(row["median_ms"])
    return text + TIMED_ONCE * bool(row["timed_once"])


def notes(tables: Iterable[str]) -> list[str]:
    """What the marks in ``tables`` mean."""
    text = "".join(tables)
    marks = ((NOT_MEASURED, NOT_MEASURED_NOTE), (TIMED_ONCE, TIMED_ONCE_NOTE))
    return [note for mark, note in marks if mark in text]


def comparison_table(comparisons: Sequence[Comparison]) -> str:
    """Milliseconds of the best peer, of eager PyTorch and of fastperc, and fastperc's speedup over both."""
    on_gpu = rows.is_gpu(comparisons[0].case)
    head = ["operation", "input", "dtype", "best peer", "its ms", "eager PyTorch", "fastperc"]
    lines = [[*head, "over eager", "over best peer", *(["share of floor"] if on_gpu else [])]]
    for comparison in comparisons:
        case, ours, peer = comparison.case, comparison.ours, comparison.best_peer
        line = [title(case), shape(case), case["dtype"], PROVIDER_TITLES[peer["provider"]] if peer else ""]
        line += [milliseconds(peer), milliseconds(comparison.eager), milliseconds(ours, bold=True) or NOT_MEASURED]
        line += [times(comparison.speedup_over(comparison.eager)), times(comparison.speedup_over(peer))]
        if on_gpu:
            line.append(f"{ours['share_of_floor']:.0%}" if ours and ours["share_of_floor"] is not None else "")
        lines.append(line)
    return markdown_table(lines, text_columns=4)


def side_by_side(measured: Sequence[Device], cases: Sequence[Comparison]) -> str:
    """For each of ``cases`` and each of several devices: the best peer, fastperc, and its speedup."""
    head = ["operation", "input", "dtype"]
    for name in short_names(measured):
        head += [f"{name}: best peer", "fastperc", "speedup"]
    lines = [head]
    for wanted in cases:
        line = [title(wanted.case), shape(wanted.case), wanted.case["dtype"]]
        for device in measured:
            comparison = next((one for one in device.comparisons if one.key == wanted.key), None)
            peer = comparison.best_peer if comparison else None
            line.append(f"{milliseconds(peer)}, {PROVIDER_TITLES[peer['provider']]}" if peer else "")
            line.append((milliseconds(comparison.ours, bold=True) if comparison else "") or NOT_MEASURED)
            line.append(times(comparison.speedup_over(peer) if comparison else None))
        lines.append(line)
    return markdown_table(lines, text_columns=3)


def short_names(measured: Sequence[Device]) -> list[str]:
    """What tells the devices apart in the head of a table: their vector instructions, or else their whole names."""
    instructions = [device.name.rpartition(", ")[2] for device in measured]
    return instructions if len({*instructions}) == len(measured) else [device.name for device in measured]


def network_table(comparisons: Sequence[Comparison]) -> str:
    """Every provider's milliseconds for whole networks in eval mode; empty if none was measured."""
    networks = [comparison for comparison in comparisons if comparison.case["operation"] in NETWORKS]
    networks = [comparison for comparison in networks if comparison.case["direction"] in ("inference", "video")]
    if not networks:
        return ""
    providers = [name for name in PROVIDER_TITLES if any(name in comparison.rows for comparison in networks)]
    lines = [["network, ms", "dtype", *(PROVIDER_TITLES[name] for name in providers)]]
    for comparison in networks:
        case, fastest = comparison.case, min(comparison.rows.values(), key=lambda row: row["median_ms"])
        cells = [milliseconds(comparison.rows.get(name), comparison.rows.get(name) is fastest) for name in providers]
        video = ", video" if case["direction"] == "video" else ""
        lines.append([shape(case) + video, case["dtype"], *cells])
    return markdown_table(lines, text_columns=2)


def memory_table(comparisons: Sequence[Comparison]) -> str:
    """Peak memory where both eager PyTorch's and fastperc's were tracked; empty if nowhere."""
    lines = [["peak memory beyond inputs and weights", "input", "eager PyTorch", "fastperc", "ratio"]]
    for comparison in comparisons:
        eager, ours = (
            comparison.rows[name]["peak_bytes"] if name in comparison.rows else None for name in ("reference", "fused")
        )
        if eager and ours:
            mebibytes = [f"{eager / 2**20:.0f} MiB", f"**{ours / 2**20:.0f} MiB**"]
            lines.append([title(comparison.case), shape(comparison.case), *mebibytes, f"{eager / ours:.1f}× less"])
    return markdown_table(lines, text_columns=2) if len(lines) > 1 else ""


def render_performance() -> str:
    """What stands between the markers of docs/performance.md: all tables and figures of all devices."""
    parts = []
    measured = devices()
    results = f"../{RESULTS.relative_to(ROOT).as_posix()}"
    processors = [device for device in measured if not device.on_gpu]
    if len(processors) > 1:
        cases = {comparison.key: comparison for device in reversed(processors) for comparison in device.comparisons}
        table = side_by_side(processors, in_order(cases.values()))
        names = " and ".join(device.heading for device in processors)
        parts += [f"{names}: medians in milliseconds.", table, *notes([table])]
    for device in measured:
        parts.append(f"{device.heading}: medians in milliseconds ([rows]({results}/{device.file.name})).")
        tables = [comparison_table(device.comparisons), network_table(device.comparisons)]
        parts += [*tables, *notes(tables)]
        if device.is_measured:
            parts.append(f"![Times faster than eager PyTorch]({results}/{device.figure('speedup').name})")
            if device.on_gpu:
                parts.append(f"![Share of the device's roofline]({results}/{device.figure('roofline').name})")
        parts.append(memory_table(device.comparisons))
    parts.append("" if has_gpu_rows(measured) else NO_GPU)
    return "\n\n".join(part for part in parts if part)


def render_readme() -> str:
    """What stands between README's markers: ``HIGHLIGHTS`` on the devices shown, and a link to the rest."""
    measured = devices()
    parts = []
    gpus, processors = [[d for d in measured if d.on_gpu == on_gpu] for on_gpu in (True, False)]
    for shown in (*([gpu] for gpu in gpus[:1]), processors):
        chosen = [
            found for one in HIGHLIGHTS for device in shown[:1] if (found := highlighted(device.comparisons, *one))
        ]
        if chosen:
            table = side_by_side(shown, chosen) if len(shown) > 1 else readme_table(chosen)
            parts.append(f"{' and '.join(device.heading for device in shown)}: medians in milliseconds.")
            parts += [table, *notes([table])]
    everything = "[All rows, figures and how they were measured](docs/performance.md)."
    parts.append(everything if has_gpu_rows(measured) else f"{NO_GPU} {everything}")
    return "\n\n".join(parts)


def highlighted(comparisons: Iterable[Comparison], operation: str, direction: str, prefix: str) -> Comparison | None:
    """The first comparison of ``operation`` in ``direction`` whose shape starts with ``prefix``."""
    for comparison in comparisons:
        case = comparison.case
        if (case["operation"], case["direction"]) == (operation, direction) and case["shape"].startswith(prefix):
            return comparison
    return None


def readme_table(comparisons: Sequence[Comparison]) -> str:
    """The columns of :func:`comparison_table` that fit a README."""
    lines = [["operation", "input", "dtype", "eager PyTorch", "best peer", "fastperc", "over best peer"]]
    for comparison in comparisons:
        case, peer = comparison.case, comparison.best_peer
        best = f"{milliseconds(peer)}, {PROVIDER_TITLES[peer['provider']]}" if peer else ""
        ours = milliseconds(comparison.ours, bold=True) or NOT_MEASURED
        line = [title(case), shape(case), case["dtype"], milliseconds(comparison.eager), best, ours]
        lines.append([*line, times(comparison.speedup_over(peer))])
    return markdown_table(lines, text_columns=3)


def has_gpu_rows(measured: Iterable[Device]) -> bool:
    """Whether fastperc has a current row of a GPU."""
    return any(device.on_gpu and device.is_measured for device in measured)


def documents() -> list[tuple[Path, Callable[[], str]]]:
    """Each document with markers, and what renders its part."""
    return [(README, render_readme), (PERFORMANCE, render_performance)]


def between_markers(text: str, new: str) -> str:
    """``text`` with ``new`` between its two markers.

    Raises:
        ValueError: a marker is missing, or stands twice.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"the document needs {BEGIN} and {END}, once each")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{new}\n{END}{rest.split(END)[1]}"


def draw_figures() -> None:
    """Draws the figures of the devices shown, and removes those that no current row is left for."""
    from figures import draw_roofline, draw_speedup

    shown = {device.file for device in devices()}
    for device in all_devices():
        comparisons = [comparison for comparison in device.comparisons if comparison.ours and device.file in shown]
        # A roofline is a bound only where caches start cold: on GPUs, whose caches are evicted before each round.
        for kind, draw, wanted in (("speedup", draw_speedup, True), ("roofline", draw_roofline, device.on_gpu)):
            if wanted and comparisons:
                draw(comparisons, device.figure(kind))
            else:
                device.figure(kind).unlink(missing_ok=True)


def collect(paths: Iterable[Path]) -> Iterator[Row]:
    """The rows of files, and of the files in folders."""
    for path in paths:
        files = sorted([*path.glob("*.jsonl"), *path.glob("*.json")]) if path.is_dir() else [path]
        for file in files:
            yield from rows.read(file)


def merge_into_results(measured: Iterable[Row]) -> None:
    """Merges rows into the files of their devices.

    Raises:
        ValueError: a row has wrong fields, or is of an emulated device. Nothing was written.
    """
    by_file: dict[Path, list[Row]] = {}
    for row in measured:
        if row["commit"] is None and row["source"] == rows.source_hash(row["operation"]):
            row["commit"] = rows.commit()  # measured in a copy without history, on the same files as here
        by_file.setdefault(rows.results_file(row["device"]), []).append(row)
    for file, new in by_file.items():
        rows.write(file, rows.merge(rows.read(file) if file.exists() else [], new))
        print(f"{len(new)} rows into {file.relative_to(ROOT)}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", type=Path, metavar="PATH", help="rows to merge")
    parser.add_argument(
        "--check", action="store_true", help="fail if a document is not up to date; merge and write nothing"
    )
    arguments = parser.parse_args(argv)
    if arguments.check:
        outdated = [path for path, render in documents() if with_new_part(path, render) != path.read_text("utf-8")]
        for path in outdated:
            print(f"{path.relative_to(ROOT)}: not what benchmarks/results render to, or a kernel has changed since.")
        if outdated:
            print("Run: python benchmarks/report.py")
        return int(bool(outdated))
    try:
        merge_into_results(collect(arguments.paths))
    except ValueError as error:
        print(f"report.py: {error}", file=sys.stderr)
        return 2
    for path, render in documents():
        path.write_text(with_new_part(path, render), encoding="utf-8")
    draw_figures()
    return 0


def with_new_part(path: Path, render: Callable[[], str]) -> str:
    """The text of ``path`` with what ``render`` returns between its markers."""
    return between_markers(path.read_text("utf-8"), render())


if __name__ == "__main__":
    sys.exit(main())
