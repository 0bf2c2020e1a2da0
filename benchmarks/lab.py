"""Builds, tests and measures fastperc on a machine with a GPU within a time budget, the most valuable stages first.

    python benchmarks/lab.py --out DIR [--budget SECONDS] [--only NAME ...] [--sanitize]
    python benchmarks/lab.py --list

Needs no network: Python, torch, pytest, pytest-benchmark and, to build, what pyproject.toml requires. Without a GPU it
measures the CPU, and the rows say so. DIR/rows.jsonl gets each row as soon as it is measured, DIR/lab.log everything
printed, DIR/cache the tuned table; `benchmarks/report.py DIR` merges the rows. Exit status 1: a stage failed.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import operations
import rows
from comparison import compare
from operations import ROOT

PYTEST = ("-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider")
BENCHMARK = ("--benchmark-only", "--benchmark-columns=median,iqr,rounds")
NEEDED = ("torch", "numpy", "pytest", "pytest_benchmark")
NO_TEST_SELECTED = 5  # pytest's exit status
GPU_TESTS = "cuda or cudnn or triton or graphs"  # in the names of tests that need a GPU
# A few tests, for tools that slow them a hundredfold; the engine's tests cover the head.
KERNEL_TESTS = "on_triton or (cuda and (layout or exact or mask or pool or (formula and bf16 and not head)))"


@dataclass(frozen=True)
class Stage:
    """A step of the lab: a Python command line in a process of its own."""

    name: str
    seconds: float  # that it takes on a GPU machine, about
    description: str
    arguments: Sequence[str]  # of Python; "{rows}" becomes the file of rows
    prefix: Sequence[str] = ()  # a program that runs Python, with its options
    environment: dict[str, str] = field(default_factory=dict)
    gpu: bool = False  # whether it needs one
    allowed: tuple[int, ...] = (0,)  # exit statuses that count as success


FROZEN = (*operations.tests(frozen=True), "engine")
TRAINING = operations.tests(frozen=False)
LAYERS = ("rgb_conv", "subpixel_conv_bn_relu", "conv_bn_relu", "residual_block")
COMPILED = "compile or autotune"  # providers that compile for minutes before they run
NOT_COMPILED = f"not ({COMPILED})"


def bench(name: str, seconds: float, description: str, selection: str = "", benchmarks: Sequence[str] = ()) -> Stage:
    """Runs the benchmark ``name``, or ``benchmarks``; ``selection`` is an expression for pytest's ``-k``."""
    files = [str(ROOT / "benchmarks" / f"bench_{benchmark}.py") for benchmark in benchmarks or (name,)]
    arguments = (*PYTEST, *files, *BENCHMARK, "--rows={rows}", *(("-k", selection) if selection else ()))
    return Stage(name, seconds, description, arguments)


def tests(
    name: str,
    seconds: float,
    description: str,
    tested: Sequence[str],
    selection: str = GPU_TESTS,
    prefix: Sequence[str] = (),
) -> Stage:
    """Runs ``tests/test_<tested>.py`` where there is such a file."""
    # Memory checkers see what PyTorch's allocator does only if it caches nothing.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if prefix else {}
    files = [ROOT / "tests" / f"test_{test}.py" for test in tested]
    arguments = (*PYTEST, *(str(file) for file in files if file.exists()), "-k", selection)
    allowed = (0, NO_TEST_SELECTED)
    return Stage(name, seconds, description, arguments, prefix, environment, gpu=True, allowed=allowed)


def sanitizer(tool: str) -> Stage:
    """Runs a few kernel tests under a tool of compute-sanitizer."""
    prefix = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--print-limit", "20")
    description = f"compute-sanitizer's {tool} over a few kernel tests"
    return tests(tool, 180, description, (*FROZEN, *TRAINING), KERNEL_TESTS, prefix)


TRAINING_SPEED = str(ROOT / "benchmarks" / "training_speed.py")
FIRST = (
    tests("tests_inference", 120, "tests on the GPU: the engine and its kernels", FROZEN),
    bench("inference", 150, "whole networks in eval mode, 4K and video", NOT_COMPILED),
    bench("rgb_conv", 60, "the 9×9 convolutions", NOT_COMPILED),
    bench("subpixel_conv_bn_relu", 60, "the ½-stride convolutions", NOT_COMPILED),
    bench("conv_bn_relu", 60, "the stride-2 convolutions", NOT_COMPILED),
    bench("residual_block", 60, "the residual block", NOT_COMPILED),
    Stage("tune", 180, "fastperc tune: the backends of each operation", ("-m", "fastperc", "tune")),
    bench("inference_compiled", 400, "whole networks by torch.compile and max-autotune", COMPILED, ("inference",)),
    tests("tests_training", 90, "tests on the GPU: operations of training", TRAINING),
    bench("tv_loss", 45, "total variation"),
    bench("gram_loss", 45, "Gram loss"),
    bench("vgg_loss", 90, "the whole loss network, and its memory"),
    bench("training", 120, "a training step"),
    Stage("train", 60, "fastperc train with photos and checkpoints", (TRAINING_SPEED,), gpu=True),
    bench("norm_relu", 30, "norms and the ReLU after them in training", NOT_COMPILED),
    bench("conv3x3", 30, "3×3 convolutions in training", NOT_COMPILED),
    bench("layers_compiled", 600, "layers by torch.compile and max-autotune", COMPILED, LAYERS),
)
FILES = sorted(file.stem.removeprefix("bench_") for file in (ROOT / "benchmarks").glob("bench_*.py"))
OTHERS = [name for name in FILES if name not in {stage.name for stage in FIRST}]
STAGES = (*FIRST, *(bench(name, 60, operations.benchmark(name).title, NOT_COMPILED) for name in OTHERS))
SANITIZERS = (sanitizer("memcheck"), sanitizer("racecheck"))


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

    def execute(self, command: Sequence[str], environment: dict[str, str] | None = None) -> int | None:
        """Runs a command with its output in the log; returns its exit status, or ``None`` if time ran out.

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
                return self.child.wait(max(self.left, 1))
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
        if self.left < stage.seconds / 2:  # a stage that is cut off keeps its rows, so half the time is worth a start
            return self.record(stage.name, f"skipped: takes about {stage.seconds:.0f} s, {self.left:.0f} s are left")
        arguments = [argument.replace("{rows}", str(self.rows)) for argument in stage.arguments]
        command = [*stage.prefix, sys.executable, *arguments]
        self.attempt(stage.name, lambda: self.execute(command, stage.environment), stage.allowed)

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
    parser.add_argument("--budget", type=float, default=480, metavar="SECONDS", help="default: %(default)s")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="run this stage; may be repeated")
    parser.add_argument("--sanitize", action="store_true", help="also run compute-sanitizer over the CUDA kernels")
    parser.add_argument("--list", action="store_true", help="print the stages in their order and stop")
    arguments = parser.parse_args(argv)
    if arguments.list:
        for stage in (*STAGES, *SANITIZERS):
            print(f"{stage.name:<24}{stage.seconds:>5.0f} s  {stage.description}")
        return 0
    if arguments.out is None:
        parser.error("--out is needed")
    try:
        stages = choose(arguments.only, arguments.sanitize)
    except ValueError as error:
        parser.error(str(error))
    signal.signal(signal.SIGTERM, raise_interrupt)
    return experiment(Lab(arguments.out.resolve(), arguments.budget), stages, must_build=not arguments.only)


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
