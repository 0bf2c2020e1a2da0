"""A benchmark's case, and how it is checked, timed and turned into a row."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
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
from providers import PROVIDERS, Function, Provider
from torch import Tensor, nn

import fastperc
from fastperc.devices import computes_in

DEVICE = device_type()
DTYPE = {"cpu": "fp32", "cuda": "bf16"}[DEVICE]  # the default of a case on this device
# "amp": float32 weights and images under autocast to bfloat16, as `fastperc train --amp` has them.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "amp": torch.float32}
CLIFF = 20  # a peer that takes so many times as long as the fastest provider before it is timed once
PATIENCE = 3.0  # seconds of a call; what takes longer is no matter of caches or a lazy compiler, and not tried again
LONG = 0.5  # seconds of a call; caches are of no account then
PRODUCTS = {"fp32": torch.float32, "bf16": torch.bfloat16, "amp": torch.bfloat16}  # dtypes of convolutions' products


@dataclass(frozen=True)
class Case:
    """What is timed: one operation in one direction on inputs of one shape.

    ``reference`` and ``fused`` take the module, if there is one, and the inputs, and return a tensor. In inference
    ``fused`` gets the result of ``freeze(module, *inputs)`` in place of the module, if ``freeze`` is given, and in
    training that of ``accelerate(module)``.
    """

    operation: str  # as in bench_<operation>.py
    direction: str  # "forward", "forward+backward", "training step" (with Adam); in eval mode "inference", "video"
    shape: str
    dtype: str  # a key of DTYPES
    inputs: Callable[[], tuple[Tensor, ...]]  # float32 or uint8, on the CPU; gradients where they require them
    reference: Function
    tolerance: tuple[float, float]  # largest relative error against float64, of the output and of any gradient
    fused: Function | None = None  # None: there is no such kernel yet
    module: Callable[[], nn.Module] | None = None
    freeze: Callable[..., Function] | None = None  # not timed
    accelerate: Callable[[nn.Module], nn.Module] | None = None  # in training; shares the module's parameters
    compiled: bool = True  # whether torch.compile is tried, which takes long for large networks
    costs: Callable[[], Sequence[Cost]] = list  # of everything but convolutions
    channels_last: bool = False
    track_memory: bool = False
    frames: int = 1  # of a video, each an input; the row is per frame, and the last picture is checked

    @property
    def infers(self) -> bool:
        """Whether the weights are constant."""
        return self.direction in ("inference", "video")

    @property
    def id(self) -> str:
        """The case's part of a test's name."""
        return "-".join(f"{self.direction} {self.shape} {self.dtype}".replace(",", "").split())


def runs(cases: Iterable[Case]) -> Any:
    """A mark that runs a test for each case with each provider that serves it on this machine's device."""
    return pytest.mark.parametrize(
        ("case", "provider"),
        [
            pytest.param(
                case,
                provider,
                id=f"{case.id}-{provider.name}",
                marks=[pytest.mark.benchmark(timer=GpuTime)] if DEVICE == "cuda" else [],
            )
            for case in cases
            for provider in PROVIDERS
            if provider.is_for(case, DEVICE)
        ],
    )


class Problem:
    """The inputs and the module of a case in its dtype, or, if ``exact``, the same values in float64."""

    def __init__(self, case: Case, exact: bool = False) -> None:
        torch.manual_seed(0)
        self.case, self.exact = case, exact
        self.autocast = case.dtype == "amp" and not exact
        # Not in float64: PyTorch 2.13 has wrong gradients of instance norms in NHWC.
        layout = torch.channels_last if case.channels_last and not exact else torch.contiguous_format
        rounded = DTYPES[case.dtype]
        dtype = torch.float64 if exact else rounded
        self.module: Any = case.module() if case.module else None  # a provider may prepare another callable of it
        if self.module is not None:
            self.module.to(rounded).to(DEVICE, dtype).train(not case.infers)
            self.module.to(memory_format=layout)  # type: ignore[call-overload]
        self.inputs = []
        for x in case.inputs()[-1:] if exact and case.frames > 1 else case.inputs():
            if x.dtype == torch.uint8:  # images of levels; a video's frames [H, W, 3] stay on the CPU
                y = x.to(DEVICE, memory_format=layout) if x.dim() == 4 else x
            elif x.dim() == 4:  # images and features
                y = x.detach().to(rounded).to(DEVICE, dtype, memory_format=layout)
            else:  # anything else is at least float32
                y = x.detach().to(DEVICE, torch.promote_types(dtype, torch.float32))
            self.inputs.append(y.requires_grad_(x.requires_grad))
        parameters = [] if self.module is None else list(self.module.parameters())
        self.leaves = [x for x in (*self.inputs, *parameters) if x.requires_grad and not case.infers]
        self.gradient: Tensor | None = None
        self.output: Tensor = torch.empty(0)

    def call(self, function: Function) -> Function:
        """``function`` with the module already given: it takes the inputs alone."""
        return function if self.module is None else lambda *inputs: function(self.module, *inputs)

    def step(self, call: Function) -> Function:
        """What is timed, without the optimizer; it sets ``output`` and the gradients of ``leaves``."""

        def infer() -> None:
            with (
                torch.inference_mode(mode=not self.exact),
                torch.no_grad(),
            ):  # costs cannot be counted in inference mode
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
        """The gradient of ``output``: random, the same in every step."""
        if self.gradient is None:
            values = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
            self.gradient = torch.empty_like(output).copy_(values)
        return self.gradient

    def with_optimizer(self, step: Function) -> Function:
        """``step``, and then one of Adam."""
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
    """The exact results of a case, in float64, and the least that it must do."""

    output: Tensor
    gradients: list[Tensor]
    costs: Sequence[Cost]


@lru_cache(maxsize=1)  # the providers of a case run one after another
def oracle(case: Case) -> Oracle:
    """The reference's results and costs."""
    with fastperc.use_backend("reference"):
        problem = Problem(case, exact=True)
        counted = convolutions(problem.step(problem.call(case.reference)))
    narrower = PRODUCTS[case.dtype].itemsize / torch.float64.itemsize
    costs = [Cost(moved * narrower, flops) for moved, flops in counted] + list(case.costs())
    return Oracle(*problem.results(), costs)


def errors(output: Tensor, gradients: Sequence[Tensor], expected: Oracle) -> tuple[float, float]:
    """‖result − expected‖ / ‖expected‖ of the output, and the largest of any gradient; infinite if not finite.

    A gradient that is zero except for rounding (of a bias before a batch norm) is compared with the norm of the largest
    gradient, and any other with at least a hundredth of that.
    """
    sizes = [gradient.norm().item() for gradient in expected.gradients]
    largest = max(sizes, default=0.0)
    scales = [max(size, largest * (1e-2 if size > 1e-9 * largest else 1)) for size in sizes]

    def error(actual: Tensor, exact: Tensor, scale: float) -> float:
        assert actual.shape == exact.shape, f"shape {list(actual.shape)} instead of {list(exact.shape)}"
        return (actual - exact).norm().item() / (scale or 1.0) if actual.isfinite().all() else float("inf")

    worst = max(map(error, gradients, expected.gradients, scales), default=0.0)
    return error(output, expected.output, expected.output.norm().item()), worst


class GpuTime:
    """A point in the GPU's queue, as pytest-benchmark's timer; ``later - earlier`` is in seconds.

    Only the difference waits for the GPU. A host clock would have to empty the queue at both points.
    """

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier: GpuTime) -> float:
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1e3


@cache
def eviction_buffer() -> Tensor:
    """A GPU buffer larger than its caches."""
    return torch.empty(2**28, dtype=torch.uint8, device="cuda")


def evict_caches() -> None:
    """Evicts the GPU's caches before a round; meanwhile Python runs ahead, so that the GPU need not wait for it."""
    if DEVICE == "cuda":
        eviction_buffer().zero_()


def seconds_of(step: Function) -> float:
    """The time of one call, to choose the number of rounds."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


_fastest: dict[tuple[str, str], float] = {}  # of each case, the seconds of its fastest provider so far


def is_off_the_cliff(case: Case, provider: Provider, seconds: float) -> bool:
    """Whether a call of a peer took ``CLIFF`` times as long as the fastest provider so far; remembers the fastest."""
    key = (case.operation, case.id)
    fastest = _fastest[key] = min(seconds, _fastest.get(key, math.inf))
    return not provider.fused and seconds > CLIFF * fastest


def measure(benchmark: Any, case: Case, provider: Provider, seconds: float, rows_file: Path | None) -> None:
    """Checks ``provider`` on ``case`` against float64, times it for about ``seconds`` and appends its row to a file.

    Skips the test where the provider cannot run the case, and where another library's results are wrong. A peer that
    is slow beyond ``CLIFF`` is checked, tried once (twice if that took less than ``PATIENCE``) and timed once.

    Raises:
        AssertionError: a result or gradient is further from float64 than the case tolerates; nothing was timed.
    """
    with nullcontext() if provider.fused else fastperc.use_backend("reference"):
        problem = Problem(case)
        run = prepared(problem, provider)
        step = provider.wrap_step(run)
        peak = None
        if case.track_memory and provider.name in ("reference", "fused") and not benchmark.disabled:
            if not case.infers:
                step()
            peak = peak_bytes(step, DEVICE)  # an engine allocates its memory in the first call, and keeps it
        with skipped_if_unable(provider):
            step()
        expected = oracle(case)
        error = errors(*problem.results(), expected)
        check_errors(error, case, provider)
        if case.direction == "training step":
            step = provider.wrap_step(problem.with_optimizer(run))
        if benchmark.disabled:
            benchmark.pedantic(step)
            return
        seconds_a_call = seconds_of(step)
        if seconds_a_call < (PATIENCE if is_off_the_cliff(case, provider, seconds_a_call) else LONG):
            seconds_a_call = seconds_of(step)
        timed_once = is_off_the_cliff(case, provider, seconds_a_call)
        fewest = 5 if seconds_a_call < LONG else 3
        rounds = 1 if timed_once else min(200, max(fewest, int(seconds / seconds_a_call)))
        benchmark.group = f"{case.operation} {case.direction} {case.shape} {case.dtype}"
        benchmark.pedantic(step, setup=evict_caches, rounds=rounds, warmup_rounds=int(DEVICE == "cuda"))
    row = make_row(Measurement(case, provider, expected.costs, max(error), peak, timed_once), benchmark.stats.stats)
    benchmark.extra_info.update(row)
    if rows_file is not None:
        rows.append(rows_file, row)


@contextmanager
def skipped_if_unable(provider: Provider) -> Iterator[None]:
    """Skips the test of another library whose first call fails."""
    try:
        yield
    except RuntimeError as error:
        if not provider.is_other_library:
            raise
        pytest.skip(f"{provider.name} cannot run this case here: {str(error).strip().splitlines()[-1]}")


def prepared(problem: Problem, provider: Provider) -> Function:
    """The step of ``problem`` as ``provider`` runs it; skips the test if it cannot."""
    case = problem.case
    prepare = case.freeze if provider.fused else provider.prepare
    if prepare is not None and case.infers:
        with skipped_if_unable(provider):
            problem.module = prepare(problem.module, *problem.inputs)
        if problem.module is None:
            pytest.skip(f"{provider.name} cannot run this case")
    if provider.fused and not case.infers and case.accelerate is not None:
        problem.module = case.accelerate(problem.module)
    function = case.fused if provider.fused else case.reference
    assert function is not None
    return problem.step(provider.wrap_call(problem.call(function)))


def check_errors(error: tuple[float, float], case: Case, provider: Provider) -> None:
    """Compares the errors of output and gradients with the case's tolerances; skips the test of another library.

    Raises:
        AssertionError: eager PyTorch or fastperc is less accurate than the case tolerates.
    """
    for name, value, tolerance in zip(("output", "gradient"), error, case.tolerance):
        if value > tolerance:
            message = f"{provider.name}: {name} off by {value:.1e}, more than {tolerance:.0e}"
            if provider.is_other_library:
                pytest.skip(message)
            raise AssertionError(message)


class Measurement(NamedTuple):
    """What a row says besides the times."""

    case: Case
    provider: Provider
    costs: Sequence[Cost]
    error: float  # the largest
    peak_bytes: int | None
    timed_once: bool  # see CLIFF


def make_row(measurement: Measurement, stats: Any) -> rows.Row:
    """The row of one measurement; ``stats`` are pytest-benchmark's, in seconds."""
    case, provider, costs, error, peak, timed_once = measurement
    total = Cost(sum(cost.bytes for cost in costs), sum(cost.flops for cost in costs))
    median, iqr = stats.median / case.frames, stats.iqr / case.frames
    products = PRODUCTS[case.dtype]
    ceilings = bandwidth(), rate(products if computes_in(products, torch.device(DEVICE)) else torch.float32)
    floor = sum(cost.floor(*ceilings) for cost in costs)
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
            timed_once=timed_once,
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


Measure = Callable[[Case, Provider], None]  # the fixture ``measure`` of conftest.py


def significant(x: float) -> float:
    """``x`` to four significant digits."""
    return float(f"{x:.4g}")
