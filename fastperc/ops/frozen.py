"""What the operations of networks have in common: what they refuse, and how tensors lie."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastperc import _native
from fastperc.ops.packing import packed
from fastperc.types import InstanceNorm


def check(x: Tensor, weight: Tensor, bias: Tensor, channels: int) -> None:
    """Raises a ``ValueError`` unless ``x`` has ``channels`` channels, and ``weight`` and ``bias`` fit a convolution."""
    if x.dim() != 4 or weight.dim() != 4 or x.shape[1] != channels or bias.dim() != 1:
        raise ValueError(
            f"expected x [N, I, H, W], weight [O, I, k, k] and bias [O], "
            f"got {list(x.shape)}, {list(weight.shape)} and {list(bias.shape)}"
        )


def unsupported(x: Tensor, *others: Tensor | InstanceNorm | None) -> str | None:
    """Why only plain PyTorch can take ``x`` and what else an operation is given, or ``None``."""
    if obstacle := transformed():
        return obstacle
    tensors = [x]
    for other in others:
        tensors += other[:2] if isinstance(other, InstanceNorm) else [] if other is None else [other]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return "these kernels give no gradients"
    return "the tensor is empty" if x.numel() == 0 else None


def transformed() -> str | None:
    """Why only plain PyTorch can take any call here, or ``None``."""
    if torch.compiler.is_compiling():
        return "torch.compile fuses plain PyTorch itself"
    if torch.jit.is_tracing():
        return "a trace can hold plain PyTorch alone"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "torch.func transforms plain PyTorch alone"
    return None


def compute_dtype(x: Tensor) -> torch.dtype:
    """What the convolutions of ``x`` are done in: autocast's choice, or its own dtype."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def native_unsupported(x: Tensor) -> str | None:
    """Why no C++ kernel can take ``x``, or ``None`` if one can."""
    if x.device.type != "cpu" or x.dtype == torch.float64:
        return f"no C++ kernel for {str(x.dtype).removeprefix('torch.')} on {x.device.type}"
    return _native.unsupported(x)


def channels_last(x: Tensor) -> Tensor:
    """``x`` [N, C, H, W] dense in NHWC, copied if it is not."""
    return x.contiguous(memory_format=torch.channels_last)


def side_by_side(skip: Tensor | None) -> Tensor | None:
    """``skip``, copied unless the channels of a pixel lie together."""
    return skip if skip is None or skip.stride(1) == 1 else channels_last(skip)


def empty_like(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Memory for ``shape``, channels-last, of the dtype and on the device of ``x``."""
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def in_dtype(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """``weight`` in ``dtype`` and channels-last memory; it stays differentiable."""
    if (torch.is_grad_enabled() and weight.requires_grad) or torch.compiler.is_compiling():
        return weight.to(dtype)
    return packed(
        ("in", dtype), lambda: weight.detach().to(dtype, memory_format=torch.channels_last, copy=True), weight
    )
