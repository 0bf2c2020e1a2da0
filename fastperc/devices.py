"""Which device to run on."""

from __future__ import annotations

import math
import platform
from contextlib import suppress

import torch

from fastperc.errors import InputError


def find_device(name: str | None) -> torch.device:
    """The device called ``name``, or the best there is when ``None``.

    Raises:
        InputError: no such device here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError):  # unknown, not compiled in, or not in this machine
        raise InputError(f"no device {name!r} here; use cpu" + ", or cuda" * torch.cuda.is_available()) from None
    return device


def device_name(device: torch.device) -> str:
    """The name of ``device``'s model; of a CPU with the number of threads that PyTorch uses."""
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    name = platform.processor() or platform.machine()
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        name = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), name)
    return f"{name} {torch.get_num_threads()} threads"


def free_memory(device: torch.device) -> float:
    """Bytes that can still be had, or infinitely many where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return next(1024 * float(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return math.inf


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
