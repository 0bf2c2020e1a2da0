"""The normalisations that the modules offer, and the dtype of their statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


def make_norm(kind: str, channels: int) -> nn.Module:
    """The normalisation called ``kind``, ``"batch"`` or ``"instance"``, with a scale and a shift per channel."""
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    if kind == "instance":
        return nn.InstanceNorm2d(channels, affine=True)
    raise ValueError(f"norm must be 'batch' or 'instance', got {kind!r}")


class WideStatistics(nn.Module):
    """A module whose statistics stay in float32 or wider, whatever ``.half()``, ``.to()`` and the like ask for.

    Statistics are its own tensors, and those of children that are norms with running statistics, scale and shift
    included: PyTorch normalises half precision by float32, but not by a mixture. Half precision ends at 65,504 and
    begins at 6e-8, which variances, Gram matrices and their scales exceed.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        for child in self.children() if recurse else ():
            measured = isinstance(child, _NormBase) and child.running_mean is not None
            child._apply(_in_float32_or_wider(fn) if measured else fn)
        return super()._apply(_in_float32_or_wider(fn), recurse=False)


def _in_float32_or_wider(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """``fn``, a conversion of a tensor's dtype, device or memory, without the loss of precision."""

    def convert(x: Tensor) -> Tensor:
        y = fn(x)
        if not y.is_floating_point() or y.dtype in (torch.float32, torch.float64):
            return y
        return x.to(y.device, torch.float32)

    return convert
