"""What a bug report needs: versions, what was compiled, and which backend runs each operation here."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from fastperc import __version__, _native, backends

# Each operation's fused backends, and why one cannot take a tensor.
OPERATIONS: dict[str, dict[str, Callable[[Tensor], str | None]]] = {
    "tv_loss": {"native": _native.unsupported},
}


def report() -> str:
    """The report that ``fastperc doctor`` prints."""
    build = _native.build_info()
    lines = [
        f"fastperc      {__version__}",
        f"python        {sys.version.split()[0]} on {platform.platform()}",
        f"torch         {torch.__version__}, {torch.get_num_threads()} threads",
        *(f"{name:<13} {_version(name)}" for name in ("triton", "numpy", "pillow", "safetensors")),
    ]
    if "missing" in build:
        lines.append(f"compiled      no: {build['missing']}")
    else:
        cuda = f"CUDA {build['cuda']} for sm {build['architectures']}" if build["cuda"] else "no CUDA"
        lines.append(f"compiled      {build['compiler']}, {cuda}")
    devices = ["cpu"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(f"cuda:{index}")
        lines.append(
            f"cuda:{index:<8} {properties.name}, sm_{properties.major}{properties.minor}, "
            f"{properties.total_memory / 2**30:.0f} GiB, driver CUDA {torch.version.cuda}"
        )
    if len(devices) == 1:
        lines.append("gpu           none")

    lines += ["", f"{'operation':<14}{'device':<9}{'backend':<11}reason"]
    for operation, candidates in OPERATIONS.items():
        for device in devices:
            obstacles = {
                name: why_not(torch.empty(1, 3, 16, 16, device=device)) for name, why_not in candidates.items()
            }
            chosen = backends.choose(operation, **obstacles)
            reasons = [f"not {name}: {obstacle}" for name, obstacle in obstacles.items() if obstacle]
            lines.append(f"{operation:<14}{device:<9}{chosen:<11}{'; '.join(reasons) or 'the fastest that can'}")
    return "\n".join(lines)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
