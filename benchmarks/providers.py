"""Who computes an operation in a benchmark; declared once for all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

Step = Callable[..., Any]


def unchanged(step: Step) -> Step:
    return step


def compiled(mode: str | None = None) -> Callable[[Step], Step]:
    """``torch.compile`` for these very shapes."""

    def prepare(call: Step) -> Step:
        torch.compiler.reset()
        function = torch.compile(call, mode=mode, dynamic=False)

        def next_step(*inputs: Any) -> Any:
            torch.compiler.cudagraph_mark_step_begin()  # the results of the step before may be overwritten
            return function(*inputs)

        return next_step

    return prepare


def captured(step: Step) -> Step:
    """``step`` as the replay of a CUDA graph: what a GPU needs once nobody waits for Python."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # libraries choose their algorithms and kernels are compiled before the capture
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


class Provider(NamedTuple):
    """``call`` wraps the operation, ``step`` the whole of what is timed: operation, backward and optimizer."""

    name: str
    fused: bool  # whether it runs the case's fused callable, or its reference
    call: Callable[[Step], Step] = unchanged
    step: Callable[[Step], Step] = unchanged
    devices: tuple[str, ...] = ("cpu", "cuda")


# A case runs them in this order: should time run out, what is left is what compiles the longest.
PROVIDERS = (
    Provider("reference", False),  # eager PyTorch
    Provider("fused", True),
    Provider("fused-graph", True, step=captured, devices=("cuda",)),
    Provider("graph", False, step=captured, devices=("cuda",)),  # the honest baseline: eager without its launches
    Provider("compile", False, call=compiled()),
    Provider("max-autotune", False, call=compiled("max-autotune"), devices=("cuda",)),
)
