"""A benchmark's case, and how one is checked, timed and turned into a row."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cache, lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import rows
import torch
from ceilings import bandwidth, device_name, device_type, rate
from costs import Cost, convolutions
from memory import peak_bytes
from providers import PROVIDERS, Provider, Step
from torch import Tensor, nn

import fastperc

DEVICE = device_type()
DTYPE = {"cpu": "fp32", "cuda": "bf16"}[DEVICE]  # what a device is timed in where a case does not say
# "amp": float32 weights and images under autocast to bfloat16, as `fastperc train --amp` has them.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "amp": torch.float32}
PRODUCTS = {"fp32": torch.float32, "bf16": torch.bfloat16, "amp": torch.bfloat16}  # what its convolutions multiply


@dataclass(frozen=True)
class Case:
    """What is timed: one operation in one direction on inputs of one shape.

    ``reference`` and ``fused`` take the inputs, after the module if there is one, and return a tensor; ``fused`` has
    what ``freeze`` makes of the module and the inputs, if that is given.
    """

    operation: str  # bench_<operation>.py
    direction: str  # "forward", "forward+backward", "training step" (with Adam); in eval mode "inference", "video"
    shape: str
    dtype: str  # of DTYPES
    inputs: Callable[[], tuple[Tensor, ...]]  # float32 or uint8, on the CPU; those that require gradients get them
    reference: Step
    tolerance: tuple[float, float]  # largest relative error against float64 of the output, of any gradient
    fused: Step | None = None  # None: there is no such kernel yet
    module: Callable[[], nn.Module] | None = None
    freeze: Callable[..., Step] | None = None  # not timed
    costs: Callable[[], Sequence[Cost]] = list  # of what is no convolution
    channels_last: bool = False
    track_memory: bool = False
    frames: int = 1  # of a video, an input each; the row is of one, and the last picture is checked

    @property
    def infers(self) -> bool:
        """Whether its weights stay what they are."""
        return self.direction in ("inference", "video")

    @property
    def id(self) -> str:
        return "-".join(f"{self.direction} {self.shape} {self.dtype}".replace(",", "").split())


def runs(cases: Iterable[Case]) -> Any:
    """The mark that runs a test for each case and each provider of it on this machine's device."""
    return pytest.mark.parametrize(
        ("case", "provider"),
        [
            pytest.param(
                case,
                provider,
                id=f"{case.id}-{provider.name}",
                marks=[pytest.mark.benchmark(timer=Moment)] if DEVICE == "cuda" else [],
            )
            for case in cases
            for provider in PROVIDERS
            if provider.is_for(case, DEVICE)
        ],
    )


class Problem:
    """The inputs and the module of a case, in its dtype or ``exact``: the same values, computed with in float64."""

    def __init__(self, case: Case, exact: bool = False) -> None:
        torch.manual_seed(0)
        self.case, self.exact = case, exact
        self.autocast = case.dtype == "amp" and not exact
        layout = torch.channels_last if case.channels_last else torch.contiguous_format
        rounded = DTYPES[case.dtype]
        dtype = torch.float64 if exact else rounded
        self.module = case.module() if case.module else None
        if self.module is not None:
            self.module.to(rounded).to(DEVICE, dtype).train(not case.infers)
            self.module.to(memory_format=layout)  # type: ignore[call-overload]
        self.inputs = []
        for x in case.inputs()[-1:] if exact and case.frames > 1 else case.inputs():
            if x.dtype == torch.uint8:  # levels; the frames of a video [H, W, 3] stay where they are
                y = x.to(DEVICE, memory_format=layout) if x.dim() == 4 else x
            elif x.dim() == 4:  # images and features; the rest is float32 whatever those are
                y = x.detach().to(rounded).to(DEVICE, dtype, memory_format=layout)
            else:
                y = x.detach().to(DEVICE, torch.promote_types(dtype, torch.float32))
            self.inputs.append(y.requires_grad_(x.requires_grad))
        parameters = [] if self.module is None else list(self.module.parameters())
        self.leaves = [x for x in (*self.inputs, *parameters) if x.requires_grad and not case.infers]
        self.gradient: Tensor | None = None
        self.output: Tensor = torch.empty(0)

    def call(self, function: Step) -> Step:
        """``function`` of the inputs alone."""
        return function if self.module is None else lambda *inputs: function(self.module, *inputs)

    def step(self, call: Step) -> Step:
        """What is timed, but for the optimizer; it leaves ``output`` and the gradients of ``leaves``."""

        def infer() -> None:
            with torch.inference_mode(mode=not self.exact), torch.no_grad():  # the counter sees no inference mode
                self.output = call(*self.inputs)

        def run() -> None:
            for leaf in self.leaves:
                leaf.grad = None
            with torch.autocast(DEVICE, torch.bfloat16) if self.autocast else nullcontext():
                output = call(*self.inputs)
            if self.case.direction != "forward":
                output.backward(self.incoming(output) if output.dim() else None)
            self.output = output.detach()

        return infer if self.case.infers else run

    def incoming(self, output: Tensor) -> Tensor:
        """The gradient that comes to ``output``: random, the same in every step."""
        if self.gradient is None:
            values = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
            self.gradient = torch.empty_like(output).copy_(values)
        return self.gradient

    def with_optimizer(self, step: Step) -> Step:
        on_gpu = DEVICE == "cuda"
        optimizer = torch.optim.Adam(self.leaves, lr=1e-3, fused=on_gpu, capturable=on_gpu)

        def train() -> None:
            step()
            optimizer.step()

        return train

    def results(self) -> tuple[Tensor, list[Tensor]]:
        """The output and the gradients, in float64."""
        gradients = [leaf.grad for leaf in self.leaves]
        assert all(gradient is not None for gradient in gradients), "a gradient is missing"
        return self.output.double(), [gradient.double() for gradient in gradients if gradient is not None]


class Oracle(NamedTuple):
    output: Tensor
    gradients: list[Tensor]
    costs: Sequence[Cost]


@lru_cache(maxsize=1)  # a case's providers follow one another
def oracle(case: Case) -> Oracle:
    """The reference's results in float64, and what the case must do at least."""
    with fastperc.use_backend("reference"):
        problem = Problem(case, exact=True)
        counted = convolutions(problem.step(problem.call(case.reference)))
    narrower = PRODUCTS[case.dtype].itemsize / torch.float64.itemsize
    costs = [Cost(moved * narrower, flops) for moved, flops in counted] + list(case.costs())
    return Oracle(*problem.results(), costs)


def errors(output: Tensor, gradients: Sequence[Tensor], expected: Oracle) -> tuple[float, float]:
    """‖result − expected‖ / ‖expected‖ of the output, and the largest of a gradient; infinite if not finite.

    A gradient that is zero but for rounding (a bias before a batch norm) is measured against the largest one, and any
    other against at least a hundredth of that.
    """
    sizes = [gradient.norm().item() for gradient in expected.gradients]
    largest = max(sizes, default=0.0)
    scales = [max(size, largest * (1e-2 if size > 1e-9 * largest else 1)) for size in sizes]

    def error(actual: Tensor, exact: Tensor, scale: float) -> float:
        assert actual.shape == exact.shape, f"shape {list(actual.shape)} instead of {list(exact.shape)}"
        return (actual - exact).norm().item() / (scale or 1.0) if actual.isfinite().all() else float("inf")

    worst = max(map(error, gradients, expected.gradients, scales), default=0.0)
    return error(output, expected.output, expected.output.norm().item()), worst


class Moment:
    """A point in the GPU's queue; the difference of two waits for the later one and is in seconds.

    As pytest-benchmark's timer it leaves the queue running between the two, which a host clock cannot.
    """

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier: Moment) -> float:
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1e3


@cache
def eviction_buffer() -> Tensor:
    return torch.empty(2**28, dtype=torch.uint8, device="cuda")


def before_each_round() -> None:
    """Evicts the GPU's caches; meanwhile Python gets ahead, so that a first launch is not waited for."""
    if DEVICE == "cuda":
        eviction_buffer().zero_()


def seconds_of(step: Step) -> float:
    """A first impression, to choose the number of rounds by."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(benchmark: Any, case: Case, provider: Provider, seconds: float, rows_file: Path | None) -> None:
    """Checks ``provider`` on ``case`` against float64, times it for about ``seconds`` and writes its row.

    Raises:
        AssertionError: a result or gradient is further from float64 than the case tolerates; nothing was timed. A
            peer's is told and left out.
    """
    with nullcontext() if provider.fused else fastperc.use_backend("reference"):
        problem = Problem(case)
        prepare = case.freeze if provider.fused else provider.prepare
        if prepare is not None and case.infers:
            problem.module = prepare(problem.module, *problem.inputs)
            if problem.module is None:
                pytest.skip(f"{provider.name} has nothing to offer here")
        run = problem.step(provider.call(problem.call(case.fused if provider.fused else case.reference)))
        step = provider.step(run)
        peak = None
        if case.track_memory and provider.name in ("reference", "fused") and not benchmark.disabled:
            if not case.infers:
                step()
            peak = peak_bytes(step, DEVICE)  # an engine takes its memory in the first call, and keeps it
        step()
        expected = oracle(case)
        error = errors(*problem.results(), expected)
        for what, off, tolerated in zip(("output", "gradient"), error, case.tolerance):
            if off > tolerated:
                told = f"{provider.name}: {what} off by {off:.1e}, more than {tolerated:.0e}"
                if provider.peer:  # its mistakes are not ours to mend
                    pytest.skip(told)
                raise AssertionError(told)
        if case.direction == "training step":
            step = provider.step(problem.with_optimizer(run))
        if benchmark.disabled:
            benchmark.pedantic(step)
            return
        step()
        rounds = min(200, max(5, int(seconds / seconds_of(step))))
        benchmark.group = f"{case.operation} {case.direction} {case.shape} {case.dtype}"
        benchmark.pedantic(step, setup=before_each_round, rounds=rounds, warmup_rounds=1)
    row = describe(case, provider, expected.costs, benchmark.stats.stats, max(error), peak)
    benchmark.extra_info.update(row)
    if rows_file is not None:
        rows.append(rows_file, row)


def describe(
    case: Case, provider: Provider, parts: Sequence[Cost], stats: Any, error: float, peak: int | None
) -> rows.Row:
    """The row of one measurement; ``stats`` are pytest-benchmark's, in seconds."""
    total = Cost(sum(part.bytes for part in parts), sum(part.flops for part in parts))
    median, iqr = stats.median / case.frames, stats.iqr / case.frames
    ceilings = bandwidth(), rate(PRODUCTS[case.dtype])
    floor = sum(part.floor(*ceilings) for part in parts)
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = None
    return rows.check(
        dict(
            operation=case.operation,
            direction=case.direction,
            shape=case.shape,
            dtype=case.dtype,
            provider=provider.name,
            device=device_name(),
            date=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            commit=rows.commit(),
            source=rows.source_hash(case.operation),
            torch=torch.__version__,
            triton=triton,
            cuda=torch.version.cuda if DEVICE == "cuda" else None,
            median_ms=significant(median * 1e3),
            iqr_ms=significant(iqr * 1e3),
            rounds=stats.rounds,
            bytes=round(total.bytes),
            flops=round(total.flops),
            gb_per_s=significant(total.bytes / median / 1e9),
            tflop_per_s=significant(total.flops / median / 1e12),
            bandwidth_gb_per_s=significant(ceilings[0] / 1e9),
            rate_tflop_per_s=significant(ceilings[1] / 1e12),
            floor_ms=significant(floor * 1e3),
            share_of_floor=significant(floor / median),
            error=significant(error),
            peak_bytes=peak,
        )
    )


def significant(x: float) -> float:
    """``x`` to four significant digits."""
    return float(f"{x:.4g}")
