"""What a bug report needs: versions, what was compiled, and which backend runs each operation here."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from collections import Counter

import torch

from fastperc import _native, dispatch
from fastperc._version import __version__
from fastperc.backends import Operation
from fastperc.devices import HALF, computes_in
from fastperc.ops import OPERATIONS
from fastperc.tools.tuning import cases, tensors_of

EXAMPLE_SIDE = 64  # pixels of the images by which operations are asked which implementation they choose


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
    gpus = _gpus()
    devices = [torch.device("cpu"), *gpus]
    slow = [str(dtype).removeprefix("torch.") for dtype in HALF if not computes_in(dtype, devices[0])]
    lines.append(f"cpu           {' and '.join(slow) or 'no dtype'} computed in float32, which is faster here")
    lines += [f"{device!s:<13} {description}" for device, description in gpus.items()] or ["gpu           none"]
    for device in devices:
        table = dispatch.table(device)
        tuned = f"{table.path}, {table.date}, {len(table.times)} entries" if table else "no; `fastperc tune` measures"
        lines.append(f"{f'tuned {device}':<13} {tuned}")

    lines += ["", f"{'operation':<23}{'device':<9}{'backend':<11}reason"]
    for name, operation in OPERATIONS.items():
        for device in devices if operation.tuning_cases else ():
            backend, reason = _choice(operation, device)
            lines.append(f"{name:<23}{device!s:<9}{backend:<11}{reason}")
    return "\n".join(lines)


def _gpus() -> dict[torch.device, str]:
    """The GPUs that PyTorch sees, each with a description."""
    gpus = {}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        if torch.version.hip:
            name = properties.gcnArchName.partition(":")[0]
            details = f"{name}, {memory}, ROCm {torch.version.hip}; plain PyTorch runs here"
        else:
            details = f"sm_{properties.major}{properties.minor}, {memory}, PyTorch for CUDA {torch.version.cuda}"
        gpus[torch.device("cuda", index)] = f"{properties.name}, {details}"
    if torch.mps.is_available():
        gpus[torch.device("mps")] = "Apple's GPU; plain PyTorch runs here, untested"
    return gpus


def _choice(operation: Operation, device: torch.device) -> tuple[str, str]:
    """The backend that runs ``operation`` on ``device``, most often if that was measured, and why."""
    assert operation.tuning_cases is not None
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    key = next(key for key in cases(1, EXAMPLE_SIDE) if key.operation == operation.name and key.layout == "NHWC")
    tensors = [x.detach().to(dtype).requires_grad_(key.grad) for x in tensors_of(key, device)]
    with torch.set_grad_enabled(key.grad):
        arguments = operation.tuning_cases.call(*tensors)
        chosen = operation.choose(*arguments)
        reason = operation.reason(chosen, *arguments)
    table = dispatch.table(device)
    times = [by_name for key, by_name in table.times.items() if key.operation == operation.name] if table else []
    if times:
        wins = Counter(min(by_name, key=by_name.__getitem__) for by_name in times).most_common()
        chosen = next((one for one in operation.implementations if one.name == wins[0][0]), chosen)
        reason = "measured the fastest: " + ", ".join(f"{name} {count}x" for name, count in wins)
    return chosen.backend or "reference", reason


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
