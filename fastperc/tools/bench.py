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
SPEED = "pictures/s"


def report(net: nn.Module, sizes: Iterable[tuple[int, int]], device: torch.device) -> str:
    """A table with one line for each size: milliseconds a picture in plain PyTorch, frozen in float32 and in bfloat16.

    The pictures a second beside each time of a frozen network are of that time.

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
    columns = [name for painter in painters for name in ([painter] if painter == "PyTorch" else [painter, SPEED])]
    lines = [
        f"{device_name(device)}, torch {torch.__version__}; milliseconds a picture, the median of {ROUNDS}",
        f"{'image':<12}" + "".join(f"{name:>13}" for name in columns),
    ]
    for width, height in sizes:
        image = torch.rand(1, 3, height, width, device=device).contiguous(memory_format=torch.channels_last)
        line = f"{f'{width}x{height}':<12}"
        for name, paint in painters.items():
            seconds_a_picture = measure(paint, image, device)
            line += f"{1000 * seconds_a_picture:13.4g}"
            if name != "PyTorch":
                line += f"{1 / seconds_a_picture:13.4g}"
        lines.append(line)
    return "\n".join(lines)


def measure(paint: Callable[[torch.Tensor], torch.Tensor], image: torch.Tensor, device: torch.device) -> float:
    """The median time in seconds of ``paint(image)`` over ``ROUNDS`` calls, after two calls to warm up."""
    with torch.inference_mode():
        seconds(lambda: paint(image), device, 2)  # compiles kernels and fills caches; then records a CUDA graph
        return median(seconds(lambda: paint(image), device) for _ in range(ROUNDS))
