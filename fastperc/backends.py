"""Which backend runs an operation here, and why not another."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

BACKENDS = ("reference", "native", "triton")
_forced: str | None = None


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


def choose(operation: str, **obstacles: str | None) -> str:
    """The backend for one call: the first of ``obstacles`` (fastest first) that has none, else ``"reference"``.

    Args:
        operation: its name, for the message.
        obstacles: for each fused backend that this operation has, why it cannot take this call, or ``None``.

    Raises:
        RuntimeError: ``use_backend`` asks for one that cannot serve.
    """
    if _forced is None:
        return next((name for name, obstacle in obstacles.items() if obstacle is None), "reference")
    obstacle = None if _forced == "reference" else obstacles.get(_forced, "there is no such kernel")
    if obstacle is not None:
        raise RuntimeError(f"{operation} cannot run on the {_forced} backend: {obstacle}")
    return _forced
