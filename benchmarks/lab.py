"""One command for a machine with a GPU: builds, tests and measures what fits in a budget, the most valuable first.

    python benchmarks/lab.py --out DIR [--budget SECONDS] [--only NAME ...] [--sanitize]
    python benchmarks/lab.py --list

Needs no network: Python, torch, pytest, pytest-benchmark and, to build, what pyproject.toml requires. Without a GPU the
CPU is measured, and the rows say so. DIR/rows.jsonl has each row as soon as it is measured, DIR/lab.log everything
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

import report
import rows

ROOT = rows.ROOT
PYTEST = ("-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider")
BENCHMARK = ("--benchmark-only", "--benchmark-columns=median,iqr,rounds")
NEEDED = ("torch", "numpy", "pytest", "pytest_benchmark")
GPU_TESTS = "cuda or cudnn or triton or graphs"  # tests name their device, or what only a GPU has
# A few, for tools that slow them a hundredfold; those of the head come with the engine's.
KERNEL_TESTS = "on_triton or (cuda and (layout or exact or mask or pool or (formula and bf16 and not head)))"

TUNE = """
import torch
from fastperc import dispatch, tuning
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
times = tuning.tune(device, tuning.cases(batch=4, size=256))
dispatch.save(device, times)
print(tuning.report(times))
"""


@dataclass(frozen=True)
class Stage:
    """A step of the lab: a Python command line in a process of its own."""

    name: str
    seconds: float  # on a GPU machine, about
    what: str
    arguments: Sequence[str]
    prefix: Sequence[str] = ()  # what runs Python
    environment: dict[str, str] = field(default_factory=dict)
    gpu: bool = False  # whether it needs one
    allowed: tuple[int, ...] = (0,)  # exit statuses of success


FROZEN = ("conv_bn_relu", "subpixel_conv_bn_relu", "rgb_conv", "instance_norm", "image_io", "engine")
TRAINING = ("tv_loss", "gram_loss", "vgg_loss", "norm_relu", "conv3x3", "conv_chain")
LAYERS = ("rgb_conv", "subpixel_conv_bn_relu", "conv_bn_relu", "residual_block")
COMPILED = "compile or autotune"  # providers that take minutes before anything is timed
OTHERS = f"not ({COMPILED})"


def bench(name: str, seconds: float, what: str, selection: str = "", of: Sequence[str] = ()) -> Stage:
    files = [str(ROOT / "benchmarks" / f"bench_{operation}.py") for operation in of or (name,)]
    arguments = (*PYTEST, *files, *BENCHMARK, "--rows={rows}", *(("-k", selection) if selection else ()))
    return Stage(name, seconds, what, arguments)


def tests(
    name: str, seconds: float, what: str, of: Sequence[str], selection: str = GPU_TESTS, prefix: Sequence[str] = ()
) -> Stage:
    # Memory checkers see into PyTorch's own allocator only if it keeps nothing.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if prefix else {}
    files = [ROOT / "tests" / f"test_{tested}.py" for tested in of]
    arguments = (*PYTEST, *(str(file) for file in files if file.exists()), "-k", selection)
    return Stage(name, seconds, what, arguments, prefix, environment, gpu=True, allowed=(0, 5))  # 5: none selected


def sanitizer(tool: str) -> Stage:
    prefix = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--print-limit", "20")
    what = f"compute-sanitizer's {tool} over a few kernel tests"
    return tests(tool, 180, what, (*FROZEN, *TRAINING), KERNEL_TESTS, prefix)


STAGES = (
    tests("tests_inference", 120, "the engine's tests on the GPU, and those of its kernels", FROZEN),
    bench("inference", 150, "whole networks in eval mode, 4K and video", OTHERS),
    bench("rgb_conv", 60, "the 9×9 convolutions", OTHERS),
    bench("subpixel_conv_bn_relu", 60, "the ½-stride convolutions", OTHERS),
    bench("conv_bn_relu", 60, "the stride-2 convolutions", OTHERS),
    bench("residual_block", 60, "the residual block", OTHERS),
    Stage("tune", 180, "the backends against each other, as fastperc tune has them", ("-c", TUNE)),
    bench("inference_compiled", 400, "whole networks by torch.compile and max-autotune", COMPILED, ("inference",)),
    tests("tests_training", 90, "the tests on the GPU of what trains", TRAINING),
    bench("tv_loss", 45, "total variation"),
    bench("gram_loss", 45, "Gram loss"),
    bench("vgg_loss", 90, "the whole loss network, and its memory"),
    bench("training", 120, "a training step"),
    Stage("train", 60, "fastperc train, photos and all", (str(ROOT / "benchmarks" / "training_speed.py"),), gpu=True),
    bench("norm_relu", 30, "norms and the ReLU after them in training", OTHERS),
    bench("conv3x3", 30, "3×3 convolutions in training", OTHERS),
    bench("layers_compiled", 600, "layers by torch.compile and max-autotune", COMPILED, LAYERS),
)
SANITIZERS = (sanitizer("memcheck"), sanitizer("racecheck"))


def choose(only: Sequence[str], sanitize: bool) -> list[Stage]:
    """The stages to run, in their order.

    Raises:
        ValueError: a name that is no stage's.
    """
    known = {stage.name: stage for stage in (*STAGES, *SANITIZERS)}
    unknown = [name for name in only if name not in known]
    if unknown:
        raise ValueError(f"no stage {', '.join(unknown)}; there are {', '.join(known)}")
    if not only:
        return [*STAGES, *(SANITIZERS if sanitize else ())]
    return [stage for stage in known.values() if stage.name in only or (sanitize and stage in SANITIZERS)]


class Lab:
    """One run: where things go, how much time is left, and what became of each stage."""

    def __init__(self, out: Path, budget: float) -> None:
        self.out, self.end = out, time.monotonic() + budget
        self.rows = out / "rows.jsonl"
        self.log = out / "lab.log"
        self.outcomes: list[tuple[str, str]] = []  # of stages: name, "ok", "skipped: …" or "FAILED: …"
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
        return self.end - time.monotonic()

    def say(self, text: str) -> None:
        print(text, flush=True)
        with self.log.open("a", encoding="utf-8") as file:
            file.write(text + "\n")

    def execute(self, command: Sequence[str], environment: dict[str, str] | None = None) -> int | None:
        """Runs a command away from the checkout, which would shadow the package; ``None``: out of time."""
        with self.log.open("ab") as log:
            self.child = subprocess.Popen(
                command,
                cwd=self.work,
                env={**self.environment, **(environment or {})},
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=os.setpgrp,  # to be stopped as one; a session of its own might outlive the machine
            )
            try:
                return self.child.wait(max(self.left, 1))
            except subprocess.TimeoutExpired:
                return None
            finally:
                self.stop()

    def stop(self) -> None:
        """Ends the stage under way, with the processes that it started."""
        if self.child is not None:
            if self.child.poll() is None:
                os.killpg(self.child.pid, signal.SIGKILL)
                self.child.wait()
            self.child = None

    def ask(self, code: str) -> str:
        """What a line of Python prints in the stages' environment, or nothing if it fails."""
        command = [sys.executable, "-c", code]
        run = subprocess.run(command, cwd=self.work, env=self.environment, capture_output=True, text=True)
        return run.stdout.strip() if run.returncode == 0 else ""

    def run(self, stage: Stage, gpu: bool) -> None:
        """Runs a stage, if there is reason to, and notes what became of it."""
        if stage.gpu and not gpu:
            return self.note(stage.name, "skipped: no GPU")
        if stage.prefix and not shutil.which(stage.prefix[0]):
            return self.note(stage.name, f"FAILED: there is no {stage.prefix[0]} here")
        if self.left < stage.seconds / 2:  # rows are kept as they come, so half the time is worth a start
            return self.note(stage.name, f"skipped: takes about {stage.seconds:.0f} s, {self.left:.0f} s are left")
        arguments = [argument.replace("{rows}", str(self.rows)) for argument in stage.arguments]
        command = [*stage.prefix, sys.executable, *arguments]
        self.guarded(stage.name, lambda: self.execute(command, stage.environment), stage.allowed)

    def guarded(self, name: str, action: Callable[[], int | None], allowed: tuple[int, ...] = (0,)) -> bool:
        """Runs ``action`` and notes its outcome; whatever it does, the lab goes on. Returns whether it succeeded."""
        self.say(f"\n== {name}, {self.left:.0f} s left")
        start, size = time.monotonic(), self.log.stat().st_size
        try:
            status = action()
        except OSError as error:
            self.note(name, f"FAILED: {error}")
            return False
        took = f"{time.monotonic() - start:.0f} s"
        if status in allowed:
            self.note(name, f"ok, {took}" + ", but no test was selected" * (status == 5))
            return True
        self.note(name, f"FAILED: exit status {status}, {took}" if status is not None else f"FAILED: cut off at {took}")
        with self.log.open("rb") as log:
            log.seek(size)
            print("\n".join(log.read().decode("utf-8", "replace").splitlines()[-25:]), flush=True)
        return False

    def note(self, name: str, outcome: str) -> None:
        self.outcomes.append((name, outcome))
        self.say(f"-- {name}: {outcome}")

    def provide_package(self, needed: bool) -> bool:
        """Makes ``import fastperc`` find this checkout's, built; returns whether it does.

        A build is kept by the hash of its sources. Unless ``needed``, an editable install of this checkout will do.
        """
        if not needed and self.ask("import fastperc._C; print(fastperc.__path__[0])") == str(ROOT / "fastperc"):
            self.say("fastperc: this checkout, as installed")
            return True
        site = self.work / f"site-{tree_hash()}"
        self.environment["PYTHONPATH"] = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")]).rstrip(
            os.pathsep
        )
        if (site / "fastperc").exists():
            self.say(f"fastperc: built before, in {site}")
            return True

        def build() -> int | None:
            command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index"]
            partial = site.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            status = self.execute([*command, "--target", str(partial), str(ROOT)])
            if status == 0:
                partial.rename(site)
            return status

        return self.guarded("build", build)


def tree_hash() -> str:
    """A hash of all that the package is built from."""
    digest = hashlib.sha256()
    files = [ROOT / name for name in ("CMakeLists.txt", "pyproject.toml", "setup.py")]
    for folder in ("csrc", "kernels", "fastperc"):
        files += sorted(
            p for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".cu", ".cuh", ".cpp", ".h", ".json")
        )
    for path in files:
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def summary(measured: Sequence[rows.Row]) -> str:
    """The short table that the lab ends with."""
    lines = [("kernel", "shape", "dtype", "ours ms", "best peer ms", "", "ratio", "of floor")]
    for c in report.compare(rows.merge(measured)):
        ours, peer = c.fastest(ours=True), c.fastest(ours=False)
        ratio = c.ratio(peer)
        best = ours or peer
        share = best["share_of_floor"] if best and rows.is_gpu(best) else None  # on a CPU a cache may beat the memory
        lines.append(
            (
                f"{c.case['operation']} {c.case['direction']}",
                c.case["shape"],
                c.case["dtype"],
                f"{ours['median_ms']:.4g}" if ours else "-",
                f"{peer['median_ms']:.4g}" if peer else "-",
                peer["provider"] if peer else "",
                f"{ratio:.2f}" if ratio else "-",
                f"{share:.0%}" if share else "-",
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def missing_modules() -> list[str]:
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="DIR", help="where rows and the log go")
    parser.add_argument("--budget", type=float, default=480, metavar="SECONDS", help="default: %(default)s")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="this stage; may be repeated")
    parser.add_argument("--sanitize", action="store_true", help="also run compute-sanitizer over the CUDA kernels")
    parser.add_argument("--list", action="store_true", help="print the stages in their order and stop")
    arguments = parser.parse_args(argv)
    if arguments.list:
        for stage in (*STAGES, *SANITIZERS):
            print(f"{stage.name:<24}{stage.seconds:>5.0f} s  {stage.what}")
        return 0
    if arguments.out is None:
        parser.error("--out is needed")
    try:
        stages = choose(arguments.only, arguments.sanitize)
    except ValueError as error:
        parser.error(str(error))
    signal.signal(signal.SIGTERM, told_to_stop)
    return experiment(Lab(arguments.out.resolve(), arguments.budget), stages, needs_build=not arguments.only)


def told_to_stop(number: int, _: Any) -> None:
    raise KeyboardInterrupt(signal.Signals(number).name)


def experiment(lab: Lab, stages: Sequence[Stage], needs_build: bool) -> int:
    """Runs the stages and ends with the table, also when it is told to stop."""
    before = len(rows.read(lab.rows)) if lab.rows.exists() else 0
    gpu = lab.ask("import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')")
    lab.say(f"device: {gpu}" if gpu else "device: no GPU here, measuring the CPU")
    missing = missing_modules()
    if missing:
        lab.say(f"missing here: {', '.join(missing)}; what needs them will fail")
    try:
        if lab.provide_package(needs_build and bool(gpu)):
            if gpu and needs_build:
                lab.guarded("doctor", lambda: lab.execute([sys.executable, "-m", "fastperc", "doctor"]))
            for stage in stages:
                lab.run(stage, bool(gpu))
    except KeyboardInterrupt as interrupt:
        lab.note("lab", f"FAILED: stopped by {interrupt or 'SIGINT'}")
    finally:
        lab.stop()
    measured = rows.read(lab.rows)[before:] if lab.rows.exists() else []
    lab.say(f"\n{summary(measured)}" if measured else "\nnothing was measured")
    lab.say("\n" + "\n".join(f"{name:<24}{outcome}" for name, outcome in lab.outcomes))
    return int(any(outcome.startswith("FAILED") for _, outcome in lab.outcomes))


if __name__ == "__main__":
    sys.exit(main())
