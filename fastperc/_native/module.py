"""The compiled module, and what it supports."""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
from torch import Tensor

try:
    from fastperc import _C

    _missing, _has_cuda = None, bool(_C.build_info()["cuda"])  # once: torch.compile cannot trace a call of _C
except ImportError as error:  # installed without a compiler, or broken
    _C, _has_cuda = None, False  # type: ignore[assignment]
    _missing = f"the compiled module fastperc._C cannot be imported ({error})"
    warnings.warn(
        "fastperc has no compiled kernels: networks and losses run in plain PyTorch, several times slower on a "
        "CPU; install a C++ compiler and Python's headers, then fastperc again",
        stacklevel=1,
    )

DTYPES = {torch.float32: "float32", torch.float64: "float64", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def why_not(x: Tensor) -> str | None:
    """Why no compiled kernel can serve ``x``, or ``None`` if one can."""
    if _missing:
        return _missing
    if x.dtype not in DTYPES:
        return f"no kernel for {x.dtype}"
    if x.device.type == "cpu" or (x.device.type == "cuda" and _has_cuda and not torch.version.hip):
        return None
    return f"no compiled kernel for {x.device.type} tensors in this build"


def build_info() -> dict[str, Any]:
    """The compiler and the CUDA version that built the module, or ``missing``: why there is no module."""
    return {"missing": _missing} if _missing else {**_C.build_info()}


def reuse_freed_memory(block: int, kept: int) -> None:
    """Makes malloc serve up to ``block`` bytes from freed memory, and keep up to ``kept`` bytes of it in the process.

    Does nothing if the environment already configures malloc by MALLOC_MMAP_THRESHOLD_.
    """
    if not _missing and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        _C.reuse_freed_memory(block, kept)


def is_channels_last(x: Tensor) -> bool:
    """Whether ``x`` [N, C, H, W] has the channels of a pixel next to each other, and more than one of them."""
    return x.stride(1) == 1 and x.stride(3) == x.shape[1] and x.shape[1] > 1


def strides_of(x: Tensor) -> tuple[int, int, int, int]:
    n, c, h, w = x.stride()
    return n, c, h, w


def dtype_name(dtype: torch.dtype) -> str:
    return "uint8" if dtype == torch.uint8 else DTYPES[dtype]


def image_shape(x: Tensor) -> tuple[int, int, int, int]:
    """The shape of ``x``, channels-last, in the kernels' order: images, rows, columns, channels."""
    assert x.is_contiguous(memory_format=torch.channels_last)
    n, c, h, w = x.shape
    return n, h, w, c
