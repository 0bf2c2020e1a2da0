"""``fastperc bench``: how fast this machine paints."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from statistics import median

import torch
from torch import nn

from fastperc.devices import device_name
from fastperc.engine import freeze
from fastperc.tools.tuning import seconds

ROUNDS = 5


def report(net: nn.Module, sizes: Iterable[tuple[int, int]], device: torch.device) -> str:
    """A table with one line for each size: milliseconds a picture in plain PyTorch, frozen in float32 and in bfloat16.

    Args:
        net: a style network on ``device``, in eval mode.
        sizes: widths and heights in pixels.
        device: the device to paint on.
    """
    painters: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "PyTorch": net,
        "fastperc": freeze(net),
        "in bfloat16": freeze(net, torch.bfloat16),
    }
    lines = [
        f"{device_name(device)}, torch {torch.__version__}; milliseconds a picture, the median of {ROUNDS}",
        f"{'image':<12}" + "".join(f"{name:>13}" for name in painters) + f"{'pictures/s':>13}",
    ]
    for width, height in sizes:
        image = torch.rand(1, 3, height, width, device=device).contiguous(memory_format=torch.channels_last)
        times = [1000 * measure(paint, image, device) for paint in painters.values()]
        lines.append(
            f"{f'{width}×{height}':<12}" + "".join(f"{ms:13.4g}" for ms in times) + f"{1000 / times[-1]:13.4g}"
        )
    return "\n".join(lines)


def measure(paint: Callable[[torch.Tensor], torch.Tensor], image: torch.Tensor, device: torch.device) -> float:
    """The median time in seconds of ``paint(image)`` over ``ROUNDS`` calls, after one call to warm up."""
    with torch.inference_mode():
        seconds(lambda: paint(image), device)  # compiles kernels and fills caches
        return median(seconds(lambda: paint(image), device) for _ in range(ROUNDS))
