"""Compute devices: finding one by name, its model's name and its free memory."""

from __future__ import annotations

import math
import platform
import re
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
    name = _cpu_information().get("model name") or platform.processor() or platform.machine()
    return f"{name} {torch.get_num_threads()} threads"


def processor_model() -> str:
    """The CPU's model, such as ``AMD Ryzen 9 7950X``.

    Where a virtual machine hides the model's number, family and model follow: ``Intel Xeon (family 6, model 207)``.
    """
    information = _cpu_information()
    name = information.get("model name") or platform.processor() or platform.machine()
    name = re.sub(r"\((R|TM)\)|\bCPU\b|\bProcessor\b|@.*|\d+-Core", "", name)
    name = " ".join(name.split())
    if any(character.isdigit() for character in name) or "cpu family" not in information:
        return name
    return f"{name} (family {information['cpu family']}, model {information['model']})"


def vector_instructions() -> str:
    """The vector instructions that PyTorch uses on this CPU, with those for half precision: ``AVX-512 BF16``."""
    name = torch.backends.cpu.get_cpu_capability()
    if name == "AVX512":
        half = " AMX" if torch.cpu._is_amx_tile_supported() else " BF16" * torch.cpu._is_avx512_bf16_supported()
        return f"AVX-512{half}"
    if name == "DEFAULT":
        return "NEON" if _is_arm() else "no AVX2"
    return name


def _cpu_information() -> dict[str, str]:
    """What Linux says of the first CPU, such as its ``model name``; empty elsewhere."""
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        first, _, _ = file.read().partition("\n\n")
        pairs = (line.partition(":") for line in first.splitlines())
        return {name.strip(): value.strip() for name, _, value in pairs}
    return {}


def _is_arm() -> bool:
    return platform.machine().lower() in ("arm64", "aarch64")


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
    if _is_arm():
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
