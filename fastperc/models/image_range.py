"""Checks that images are RGB in 0–1: other ranges give other pictures, and no error by themselves."""

from __future__ import annotations

import sys
import warnings

import torch
from torch import Tensor, nn

from fastperc.ops.common import why_not_here

NEAR = (-0.5, 2.0)  # beyond are images of another range, or a network that has yet to learn it
FAR = 8.0  # beyond are levels in 0–255: no picture in 0–1, or in −1…1, gets there
RANGES = {(0.0, 1.0): "0–1", (-1.0, 1.0): "−1…1"}  # that images may have, and how messages write them
FROM_LEVELS = {"0–1": "divide levels by 255", "−1…1": "divide levels by 127.5 and subtract 1"}

_warned = False
_checked_elsewhere: set[str] = set()  # what was checked on another device than the CPU, where a check waits for it


def check_range(name: str, x: Tensor, computed: bool = False, limits: tuple[float, float] = (0.0, 1.0)) -> None:
    """Refuses images ``x`` that are not RGB in 0–1, or warns of them: once, where the values could be meant.

    On another device than the CPU only the first ``x`` of each ``name`` is checked, and none while PyTorch records the
    operations.

    Args:
        name: what the images are called in the message.
        x: of any shape.
        computed: whether they are a network's output, which may leave the range and comes back.
        limits: the range that they should have instead of 0–1, of ``RANGES``.

    Raises:
        ValueError: integers, or numbers far from 0–1 that no network has computed.
    """
    if not x.is_floating_point():
        text = RANGES[limits]
        raise ValueError(f"{name} must be RGB in {text}, floating-point numbers, got {x.dtype}; {FROM_LEVELS[text]}")
    if why_not_here() or type(x) not in (Tensor, nn.Parameter) or x.numel() == 0 or x.is_meta:
        return
    if x.device.type != "cpu":
        if name in _checked_elsewhere or (x.device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            return
        _checked_elsewhere.add(name)
    low, high = x.detach().aminmax()
    check_values(name, low.item(), high.item(), computed or x.requires_grad, limits)


def check_values(
    name: str, low: float, high: float, computed: bool = False, limits: tuple[float, float] = (0.0, 1.0)
) -> None:
    """:func:`check_range` of images whose least and greatest value are known."""
    global _warned
    text = RANGES[limits]
    if max(high, -low) > FAR and not computed:
        raise ValueError(f"{name} must be RGB in {text}, got values from {low:.4g} to {high:.4g}; {FROM_LEVELS[text]}")
    least, greatest = (limits[0] + (limits[1] - limits[0]) * edge for edge in NEAR)
    if (low < least or high > greatest) and not _warned:
        _warned = True
        warnings.warn(
            f"{name} should be RGB in {text}, got values from {low:.4g} to {high:.4g} (this is said once)",
            stacklevel=_callers_level(),
        )


def _callers_level() -> int:
    """The stack level of the line that called this library, for the caller of this function."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("fastperc", "torch"):
        level, frame = level + 1, frame.f_back
    return level
