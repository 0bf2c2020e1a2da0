"""Which backend runs an operation here, and why not another."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from fastperc import dispatch

BACKENDS = ("reference", "native", "triton")
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WITH_SHARED_MEMORY = ((8, 0), (8, 7), (9, 0), (10, 0), (10, 1), (10, 3))  # 160 KiB and more to a block
_forced: str | None = None
_has_triton = find_spec("triton") is not None  # it is imported with the first kernel: that takes a while


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


def forced() -> str | None:
    """The backend that ``use_backend`` asks for, if it does."""
    return _forced


class CannotServe(RuntimeError):
    """``use_backend`` asks for a backend that cannot take the call."""


def choose(operation: str, *tensors: Tensor, **obstacles: str | None) -> str:
    """The backend for one call.

    It is the one measured fastest (``fastperc tune``), of those without an obstacle and ``"reference"``; where nothing
    near was measured, the first of ``obstacles`` that has none, else ``"reference"``.

    Args:
        operation: its name.
        tensors: what it works on, each [N, C, H, W], as its cases in ``fastperc.tools.tuning`` have them.
        obstacles: for each fused backend that this operation has, the fastest first by rule of thumb, why it cannot
            take this call, or ``None``.

    Raises:
        CannotServe: ``use_backend`` asks for one that cannot.
    """
    if _forced is not None:
        obstacle = None if _forced == "reference" else obstacles.get(_forced, "there is no such kernel")
        if obstacle is not None:
            raise CannotServe(f"{operation} cannot run on the {_forced} backend: {obstacle}")
        chosen = _forced
    else:
        able = [name for name, obstacle in obstacles.items() if obstacle is None] + ["reference"]
        chosen = next((name for name in dispatch.ranking(operation, tensors) if name in able), able[0])
    if _record.choices is not None:
        _record.choices.append(Choice(_record.layer, operation, chosen, _reason(operation, tensors, chosen, obstacles)))
    return chosen


class Choice(NamedTuple):
    """Which backend ran a layer's operation, and why."""

    layer: str
    operation: str
    backend: str
    reason: str


class _Record(threading.local):
    layer = ""
    choices: list[Choice] | None = None


_record = _Record()


@contextmanager
def recorded() -> Iterator[list[Choice]]:
    """A list that fills with what this thread chooses in the block."""
    before, _record.choices = _record.choices, []
    try:
        yield _record.choices
    finally:
        _record.choices = before


def at_layer(name: str) -> None:
    """Tells :func:`recorded` what comes next."""
    _record.layer = name


def _reason(operation: str, tensors: Sequence[Tensor], chosen: str, obstacles: Mapping[str, str | None]) -> str:
    if _forced is not None:
        return "use_backend asks for it"
    reasons = ["measured the fastest"] if chosen in dispatch.ranking(operation, tensors) else []
    reasons += [f"not {backend}: {obstacle}" for backend, obstacle in obstacles.items() if obstacle]
    return "; ".join(reasons) or "the fastest that can, by rule of thumb"


def triton_unsupported(x: Tensor) -> str | None:
    """Why no Triton kernel can take ``x``, or ``None`` if one can.

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
    return "Triton kernels are tuned for NVIDIA GPUs" if torch.version.hip else _gpu_unsupported(x.device)


@cache
def _gpu_unsupported(device: torch.device) -> str | None:
    if not torch.cuda.is_available():  # a made-up tensor, of a graph traced here for a GPU elsewhere
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability in WITH_SHARED_MEMORY:
        return None
    return "the kernels want 160 KiB of shared memory to a block, as on sm_{}{}, and this is sm_{}{}".format(
        *WITH_SHARED_MEMORY[0], *capability
    )


def triton_product_unsupported(x: Tensor) -> str | None:
    """Why no Triton kernel of products can take ``x``, or ``None`` if one can.

    Those in float32 run on no tensor core, and only where ``use_backend("triton")`` asks for it.
    """
    if (obstacle := triton_unsupported(x)) is None and x.dtype == torch.float32 and _forced != "triton":
        obstacle = "products in float32 are left to the library"
    return obstacle


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")  # as Triton reads it


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """The block runs with the GPU of ``x`` current, where Triton launches its kernels."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()
