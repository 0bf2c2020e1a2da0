"""The normalisations that the modules offer."""

from __future__ import annotations

from typing import Literal

from torch import nn

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


def make_norm(kind: str, channels: int) -> nn.Module:
    """The normalisation called ``kind``, ``"batch"`` or ``"instance"``, with a scale and a shift per channel."""
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    if kind == "instance":
        return nn.InstanceNorm2d(channels, affine=True)
    raise ValueError(f"norm must be 'batch' or 'instance', got {kind!r}")
