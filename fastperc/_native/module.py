"""The compiled module, and what it supports."""

from __future__ import annotations

import os
import warnings
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fastperc.types import Activation

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


@lru_cache  # a second call would change nothing, and take as long as a small layer
def reuse_freed_memory(block: int, kept: int) -> None:
    """Makes malloc serve up to ``block`` bytes from freed memory, and keep up to ``kept`` bytes of it in the process.

    Does nothing if the environment already configures malloc by MALLOC_MMAP_THRESHOLD_.
    """
    if not _missing and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        _C.reuse_freed_memory(block, kept)


def is_channels_last(x: Tensor) -> bool:
    """Whether ``x`` [N, C, H, W] has the channels of a pixel next to each other, and more than one of them."""
    return x.stride(1) == 1 and x.stride(3) == x.shape[1] and x.shape[1] > 1


def pixel_step(x: Tensor) -> int | None:
    """How many elements the pixels of ``x`` [N, C, H, W] are apart, C or more: its channels are adjacent, and rows and
    images follow each other evenly. ``None`` if that is not so. A slice of the channels of a channels-last map is."""
    (n, c, h, w), (image, channel, row, column) = x.shape, x.stride()
    step = column if w > 1 else row if h > 1 else image if n > 1 else c
    even = (c == 1 or channel == 1) and (h == 1 or row == w * step) and (n == 1 or image == h * w * step)
    return step if even and step >= c else None


PASS_ACTIVATIONS = ("relu", "leaky_relu", "prelu", "relu6")  # that the C++ kernels compute


def activation_arguments(activation: Activation | None, channels: int) -> tuple[str, Tensor | None]:
    """An activation of ``PASS_ACTIVATIONS`` as the C++ kernels take it: its kind, and slopes, float32 [C], or ``None``.

    A kernel gets the address of the slopes: they must live as long as it runs.
    """
    if activation is None:
        return "none", None
    if activation.name == "leaky_relu":
        return "slopes", _equal_slopes(0.01 if activation.slope is None else activation.slope, channels)
    if activation.name == "prelu":
        assert activation.slopes is not None
        slopes = activation.slopes
        if slopes.shape == (channels,) and slopes.dtype == torch.float32 and slopes.is_contiguous():
            return "slopes", slopes
        return "slopes", slopes.detach().float().expand(channels).contiguous()
    return activation.name, None


@lru_cache(maxsize=64)
def _equal_slopes(slope: float, channels: int) -> Tensor:
    return torch.full((channels,), slope, dtype=torch.float32)


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
