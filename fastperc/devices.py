"""Compute devices: finding one by name, its model's name and its free memory."""

from __future__ import annotations

import math
import platform
from contextlib import suppress
from functools import cache

import torch

from fastperc.errors import InputError
from fastperc.progress import say


def find_device(name: str | None) -> torch.device:
    """The device called ``name``. ``None`` picks a CUDA GPU, or else the CPU.

    Apple's GPU has to be asked for, because nothing has been tested there; a line says so where there is one.

    Raises:
        InputError: this machine or this build of PyTorch has no such device.
    """
    if name is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        if torch.mps.is_available():
            say("using the CPU; Apple's GPU is untested, and --device mps tries it")
        return torch.device("cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError):  # unknown name, not compiled in, or not present
        raise InputError(f"no device {name!r} here; use cpu" + ", or cuda" * torch.cuda.is_available()) from None
    return device


def device_name(device: torch.device) -> str:
    """The model name of ``device``. For a CPU the number of PyTorch's threads is appended."""
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    name = platform.processor() or platform.machine()
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        name = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), name)
    return f"{name} {torch.get_num_threads()} threads"


HALF = (torch.float16, torch.bfloat16)


def computes_in(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether convolutions in ``dtype`` are worth having on ``device``: not where a processor only emulates them.

    Without instructions for it PyTorch convolves in half precision by scalar code. With AVX-512's alone, without AMX,
    an Intel Xeon took 2.5 times as long in bfloat16 as in float32; AMD's AVX-512 is trusted.
    """
    return dtype not in HALF or device.type != "cpu" or _cpu_computes_in(dtype)


@cache
def _cpu_computes_in(dtype: torch.dtype) -> bool:
    bfloat16 = dtype == torch.bfloat16
    library = torch.ops.mkldnn
    if not (library._is_mkldnn_bf16_supported() if bfloat16 else library._is_mkldnn_fp16_supported()):
        return False
    if platform.machine().lower() in ("arm64", "aarch64"):
        return True
    if not bfloat16:
        return torch.cpu._is_amx_fp16_supported()
    is_amd = "AMD" in device_name(torch.device("cpu"))
    return torch.cpu._is_amx_tile_supported() or (is_amd and torch.cpu._is_avx512_bf16_supported())


def widest_dtype(device: torch.device) -> torch.dtype:
    """The widest floating-point dtype that ``device`` computes in: Apple's GPU has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def free_memory(device: torch.device) -> float:
    """Free memory in bytes: of the GPU, or of the machine. Infinity where the system does not report it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return next(1024 * float(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return math.inf


def gigabytes(size: float) -> str:
    """``size`` bytes as text, such as ``1.5 GB``."""
    return f"{size / 1e9:.1f} GB"
