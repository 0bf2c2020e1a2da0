"""Times the implementations of each operation on a device, at the shapes of a training step: ``fastperc tune``.

The time is bounded: of the whole, of a case, and of a call. On a CPU an implementation is first tried on a small image,
and left out if a call at full size would take too long, as half precision does where a processor only emulates it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import product
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastperc import backends
from fastperc.backends import Implementation, use_implementation
from fastperc.devices import computes_in
from fastperc.dispatch import Key, Milliseconds
from fastperc.engine import cuda
from fastperc.errors import InputError
from fastperc.ops import OPERATIONS
from fastperc.presets import MINIMUM_SIDE

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
ROUNDS, FEWEST_ROUNDS = 9, 3
SECONDS_A_ROUND = 0.005  # at least; a round has as many calls as that takes
SECONDS_A_CASE = 0.6  # after that, a case ends with its fewest rounds
MOST_SECONDS_A_CASE = 3.0  # after that, it ends with the rounds that it has
SECONDS_A_CALL = 3.0  # at most; an implementation that is expected to take longer is left out
HOPELESS = 10  # times as long as the fastest is expected to take
TRIAL_SIDES = 16, 64  # of the small images; the second is more exact, and tried where the first looks a little slow
MOST_SECONDS_A_TRIAL = 0.5  # after that it is plain that a call would take too long
LARGEST_KERNEL = 9  # pixels a side of a convolution's weights


class Case(NamedTuple):
    """Something to be timed: a key of the table, and the names of the implementations that can serve it."""

    key: Key
    names: tuple[str, ...]


class Measured(NamedTuple):
    """A case that was timed or left out, and what is known of the cases after it."""

    case: Case
    times: Milliseconds  # by implementation; empty if the case was left out
    seconds_left: float  # for the cases that follow


def choices(device: torch.device, keys: Iterable[Key]) -> list[Case]:
    """The cases of ``keys`` where more than one implementation can serve, the most important on ``device`` first."""
    order = dtypes_by_importance(device)
    found = []
    for key in sorted(keys, key=lambda key: (order.index(key.dtype), key.grad)):  # else in the order given
        operation = OPERATIONS[key.operation]
        assert operation.tuning_cases is not None
        arguments = operation.tuning_cases.call(*tensors_of(key, device, filled=False))
        names = tuple(one.name for one in operation.implementations if _can_serve(one, arguments))
        if len(names) > 1:
            found.append(Case(key, names))
    return found


def dtypes_by_importance(device: torch.device) -> list[str]:
    """Half precision first on GPUs; on a CPU float32, then what it computes natively, then what it only emulates."""
    if device.type != "cpu":
        return ["bfloat16", "float16", "float32"]
    return sorted(DTYPES, key=lambda name: (name != "float32", not computes_in(DTYPES[name], device)))


def tune(device: torch.device, cases: Sequence[Case], seconds: float) -> Iterator[Measured]:
    """Times ``cases`` on ``device`` one after another, for about ``seconds`` at most.

    A case that would take longer than the time left is left out; a later one may still fit.
    """
    end = time.monotonic() + seconds
    costs: dict[Case, float] = {}  # seconds of each case so far
    slow: set[tuple[str, ...]] = set()  # what took too long without a gradient, and so would with one
    for position, case in enumerate(cases):
        began = time.monotonic()
        names = tuple(name for name in case.names if (*case.key[:3], name) not in slow)
        times = measure(case._replace(names=names), device, end - began) if names else {}
        if times:
            slow |= {(*case.key[:3], name) for name in case.names if name not in times}
        costs[case] = time.monotonic() - began
        left = sum(expected_cost(later, costs) for later in cases[position + 1 :])
        yield Measured(case, times, max(0.0, min(left, end - time.monotonic())))


def expected_cost(case: Case, costs: Mapping[Case, float]) -> float:
    """The seconds that ``case`` will take: as its operation took in another dtype or layout, or else the mean."""

    def alike(other: Case) -> bool:
        return (other.key.operation, *other.key[3:]) == (case.key.operation, *case.key[3:])

    known = [cost for other, cost in costs.items() if alike(other)] or list(costs.values())
    return sum(known) / len(known)


def cases(batch: int, size: int) -> Iterator[Key]:
    """Everything to be timed: each operation, dtype and layout, with its gradient and without.

    Args:
        batch: images.
        size: their height and width in pixels, from 16 up.

    Raises:
        InputError: the images are too small.
    """
    if size < MINIMUM_SIDE:
        raise InputError(f"--size must be at least {MINIMUM_SIDE}, got {size}")
    for name, operation in OPERATIONS.items():
        if operation.tuning_cases is None:
            continue
        grads = (False,) if operation.frozen else (True, False)
        for shapes, dtype, layout, grad in product(operation.tuning_cases.shapes(batch, size), DTYPES, LAYOUTS, grads):
            yield Key(name, dtype, layout, grad, shapes)


def tensors_of(key: Key, device: torch.device, filled: bool = True) -> list[Tensor]:
    """Tensors of the shapes, dtype and layout of ``key``: random, or of any content if not ``filled``."""
    make = torch.rand if filled else torch.empty
    tensors = [make(shape, device=device).to(DTYPES[key.dtype]) for shape in key.shapes]
    return [x.contiguous(memory_format=LAYOUTS[key.layout]).requires_grad_(key.grad) for x in tensors]


def calls_of(case: Case, device: torch.device) -> dict[str, Callable[[], None]]:
    """For each implementation of ``case`` a function that calls it on random tensors."""
    key, operation = case.key, OPERATIONS[case.key.operation]
    assert operation.tuning_cases is not None
    tensors = tensors_of(key, device)
    arguments = operation.tuning_cases.call(*tensors)

    def by(name: str) -> Callable[[], None]:
        def run() -> None:
            with use_implementation(key.operation, name):
                result = operation(*arguments)
                if key.grad:
                    backward(result, tensors)

        return run

    return {name: by(name) for name in case.names}


def measure(case: Case, device: torch.device, seconds_left: float = math.inf) -> Milliseconds:
    """The median over rounds of a call's milliseconds, by implementation.

    Implementations that would take too long a call are left out. Empty if ``seconds_left`` do not suffice.

    On a GPU a call is the replay of its CUDA graph, where it can be recorded; see :func:`replays`.
    The implementations take turns, in an order that alternates, so that a machine that slows down slows all of them.
    """
    if seconds_left <= 0:
        return {}
    if device.type == "cpu":
        expected = {name: expected_seconds(case, name, device) for name in case.names}
        most = min(SECONDS_A_CALL, max(SECONDS_A_CALL / HOPELESS, HOPELESS * min(expected.values())))
        case = case._replace(names=tuple(name for name in case.names if expected[name] <= most))
        calls_before_a_result = 2  # to warm up, and a round
        if not case.names or calls_before_a_result * sum(map(expected.__getitem__, case.names)) > seconds_left:
            return {}
    runs = replays(calls_of(case, device), device)
    began = time.perf_counter()
    rounds = {name: [seconds(run, device)] for name, run in runs.items()}
    calls = {name: max(1, round(SECONDS_A_ROUND / first)) for name, (first,) in rounds.items()}  # of a round
    for i in range(ROUNDS):
        elapsed = time.perf_counter() - began
        if i and elapsed > (SECONDS_A_CASE if i >= FEWEST_ROUNDS else MOST_SECONDS_A_CASE):
            break
        for name in case.names[:: -1 if i % 2 else 1]:
            if i == 0 and calls[name] > 1:
                rounds[name].clear()
            if i or calls[name] > 1:
                rounds[name].append(seconds(runs[name], device, calls[name]))
    return {name: 1000 * median(times) for name, times in rounds.items()}


def expected_seconds(case: Case, name: str, device: torch.device) -> float:
    """The seconds that a call of the implementation ``name`` will take at most, by trials on small images."""
    seconds_a_call = 0.0
    for side in TRIAL_SIDES:
        shrink = min(case.key.shapes[0][2:]) // side
        if shrink <= 1:
            break
        small = case.key._replace(shapes=tuple(_smaller(shape, shrink) for shape in case.key.shapes))
        (run,) = calls_of(Case(small, (name,)), device).values()
        ratio = math.prod(case.key.shapes[0]) / math.prod(small.shapes[0])
        first = seconds(run, device)  # fills caches too
        if first > MOST_SECONDS_A_TRIAL and ratio * first > 10 * SECONDS_A_CALL:
            return ratio * first
        seconds_a_call = ratio * seconds(run, device)
        if seconds_a_call <= SECONDS_A_CALL / HOPELESS:
            break
    return seconds_a_call


def _smaller(shape: tuple[int, ...], shrink: int) -> tuple[int, ...]:
    """An image of a ``shrink``-th of the height and width, without a batch; weights as they are."""
    _, channels, height, width = shape
    if max(height, width) <= LARGEST_KERNEL:
        return shape
    return 1, channels, max(1, height // shrink), max(1, width // shrink)


def replays(runs: Mapping[str, Callable[[], object]], device: torch.device) -> dict[str, Callable[[], object]]:
    """What is timed in place of ``runs``: on a GPU the replays of their CUDA graphs, as networks run them.

    If one of them cannot be recorded, all are timed operation by operation, so that the times can be compared.
    """
    for run in runs.values():
        run()  # compiles
    if device.type != "cuda":
        return dict(runs)
    graphs: dict[str, Callable[[], object]] = {}
    with torch.cuda.device(device):
        stream = torch.cuda.Stream(device)
        for name, run in runs.items():
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                run()  # libraries choose, on the stream that is recorded
            torch.cuda.current_stream().wait_stream(stream)
            try:
                graphs[name] = cuda.record(run, stream)[0].replay
            except RuntimeError:
                return dict(runs)
    return graphs


def _can_serve(implementation: Implementation, arguments: Sequence[Any]) -> bool:
    interpreted = implementation.backend == "triton" and backends.interpreted()  # never the fastest
    return not interpreted and implementation.why_not(*arguments) is None


def backward(result: Any, leaves: Sequence[Tensor]) -> None:
    """The gradients of ``leaves``, from the tensors of an operation's ``result`` that have one."""
    tensors = [result] if isinstance(result, Tensor) else list(result.values() if isinstance(result, dict) else result)
    outputs = [x for x in tensors if x.requires_grad]
    torch.autograd.grad(outputs, leaves, [torch.full_like(x, 0.5) for x in outputs])


def seconds(call: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """Seconds a call, of ``calls`` in a row."""
    synchronize = torch.get_device_module(device).synchronize
    synchronize()
    began = time.perf_counter()
    for _ in range(calls):
        call()
    synchronize()
    return (time.perf_counter() - began) / calls


def report(times: Mapping[Key, Milliseconds]) -> str:
    """A line for each measurement: the milliseconds of each implementation, and the fastest."""
    lines = [f"{'operation':<23}{'dtype':<10}{'layout':<8}{'pass':<9}{'shape':<22}{'milliseconds':<45}  fastest"]
    for key, by_name in sorted(times.items()):
        shape = "x".join(map(str, key.shapes[0])) + (f" +{len(key.shapes) - 1}" if len(key.shapes) > 1 else "")
        ranked = sorted(by_name, key=by_name.__getitem__)
        milliseconds = ", ".join(f"{name} {by_name[name]:.4g}" for name in ranked)
        lines.append(
            f"{key.operation:<23}{key.dtype:<10}{key.layout:<8}{'fwd+bwd' if key.grad else 'fwd':<9}{shape:<22}"
            + f"{milliseconds:<45}  {ranked[0]}"
        )
    return "\n".join(lines)
