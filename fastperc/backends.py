"""Operations, the ways to run each of them, and which one runs a call here, and why not another.

OPERATION = register(Operation("tv_loss", "Total variation", (Implementation(…), …), …))     declared in ops/tv_loss.py
OPERATION(x, "l2", "sum")     the fastest measured implementation that can serve the call; else the first that can
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastperc import dispatch

BACKENDS = ("reference", "native", "triton")
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OLDEST_GPU = (8, 0)  # Triton compiles matrix products for the tensor cores of this compute capability and newer
_forced: str | None = None
_pinned: dict[str, str] = {}  # operation → the implementation that alone may run it
_has_triton = find_spec("triton") is not None  # imported with the first kernel only: that takes a while

Shapes = tuple[tuple[int, ...], ...]


def never(*call: Any) -> None:
    """The reason of an implementation that serves every call."""


class Implementation(NamedTuple):
    """One way to run an operation. All three functions take the arguments of the operation."""

    backend: str | None
    """What ``use_backend`` calls it. ``None``: it calls other operations, each of which chooses for itself."""
    run: Callable[..., Any]
    why_not: Callable[..., str | None] = never
    """Why it cannot serve the call, or ``None``."""
    why_slow: Callable[..., str | None] = never
    """Why a later implementation is expected to be faster where nothing was measured, or ``None``."""
    label: str = ""
    """What tells it from others of the same backend: the algorithm or the library."""

    @property
    def name(self) -> str:
        """What ``fastperc tune`` and ``explain()`` call it."""
        return self.label or self.backend or "composed"


class TuningCases(NamedTuple):
    """What ``fastperc tune`` measures of an operation."""

    shapes: Callable[[int, int], Sequence[Shapes]]
    """From the batch and the side of the image: the shapes of the measured tensors of each call in a training step."""
    call: Callable[..., tuple[Any, ...]]
    """From such tensors: the arguments of the operation."""


def first_argument(x: Tensor, *others: Any) -> tuple[Tensor, ...]:
    """A call measured by its first argument."""
    return (x,)


def first_two_arguments(x: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor, ...]:
    """A call measured by its first two arguments, as a convolution is by input and weight."""
    return x, weight


@dataclass(frozen=True)
class Operation:
    """An operation: what it is called, the ways to run it, and how it is measured."""

    name: str
    title: str  # for people, in tables
    implementations: tuple[Implementation, ...]  # by rule of thumb the fastest first; the last serves every call
    tuning_cases: TuningCases | None = None
    sources: tuple[str, ...] = ()  # files that decide how fast it is, from the root of the repository; may be patterns
    measured_by: Callable[..., Sequence[Tensor]] = first_argument
    """From the arguments: the tensors, [N, C, H, W] each, whose shapes, dtype and layout a measurement is of."""
    frozen: bool = False  # whether only frozen networks run it, without gradients
    forcible: bool = True  # whether ``use_backend`` applies; else it applies to the operation that calls this one

    def __call__(self, *call: Any) -> Any:
        """Runs the call by the implementation that :meth:`choose` gives."""
        return self.choose(*call).run(*call)

    def choose(self, *call: Any) -> Implementation:
        """The implementation for one call.

        It is the one measured fastest (``fastperc tune``) among those that can serve it. Where nothing near was
        measured, it is the first that can serve it and is not expected to be slow.

        Raises:
            CannotServe: ``use_backend`` asks for a backend that cannot.
        """
        memory = _record.memory
        if memory is None or _record.choices is not None or _pinned:
            return self._choose(*call)
        return memory.next(self) or memory.add(self, self._choose(*call))

    def _choose(self, *call: Any) -> Implementation:
        free = self.name not in _pinned and not self._is_forced
        chosen = self._fastest(*call) if free else self._asked_for(*call)
        if _record.choices is not None:
            backend, reason = chosen.backend or "reference", self.reason(chosen, *call)
            _record.choices.append(Choice(_record.layer, self.name, backend, reason, chosen.name))
        return chosen

    @property
    def _is_forced(self) -> bool:
        return _forced is not None and self.forcible

    def _fastest(self, *call: Any) -> Implementation:
        for name in dispatch.ranking(self.name, self.measured_by(*call)):
            for implementation in self.implementations:
                if implementation.name == name and implementation.why_not(*call) is None:
                    return implementation
        for implementation in self.implementations:
            if implementation.why_not(*call) is None and implementation.why_slow(*call) is None:
                return implementation
        return self.implementations[-1]

    def _asked_for(self, *call: Any) -> Implementation:
        """The implementation that ``use_backend`` or ``use_implementation`` asks for."""
        asked = [one for one in self.implementations if one.name == _pinned.get(self.name)]
        if not asked:
            asked = [one for one in self.implementations if one.backend == _forced]
            if all(one.label for one in asked):  # ways for some shapes, beside what is made of other operations
                asked += [one for one in self.implementations if one.backend is None]
        able = [one for one in asked if one.why_not(*call) is None]
        if not able:
            reasons = [f"{one.label and one.label + ': '}{one.why_not(*call)}" for one in asked]
            reason = "; ".join(reasons) or "there is no such kernel"
            raise CannotServe(f"{self.name} cannot run on the {_pinned.get(self.name, _forced)} backend: {reason}")
        return next((one for one in able if one.why_slow(*call) is None), able[0])

    def reason(self, chosen: Implementation, *call: Any) -> str:
        """Why ``chosen`` runs the call, in words; after its label, if it has one."""
        label = "" if chosen.name == chosen.backend else f"{chosen.name}: "
        if self._is_forced:
            return label + "use_backend asks for it"
        measured = chosen.name in dispatch.ranking(self.name, self.measured_by(*call))
        reasons = ["measured the fastest"] if measured else []
        for other in self.implementations:
            if other is chosen and not measured:
                break
            if reason := other.why_not(*call) or (None if measured else other.why_slow(*call)):
                reasons.append(f"not {other.name}: {reason}")
        return label + ("; ".join(reasons) or "by rule of thumb the fastest that can")


OPERATIONS: dict[str, Operation] = {}  # every operation, by name; filled as ``fastperc.ops`` is imported


def register(operation: Operation) -> Operation:
    """Adds ``operation`` to :data:`OPERATIONS`."""
    OPERATIONS[operation.name] = operation
    return operation


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs every operation of the block on one backend: ``"reference"`` (plain PyTorch), ``"native"`` (compiled C++
    and CUDA) or ``"triton"``. An operation that it cannot serve raises a ``RuntimeError`` that says why.

    The choice holds for the whole process, as PyTorch's own backend flags do.

    Raises:
        ValueError: no such backend.
    """
    global _forced
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


@contextmanager
def use_implementation(operation: str, name: str) -> Iterator[None]:
    """Runs ``operation`` by its implementation ``name`` in the block; other operations choose as ever."""
    before = _pinned.get(operation)
    _pinned[operation] = name
    try:
        yield
    finally:
        if before is None:
            del _pinned[operation]
        else:
            _pinned[operation] = before


def forced() -> str | None:
    """The backend that ``use_backend`` asks for, or ``None``."""
    return _forced


class CannotServe(RuntimeError):
    """``use_backend`` asks for a backend that cannot serve the call."""


class Choice(NamedTuple):
    """What ran a layer's operation, and why."""

    layer: str
    operation: str
    backend: str
    reason: str
    implementation: str


Choices = list[tuple[Operation, Implementation]]


class _Memory:
    """The choices of one run, and those of an earlier run of the same calls."""

    def __init__(self, earlier: Choices) -> None:
        self._earlier, self.made = iter(earlier), Choices()

    def next(self, operation: Operation) -> Implementation | None:
        """What ran the call in the earlier run."""
        known, implementation = next(self._earlier, (None, None))
        return implementation if known is operation else None

    def add(self, operation: Operation, implementation: Implementation) -> Implementation:
        """``implementation``, which runs the call now."""
        self.made.append((operation, implementation))
        return implementation


class _Record(threading.local):
    layer = ""
    choices: list[Choice] | None = None
    memory: _Memory | None = None


_record = _Record()


@contextmanager
def recorded() -> Iterator[list[Choice]]:
    """A list that receives every choice that this thread makes in the block."""
    before = _record.choices, _record.layer
    _record.choices, _record.layer = [], ""
    try:
        yield _record.choices
    finally:
        _record.choices, _record.layer = before


@contextmanager
def remembering(choices: Choices) -> Iterator[None]:
    """Runs the calls of the block by ``choices``, which are filled by the first run: choosing takes time.

    The calls of each run must be alike in all that a choice depends on: shapes, dtypes, layouts, ``use_backend``.
    """
    before, _record.memory = _record.memory, _Memory(choices)
    try:
        yield
        if not choices:
            choices.extend(_record.memory.made)
    finally:
        _record.memory = before


def chooses_freely() -> bool:
    """Whether this thread's choices are neither recorded nor pinned, so that those of an earlier run hold."""
    return _record.choices is None and not _pinned


def at_layer(name: str) -> None:
    """Names the layer whose choices :func:`recorded` receives next."""
    _record.layer = name


def why_not_triton(x: Tensor) -> str | None:
    """Why no Triton kernel can take ``x``, or ``None``.

    Triton's interpreter (``TRITON_INTERPRET=1``), which runs kernels on any device, serves only where
    ``use_backend("triton")`` asks for it: it is for tests, and never the fastest.
    """
    if not _has_triton:
        return "Triton is not installed"
    if x.dtype not in TRITON_DTYPES:
        return f"no Triton kernel for {x.dtype}"
    if interpreted():
        return None if _forced == "triton" else "Triton runs interpreted, which is slow"
    if x.device.type != "cuda":
        return f"Triton compiles for GPUs, not for {x.device.type} tensors"
    return "Triton kernels are tuned for NVIDIA GPUs" if torch.version.hip else _why_not_gpu(x.device)


@cache
def _why_not_gpu(device: torch.device) -> str | None:
    if not torch.cuda.is_available():  # a fake tensor, of a graph traced here for a GPU elsewhere
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability >= OLDEST_GPU:
        return None
    return "Triton uses the tensor cores of sm_{}{} and newer GPUs; this is sm_{}{}, which is left to cuDNN".format(
        *OLDEST_GPU, *capability
    )


def why_not_triton_product(x: Tensor) -> str | None:
    """Why no Triton kernel with matrix products can take ``x``, or ``None``.

    Products in float32 use no tensor core, and run only where ``use_backend("triton")`` asks for them.
    """
    if (reason := why_not_triton(x)) is None and x.dtype == torch.float32 and _forced != "triton":
        reason = "products in float32 are left to the library"
    return reason


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")  # as Triton reads it


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """The block runs with the GPU of ``x`` current, where Triton launches its kernels."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()
