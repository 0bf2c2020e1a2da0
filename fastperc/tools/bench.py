"""``fastperc bench``: how fast this machine paints, beside stock PyTorch."""

from __future__ import annotations

import copy
import io
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from statistics import median, quantiles
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from fastperc._version import __version__
from fastperc.backends import use_backend
from fastperc.devices import computes_in, processor_model, vector_instructions
from fastperc.engine import freeze
from fastperc.models import SRCNN
from fastperc.tools.tuning import seconds

FEWEST_ROUNDS, MOST_ROUNDS = 5, 50
SECONDS = 1.0  # of the rounds of a line; after that it ends with its fewest rounds
WIDTH = 200  # characters; no table is as wide

Painter = Callable[[Tensor], object]


class Timing(NamedTuple):
    """The times of a picture in milliseconds."""

    median: float
    spread: float  # from the first quartile to the third


class Line(NamedTuple):
    """A network at one size in one dtype: by stock PyTorch and by fastperc."""

    network: str
    size: tuple[int, int]  # width and height of the image in pixels
    dtype: torch.dtype
    stock: Timing
    ours: Timing


def report(
    networks: Iterable[tuple[str, nn.Module]],
    sizes: Sequence[tuple[int, int]],
    dtypes: Sequence[torch.dtype],
    device: torch.device,
) -> str:
    """A table with a line for each network, size and dtype, under a line that names the machine.

    Args:
        networks: names and networks on ``device``, in eval mode.
        sizes: widths and heights of the images in pixels.
        dtypes: of the weights and the computation.
        device: the device to paint on.
    """
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="")
    for column in ("network", "image", "dtype"):
        table.add_column(column, no_wrap=True)
    for column in ("PyTorch ms", "spread", "fastperc ms", "spread", "faster", "pictures/s"):
        table.add_column(column, justify="right", no_wrap=True)
    slow = set()
    for line in measured(networks, sizes, dtypes, device):
        dtype = str(line.dtype).removeprefix("torch.")
        if not computes_in(line.dtype, device):
            slow.add(dtype)
        numbers = [*line.stock, *line.ours, line.stock.median / line.ours.median, 1000 / line.ours.median]
        cells = [f"{number:.4g}" for number in numbers]
        cells[-2] = f"{numbers[-2]:.2f}x"
        table.add_row(line.network, "x".join(map(str, line.size)), dtype, *cells)
    text = io.StringIO()
    Console(file=text, width=WIDTH, color_system=None).print(table)
    notes = [f"frozen networks compute {dtype} in float32, which is faster here" for dtype in sorted(slow)]
    lines = [machine(device), *(line.rstrip() for line in text.getvalue().splitlines()), *notes]
    return "\n".join(lines)


def machine(device: torch.device) -> str:
    """The device and the versions, in one line."""
    if device.type == "cpu":
        name = f"{processor_model()}, {torch.get_num_threads()} threads, {vector_instructions()}"
    else:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return f"{name}; torch {torch.__version__}, fastperc {__version__}; batch 1, PyTorch eager in channels_last"


def measured(
    networks: Iterable[tuple[str, nn.Module]],
    sizes: Sequence[tuple[int, int]],
    dtypes: Sequence[torch.dtype],
    device: torch.device,
) -> Iterator[Line]:
    """Times each network in each dtype at each size."""
    for name, net in networks:
        for dtype in dtypes:
            stock, ours = painters(net, dtype)
            for width, height in sizes:
                image = torch.rand(1, 3, height, width, device=device).contiguous(memory_format=torch.channels_last)
                times = time_both([by_pytorch(stock, dtype), ours], image, device)
                yield Line(name, (width, height), dtype, *times)


def painters(net: nn.Module, dtype: torch.dtype) -> tuple[nn.Module, Painter]:
    """``net`` for stock PyTorch, and as fastperc runs it: frozen, but for an SRCNN, which has no such form."""
    stock = copy.deepcopy(net).to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if isinstance(net, SRCNN):
        return stock, lambda image: stock(image.to(dtype))
    return stock, freeze(net, dtype)


def by_pytorch(net: nn.Module, dtype: torch.dtype) -> Painter:
    """``net`` in plain PyTorch, operation by operation."""

    def paint(image: Tensor) -> Tensor:
        with use_backend("reference"):
            return net(image.to(dtype))

    return paint


def time_both(painters: Sequence[Painter], image: Tensor, device: torch.device) -> list[Timing]:
    """The times of each painter. They take turns, so that a machine that slows down slows both."""
    times: list[list[float]] = [[] for _ in painters]
    with torch.inference_mode():
        for paint in painters:
            seconds(lambda paint=paint: paint(image), device, 2)  # type: ignore[misc]  # compiles; records a CUDA graph
        began = time.perf_counter()
        while len(times[0]) < FEWEST_ROUNDS or (len(times[0]) < MOST_ROUNDS and time.perf_counter() - began < SECONDS):
            for paint, of_painter in zip(painters, times):
                of_painter.append(1000 * seconds(lambda paint=paint: paint(image), device))  # type: ignore[misc]
    return [Timing(median(of_painter), _spread(of_painter)) for of_painter in times]


def _spread(times: Sequence[float]) -> float:
    first, _, third = quantiles(times, n=4)
    return third - first
