"""Times the implementations of each operation on a device, at the shapes of a training step: ``fastperc tune``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import product
from statistics import median
from typing import Any

import torch
from torch import Tensor

from fastperc import backends
from fastperc.backends import Implementation, use_implementation
from fastperc.dispatch import Key, Milliseconds
from fastperc.engine import cuda
from fastperc.errors import InputError
from fastperc.ops import OPERATIONS
from fastperc.presets import MINIMUM_SIDE

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
ROUNDS, FEWEST_ROUNDS = 9, 3
SECONDS_A_ROUND = 0.005  # at least; a round has as many calls as that takes
SECONDS_A_CASE = 1.0  # after that, a case ends with its fewest rounds


def tune(device: torch.device, keys: Iterable[Key]) -> dict[Key, Milliseconds]:
    """The milliseconds of a call on ``device``, by implementation, for each of ``keys`` from :func:`cases`.

    A case that only one implementation can serve is left out.
    """
    times = {key: measure(key, device) for key in keys}
    return {key: by_name for key, by_name in times.items() if by_name}


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


def tensors_of(key: Key, device: torch.device) -> list[Tensor]:
    """Random tensors of the shapes, dtype and layout of ``key``."""
    tensors = [torch.rand(shape, device=device).to(DTYPES[key.dtype]) for shape in key.shapes]
    return [x.contiguous(memory_format=LAYOUTS[key.layout]).requires_grad_(key.grad) for x in tensors]


def measure(key: Key, device: torch.device) -> Milliseconds:
    """The median over rounds of a call's milliseconds, by implementation; empty if only one can serve.

    On a GPU a call is the replay of its CUDA graph, where it can be recorded; see :func:`replays`.
    The implementations take turns, in an order that alternates, so that a machine that slows down slows all of them.
    """
    operation = OPERATIONS[key.operation]
    assert operation.tuning_cases is not None
    tensors = tensors_of(key, device)
    arguments = operation.tuning_cases.call(*tensors)

    def call() -> None:
        result = operation(*arguments)
        if key.grad:
            backward(result, tensors)

    def by(name: str) -> Callable[[], None]:
        def run() -> None:
            with use_implementation(key.operation, name):
                call()

        return run

    able = [one.name for one in operation.implementations if _can_serve(one, arguments)]
    if len(able) < 2:
        return {}
    runs = replays({name: by(name) for name in able}, device)
    calls: dict[str, int] = {}  # of a round, by implementation
    for name, run in runs.items():
        seconds(run, device)  # fills caches
        calls[name] = max(1, round(SECONDS_A_ROUND / seconds(run, device)))
    rounds: dict[str, list[float]] = {name: [] for name in calls}
    began = time.perf_counter()
    for i in range(ROUNDS):
        if i >= FEWEST_ROUNDS and time.perf_counter() - began > SECONDS_A_CASE:
            break
        for name in able[:: -1 if i % 2 else 1]:
            rounds[name].append(seconds(runs[name], device, calls[name]))
    return {name: 1000 * median(times) for name, times in rounds.items()}


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
