"""Builds, tests and measures fastperc on a machine with a GPU within a time budget, the most valuable stages first.

    python benchmarks/lab.py --out DIR [--budget SECONDS] [--only NAME ...] [--sanitize]
    python benchmarks/lab.py --out DIR --rehearse
    python benchmarks/lab.py --list

Needs no network: Python, torch, pytest, pytest-benchmark and, to build, what pyproject.toml requires. Without a GPU it
measures the CPU, and the rows say so. DIR/rows.jsonl gets each row as soon as it is measured, DIR/lab.log everything
printed, DIR/cache the tuned table; `benchmarks/report.py DIR` merges the rows. Exit status 1: a stage failed.

`--rehearse` runs all stages on the CPU, with tiny shapes and Triton's interpreter, in some minutes; its rows are no
measurements and go to DIR/rehearsal.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import rows
from comparison import compare
from operations import ROOT
from stages import NO_TEST_SELECTED, SANITIZERS, STAGES, Stage

REHEARSAL_BUDGET = 1800.0  # seconds
NEEDED = ("torch", "numpy", "pytest", "pytest_benchmark")


def choose(only: Sequence[str], sanitize: bool) -> list[Stage]:
    """The stages called ``only``, or all; in their order.

    Raises:
        ValueError: there is no stage of such a name.
    """
    known = {stage.name: stage for stage in (*STAGES, *SANITIZERS)}
    unknown = [name for name in only if name not in known]
    if unknown:
        raise ValueError(f"no stage {', '.join(unknown)}; choose from {', '.join(known)}")
    if not only:
        return [*STAGES, *(SANITIZERS if sanitize else ())]
    return [stage for stage in known.values() if stage.name in only or (sanitize and stage in SANITIZERS)]


class Lab:
    """One run: its folders, the time left, and the outcome of each stage."""

    def __init__(self, out: Path, budget: float) -> None:
        self.out, self.end = out, time.monotonic() + budget
        self.rows = out / "rows.jsonl"
        self.log = out / "lab.log"
        self.outcomes: list[tuple[str, str]] = []  # name of a stage, and "ok", "skipped: …" or "FAILED: …"
        self.work = Path(tempfile.gettempdir()) / f"fastperc-lab-{os.getuid() if hasattr(os, 'getuid') else 0}"
        self.environment = {
            **os.environ,
            "PYTHONUNBUFFERED": "1",
            "COLUMNS": "200",
            "XDG_CACHE_HOME": str(out / "cache"),
        }
        self.child: subprocess.Popen[bytes] | None = None
        out.mkdir(parents=True, exist_ok=True)
        self.work.mkdir(parents=True, exist_ok=True)

    @property
    def left(self) -> float:
        """Seconds left of the budget."""
        return self.end - time.monotonic()

    def print_and_log(self, text: str) -> None:
        """Prints ``text`` and appends it to the log."""
        print(text, flush=True)
        with self.log.open("a", encoding="utf-8") as file:
            file.write(text + "\n")

    def execute(
        self, command: Sequence[str], environment: dict[str, str] | None = None, limit: float = math.inf
    ) -> int | None:
        """Runs a command with its output in the log; returns its exit status, or ``None`` if its ``limit`` in seconds
        or the budget ran out.

        The working folder is outside the checkout, whose ``fastperc`` would hide the installed package.
        """
        with self.log.open("ab") as log:
            self.child = subprocess.Popen(
                command,
                cwd=self.work,
                env={**self.environment, **(environment or {})},
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=os.setpgrp,  # a group can be killed at once; a new session might outlive the machine's job
            )
            try:
                return self.child.wait(max(min(limit, self.left), 1))
            except subprocess.TimeoutExpired:
                return None
            finally:
                self.stop()

    def stop(self) -> None:
        """Kills the running stage with the processes that it started."""
        if self.child is not None:
            if self.child.poll() is None:
                os.killpg(self.child.pid, signal.SIGKILL)
                self.child.wait()
            self.child = None

    def output_of(self, code: str) -> str:
        """What a line of Python prints in the stages' environment; empty if it fails."""
        command = [sys.executable, "-c", code]
        run = subprocess.run(command, cwd=self.work, env=self.environment, capture_output=True, text=True)
        return run.stdout.strip() if run.returncode == 0 else ""

    def run(self, stage: Stage, gpu: bool) -> None:
        """Runs a stage and records its outcome; skips it where it cannot run or time is short."""
        if stage.gpu and not gpu:
            return self.record(stage.name, "skipped: no GPU")
        if stage.prefix and not shutil.which(stage.prefix[0]):
            return self.record(stage.name, f"FAILED: {stage.prefix[0]} is not installed")
        if self.left < stage.limit / 4:  # a stage that is cut off keeps its rows, so part of the time is worth a start
            return self.record(stage.name, f"skipped: may take {stage.limit:.0f} s, {self.left:.0f} s are left")
        self.attempt(stage.name, lambda: self.execute_all(stage, gpu), stage.allowed)

    def execute_all(self, stage: Stage, gpu: bool) -> int | None:
        """Runs a stage's commands, also after one that fails; returns the first exit status that is not allowed, else
        the least, or ``None`` if the stage's time ran out."""
        end, statuses = time.monotonic() + stage.limit, []
        for arguments in stage.commands if gpu else stage.commands[:1]:
            filled = [argument.replace("{rows}", str(self.rows)) for argument in arguments]
            command = [*stage.prefix, sys.executable, *filled]
            status = self.execute(command, stage.environment, end - time.monotonic())
            if status is None:
                return None
            statuses.append(status)
        return next((status for status in statuses if status not in stage.allowed), min(statuses))

    def attempt(self, name: str, action: Callable[[], int | None], allowed: tuple[int, ...] = (0,)) -> bool:
        """Runs ``action``, which returns an exit status, and records the outcome; returns whether it succeeded."""
        self.print_and_log(f"\n== {name}, {self.left:.0f} s left")
        start, size = time.monotonic(), self.log.stat().st_size
        try:
            status = action()
        except OSError as error:
            self.record(name, f"FAILED: {error}")
            return False
        seconds = f"{time.monotonic() - start:.0f} s"
        if status in allowed:
            self.record(name, f"ok, {seconds}" + ", but no test was selected" * (status == NO_TEST_SELECTED))
            return True
        self.record(
            name, f"FAILED: cut off at {seconds}" if status is None else f"FAILED: exit status {status}, {seconds}"
        )
        with self.log.open("rb") as log:
            log.seek(size)
            print("\n".join(log.read().decode("utf-8", "replace").splitlines()[-25:]), flush=True)
        return False

    def record(self, name: str, outcome: str) -> None:
        """Keeps and prints the outcome of a stage."""
        self.outcomes.append((name, outcome))
        self.print_and_log(f"-- {name}: {outcome}")

    def provide_package(self, must_build: bool) -> bool:
        """Makes ``import fastperc`` find a build of this checkout in the stages; returns whether it does.

        Keeps builds by the hash of their sources. Unless ``must_build``, an editable install of this checkout will do.
        """
        installed = "import fastperc._C; print(fastperc.__path__[0])"
        if not must_build and self.output_of(installed) == str(ROOT / "fastperc"):
            self.print_and_log("fastperc: this checkout, as installed")
            return True
        site = self.work / f"site-{tree_hash()}"
        search_path = [str(site), os.environ.get("PYTHONPATH", "")]
        self.environment["PYTHONPATH"] = os.pathsep.join(search_path).rstrip(os.pathsep)
        if (site / "fastperc").exists():
            self.print_and_log(f"fastperc: built before, in {site}")
            return True

        def build() -> int | None:
            command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index"]
            partial = site.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            status = self.execute([*command, "--target", str(partial), str(ROOT)])
            if status == 0:
                partial.rename(site)
            return status

        return self.attempt("build", build)


def tree_hash() -> str:
    """A hash of everything that the package is built from."""
    digest = hashlib.sha256()
    files = [ROOT / name for name in ("CMakeLists.txt", "pyproject.toml", "setup.py")]
    suffixes = (".py", ".cu", ".cuh", ".cpp", ".h", ".json")
    for folder in ("csrc", "kernels", "fastperc"):
        files += sorted(path for path in (ROOT / folder).rglob("*") if path.suffix in suffixes)
    for path in files:
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def summary(measured: Sequence[rows.Row]) -> str:
    """The short table that the lab ends with."""
    lines = [("kernel", "shape", "dtype", "ours ms", "best peer ms", "", "ratio", "of floor")]
    for comparison in compare(rows.merge(measured)):
        case, ours, peer = comparison.case, comparison.ours, comparison.best_peer
        ratio, fastest = comparison.speedup_over(peer), ours or peer
        # On a CPU a cache may beat the memory, so the share says little.
        share = fastest["share_of_floor"] if fastest and rows.is_gpu(fastest) else None
        lines.append(
            (
                f"{case['operation']} {case['direction']}",
                case["shape"],
                case["dtype"],
                f"{ours['median_ms']:.4g}" if ours else "-",
                f"{peer['median_ms']:.4g}" if peer else "-",
                peer["provider"] if peer else "",
                f"{ratio:.2f}" if ratio else "-",
                f"{share:.0%}" if share else "-",
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the rows and the log")
    parser.add_argument("--budget", type=float, default=540, metavar="SECONDS", help="default: %(default)s")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="run this stage; may be repeated")
    parser.add_argument("--sanitize", action="store_true", help="also run compute-sanitizer over the CUDA kernels")
    parser.add_argument("--rehearse", action="store_true", help="run all stages on the CPU with tiny shapes")
    parser.add_argument("--list", action="store_true", help="print the stages in their order and stop")
    arguments = parser.parse_args(argv)
    if arguments.list:
        for stage in (*STAGES, *SANITIZERS):
            print(f"{stage.name:<24}{stage.limit:>5.0f} s  {stage.description}")
        return 0
    if arguments.out is None:
        parser.error("--out is needed")
    try:
        stages = choose(arguments.only, arguments.sanitize)
    except ValueError as error:
        parser.error(str(error))
    signal.signal(signal.SIGTERM, raise_interrupt)
    lab = Lab(arguments.out.resolve(), REHEARSAL_BUDGET if arguments.rehearse else arguments.budget)
    if arguments.rehearse:
        stages = [rehearsed(stage) for stage in stages if not stage.prefix]
        lab.rows = lab.out / "rehearsal" / "rows.jsonl"  # which `report.py DIR` does not read
        lab.rows.parent.mkdir(exist_ok=True)
        # No GPU is used, and what torch.compile would compile for minutes runs as it is.
        lab.environment |= {"CUDA_VISIBLE_DEVICES": "", "TORCHDYNAMO_DISABLE": "1"}
    return experiment(lab, stages, must_build=not arguments.only)


def rehearsed(stage: Stage) -> Stage:
    """The stage as it runs on a CPU, with tiny shapes."""
    commands = [(*command, *stage.rehearsal) for command in stage.commands]
    return replace(stage, commands=commands, gpu=False, limit=REHEARSAL_BUDGET)


def raise_interrupt(number: int, _: Any) -> None:
    """A signal handler that stops the lab as Ctrl-C does.

    Raises:
        KeyboardInterrupt: always, with the signal's name.
    """
    raise KeyboardInterrupt(signal.Signals(number).name)


def experiment(lab: Lab, stages: Sequence[Stage], must_build: bool) -> int:
    """Runs the stages and prints the summary, also when it is interrupted; returns an exit status."""
    rows_before = len(rows.read(lab.rows)) if lab.rows.exists() else 0
    gpu = lab.output_of("import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')")
    lab.print_and_log(f"device: {gpu}" if gpu else "device: no GPU, measuring the CPU")
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        lab.print_and_log(f"not installed: {', '.join(missing)}; the stages that need them will fail")
    try:
        if lab.provide_package(must_build and bool(gpu)):
            if gpu and must_build:
                lab.attempt("doctor", lambda: lab.execute([sys.executable, "-m", "fastperc", "doctor"]))
            for stage in stages:
                lab.run(stage, bool(gpu))
    except KeyboardInterrupt as interrupt:
        lab.record("lab", f"FAILED: stopped by {interrupt or 'SIGINT'}")
    finally:
        lab.stop()
    measured = rows.read(lab.rows)[rows_before:] if lab.rows.exists() else []
    lab.print_and_log(f"\n{summary(measured)}" if measured else "\nno rows were measured")
    lab.print_and_log("\n" + "\n".join(f"{name:<24}{outcome}" for name, outcome in lab.outcomes))
    return int(any(outcome.startswith("FAILED") for _, outcome in lab.outcomes))


if __name__ == "__main__":
    sys.exit(main())
