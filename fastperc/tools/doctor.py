"""What a bug report needs: versions, what was compiled, and which backend runs each operation here."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastperc import _native, backends, dispatch
from fastperc._version import __version__
from fastperc.ops import onednn
from fastperc.ops.conv3x3 import unsupported as conv3x3_unsupported
from fastperc.ops.conv_bn_relu import library_unsupported
from fastperc.ops.frozen import channels_last, native_unsupported
from fastperc.ops.gram_loss import triton_unsupported as gram_loss_by_triton
from fastperc.ops.norm_relu import unsupported as norm_relu_unsupported
from fastperc.ops.rgb_conv import columns_unsupported
from fastperc.ops.vgg_loss import native_unsupported as vgg_loss_by_native

# Each operation's fused backends, and why one cannot take a tensor.
OPERATIONS: dict[str, dict[str, Callable[[Tensor], str | None]]] = {
    "tv_loss": {"native": _native.unsupported},
    "gram_loss": {"triton": gram_loss_by_triton, "native": lambda x: None},
    "vgg_loss": {"triton": backends.triton_unsupported, "native": vgg_loss_by_native},
    "conv_bn_relu": {
        "triton": backends.triton_product_unsupported,
        "native": lambda x: library_unsupported(x, (1, 1, 1, 1), "zeros", None, relu=True),
    },
    "subpixel_conv_bn_relu": {"triton": backends.triton_product_unsupported, "native": onednn.unsupported},
    "conv_chain": {"triton": backends.triton_product_unsupported},
    "conv3x3": {"native": lambda x: conv3x3_unsupported(*_trunk(x))},
    "norm_relu": {"native": lambda x: norm_relu_unsupported(channels_last(x), nn.BatchNorm2d(x.shape[1]))},
    "rgb_conv": {"native": columns_unsupported},
    "rgb_conv_stem": {"triton": backends.triton_product_unsupported, "native": lambda x: None},
    "rgb_conv_head": {"triton": backends.triton_product_unsupported, "native": onednn.unsupported},
    "instance_norm": {"triton": backends.triton_unsupported, "native": native_unsupported},
    "image_io": {"native": native_unsupported},
}


def _trunk(x: Tensor) -> tuple[Tensor, Tensor]:
    """An activation where ``x`` is, and the weight of a 3×3 convolution of it."""
    return channels_last(x.new_empty(1, 64, 64, 64)), x.new_empty(64, 64, 3, 3)


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
    devices = [torch.device("cpu")]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(torch.device("cuda", index))
        lines.append(
            f"cuda:{index:<8} {properties.name}, sm_{properties.major}{properties.minor}, "
            f"{properties.total_memory / 2**30:.0f} GiB, driver CUDA {torch.version.cuda}"
        )
    if len(devices) == 1:
        lines.append("gpu           none")
    for device in devices:
        table = dispatch.table(device)
        told = f"{table.path}, {table.date}, {len(table.times)} entries" if table else "no; `fastperc tune` measures"
        lines.append(f"{f'tuned {device}':<13} {told}")

    lines += ["", f"{'operation':<23}{'device':<9}{'backend':<11}reason"]
    for operation in OPERATIONS:
        for device in devices:
            backend, reason = _choice(operation, device)
            lines.append(f"{operation:<23}{device!s:<9}{backend:<11}{reason}")
    return "\n".join(lines)


def _choice(operation: str, device: torch.device) -> tuple[str, str]:
    """The backend that runs ``operation`` on ``device``, most often if that was measured, and why."""
    x = torch.empty(1, 3, 16, 16, device=device)
    obstacles = {backend: why_not(x) for backend, why_not in OPERATIONS[operation].items()}
    reasons = [f"not {backend}: {obstacle}" for backend, obstacle in obstacles.items() if obstacle]
    chosen = backends.choose(operation, **obstacles)
    table = dispatch.table(device)
    times = [by_backend for key, by_backend in table.times.items() if key.operation == operation] if table else []
    if times:
        wins = Counter(min(by_backend, key=by_backend.__getitem__) for by_backend in times).most_common()
        chosen = wins[0][0]
        reasons.append("measured the fastest: " + ", ".join(f"{backend} {count}x" for backend, count in wins))
    return chosen, "; ".join(reasons) or "the fastest that can, by rule of thumb"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
