"""The device's memory bandwidth and arithmetic rate, measured once per session. Every floor is computed from them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import cache

import rows
import torch

from fastperc.devices import processor_model, vector_instructions

# Variables by which PyTorch and its libraries leave out instructions of the processor.
HIDE_INSTRUCTIONS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")


def device_type() -> str:
    """The type of the device that benchmarks run on: the GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@cache
def device_name() -> str:
    """The GPU's name, or the processor's model with its cores and vector instructions.

    Where instruction sets are hidden, the name says that it is no machine's: its rows are refused by report.py.
    """
    if device_type() == "cuda":
        return torch.cuda.get_device_name()
    hidden = rows.EMULATED * any(name in os.environ for name in HIDE_INSTRUCTIONS)
    return f"{processor_model()}, {torch.get_num_threads()} cores, {vector_instructions()}{hidden}"


def best_seconds(step: Callable[[], object], rounds: int) -> float:
    """Seconds of the fastest of ``rounds`` runs: a ceiling is the best that the device reached."""
    step()
    if device_type() == "cpu":
        times = []
        for _ in range(rounds):
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
        return min(times)
    events = []
    for _ in range(rounds):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        step()
        after.record()
        events.append((before, after))
    torch.cuda.synchronize()
    return min(before.elapsed_time(after) for before, after in events) / 1e3


@cache
def bandwidth() -> float:
    """Bytes per second of a copy far larger than any cache, counting bytes read and bytes written."""
    device = device_type()
    size = 2**32 if device == "cuda" else 2**28
    x = torch.ones(size, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    return 2 * size / best_seconds(lambda: y.copy_(x), 10 if device == "cuda" else 4)


@cache
def rate(dtype: torch.dtype) -> float:
    """Floating-point operations per second of a large product of random matrices in ``dtype``."""
    device = device_type()
    n = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * n**3 / best_seconds(lambda: torch.mm(a, b, out=out), 10 if device == "cuda" else 4)
