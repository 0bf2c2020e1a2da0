"""Which implementation was measured the fastest: a table for each device, written by ``fastperc tune``, read by calls.

A table is valid for one device, one minor version of torch and one version of fastperc. The user's own is in the cache
folder. Without one, a table that ships with fastperc, in ``tables/``, is used.
"""

from __future__ import annotations

import json
import math
import re
import threading
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastperc import _native
from fastperc._version import __version__
from fastperc.devices import device_name
from fastperc.files import cache_folder, write_atomically

SHIPPED = Path(__file__).parent / "tables"
MAX_BYTES = 64 << 20  # of a table
FORMAT = 2  # of the file; tables of another format are ignored
NEAR = 2.0  # how far a measurement holds, in doublings: a factor of four in pixels, or two in pixels and channels each

Milliseconds = Mapping[str, float]  # of a call, by implementation


class Key(NamedTuple):
    """What was measured."""

    operation: str
    dtype: str
    layout: str  # "NCHW" or "NHWC" in memory
    grad: bool  # whether the gradient is computed too
    shapes: tuple[tuple[int, ...], ...]  # [N, C, H, W] of each tensor

    @classmethod
    def of(cls, operation: str, x: Tensor, shapes: tuple[tuple[int, ...], ...]) -> Key:
        """The key of a call with tensors of ``shapes``; ``x`` is the first and stands for the others."""
        grad = torch.is_grad_enabled() and x.requires_grad
        layout = "NHWC" if _native.is_channels_last(x) else "NCHW"
        return cls(operation, _native.DTYPES.get(x.dtype, ""), layout, grad, shapes)


class Table(NamedTuple):
    """The measurements on one device."""

    path: Path
    date: str
    times: dict[Key, Milliseconds]

    def nearest(self, key: Key) -> Milliseconds:
        """The times of ``key`` or, if that is near, of the nearest key in pixels and channels; else nothing."""
        if key in self.times:
            return self.times[key]
        distances = {other: _distance(key, other) for other in self.times if other[:-1] == key[:-1]}
        nearest = min(distances, key=distances.__getitem__, default=None)
        return self.times[nearest] if nearest and distances[nearest] <= NEAR else {}


def _distance(a: Key, b: Key) -> float:
    """The doublings of pixels and of channels between two calls, of the tensor that differs most."""
    if len(a.shapes) != len(b.shapes):
        return math.inf
    return max(
        abs(math.log2(max(n * h * w, 1) / max(m * i * j, 1))) + abs(math.log2(max(c, 1) / max(d, 1)))
        for (n, c, h, w), (m, d, i, j) in zip(a.shapes, b.shapes)
    )


_tables: dict[torch.device, Table | None] = {}
_lock = threading.Lock()


def ranking(operation: str, tensors: Sequence[Tensor]) -> tuple[str, ...]:
    """The implementations measured for ``tensors``, each [N, C, H, W], the fastest first; none if there are none.

    A compiled graph with dynamic shapes gets none, for it must serve them all.
    """
    if not tensors:
        return ()
    x, shapes = tensors[0], tuple(x.shape for x in tensors)
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import has_static_value

        if all(has_static_value(n) for shape in shapes for n in shape):
            return _remembered(x.device, *Key.of(operation, x, tuple(tuple(shape) for shape in shapes)))
    elif table(x.device) is not None:
        with suppress(TypeError):  # symbolic sizes have no hash
            hash(shapes)
            return _measured(x.device, Key.of(operation, x, shapes))
    return ()


def _remembered(device: torch.device, *key: Any) -> tuple[str, ...]:
    return _measured(device, Key(*key))


# A compiled graph keeps the result and does not trace the function. torch.compiler.assume_constant_result does this
# too, but imports torch._dynamo, which takes seconds.
_remembered._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache(maxsize=4096)
def _measured(device: torch.device, key: Key) -> tuple[str, ...]:
    measured = table(device)
    times = measured.nearest(key) if measured else {}
    return tuple(sorted(times, key=times.__getitem__))


def table(device: torch.device) -> Table | None:
    """The table in use on ``device``, read at the first call."""
    if device not in _tables:
        with _lock:
            if device not in _tables:
                _tables[device] = _find(device)
    return _tables.get(device)


def forget() -> None:
    """Drops the tables in memory; the next call reads them again."""
    with _lock:
        _tables.clear()
        _measured.cache_clear()


def save(device: torch.device, times: Mapping[Key, Milliseconds]) -> Path:
    """Adds ``times`` to the user's table of ``device``, replacing those of the same keys.

    Raises:
        OSError: it cannot be written.
    """
    path = path_of(device)
    before = _read(path, device) if path.is_file() else None
    entries = {**(before.times if before else {}), **times}
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    rows = [{**key._asdict(), "milliseconds": entries[key]} for key in sorted(entries)]
    with write_atomically(path) as temporary:
        temporary.write_text(
            json.dumps({**_made_for(device), "format": FORMAT, "date": date, "entries": rows}) + "\n", encoding="utf-8"
        )
    forget()
    return path


def clear(device: torch.device) -> bool:
    """Removes the user's table of ``device``; returns whether there was one."""
    try:
        path_of(device).unlink()
        return True
    except FileNotFoundError:
        return False
    finally:
        forget()


def path_of(device: torch.device) -> Path:
    """The file of the user's table of ``device``, which need not exist."""
    made_for = _made_for(device)
    return cache_folder() / f"{_slug(made_for['device'])}-torch{made_for['torch']}-fastperc{made_for['fastperc']}.json"


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _made_for(device: torch.device) -> dict[str, str]:
    torch_version = ".".join(torch.__version__.split(".")[:2])
    return {"device": device_name(device), "torch": torch_version, "fastperc": __version__}


def _find(device: torch.device) -> Table | None:
    shipped = SHIPPED / f"{_slug(device_name(device))}.json"
    for path in (path_of(device), shipped):
        if path.is_file() and (table := _read(path, device)):
            return table
    return None


def _read(path: Path, device: torch.device) -> Table | None:
    """The table at ``path``; ``None`` if it is for another device or version or, with a warning, if it is damaged."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES >> 20} MiB")
        content = json.loads(path.read_text(encoding="utf-8"))
        made_for = _made_for(device)
        if any(content[key] != made_for[key] for key in made_for) or content.get("format") != FORMAT:
            return None
        return Table(path, str(content["date"]), dict(_entry(entry) for entry in content["entries"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        warnings.warn(
            f"{path}: ignored, not a table of `fastperc tune` or damaged ({error!r}); tune again to replace it",
            stacklevel=2,
        )
        return None


def _entry(entry: dict[str, Any]) -> tuple[Key, Milliseconds]:
    shapes = tuple(tuple(int(n) for n in shape) for shape in entry["shapes"])
    if not shapes or any(len(shape) != 4 for shape in shapes):
        raise ValueError(f"shapes {shapes}")
    times = {str(backend): float(time) for backend, time in entry["milliseconds"].items()}
    if not all(0 < time < math.inf for time in times.values()):
        raise ValueError(f"times {times}")
    key = Key(str(entry["operation"]), str(entry["dtype"]), str(entry["layout"]), bool(entry["grad"]), shapes)
    return key, times
