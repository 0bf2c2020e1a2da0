"""The least that an operation must do: bytes to move, each input read and each output written once, and arithmetic.

Convolutions are counted as the reference runs them, by the formulas below. What stands between them (normalisation,
ReLU, pooling, addition) counts nothing, since it can be fused into them. A case states any other cost itself. The floor
of several costs is the sum of their floors.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


class Cost(NamedTuple):
    """Bytes to move and floating-point operations to do."""

    bytes: float
    flops: float

    def floor(self, bandwidth: float, rate: float) -> float:
        """Seconds at ``bandwidth`` bytes and ``rate`` operations per second, with memory and arithmetic overlapped."""
        return max(self.bytes / bandwidth, self.flops / rate)


def convolution(x: Tensor, weight: Tensor, out: Tensor, transposed: bool) -> Cost:
    """2·N·H·W·C'·C·k² operations, with the H × W of the output.

    Of a ``transposed`` (½-stride) convolution the H × W of the input: the zeros between its pixels need no products.
    """
    pixels = x if transposed else out
    return Cost(size(x, weight, out), 2 * pixels.shape[0] * pixels.shape[2:].numel() * weight.numel())


def gram_loss(shape: tuple[int, ...], itemsize: int) -> list[Cost]:
    """The costs of ψψᵀ for features ψ [N, C, H, W], and of its backward (G − A)ψ, 2·N·C²·HW operations each.

    The forward reads the features; the backward reads them again and writes as much. A symmetric product could do with
    half of the forward's operations, but no library makes use of that.
    """
    moved, flops = prod(shape) * itemsize, 2 * prod(shape) * shape[1]
    return [Cost(moved, flops), Cost(2 * moved, flops)]


def size(*tensors: Tensor | None) -> int:
    """Bytes of all tensors together."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


class _Counter(TorchDispatchMode):
    """Notes the cost of each convolution that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.costs: list[Cost] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is aten.convolution.default:
            self.costs.append(convolution(args[0], args[1], out, args[6]))
        elif func is aten.convolution_backward.default:
            grad, x, weight = args[:3]
            each = convolution(x, weight, grad, args[7])  # the data and the weight gradient cost the same
            needs_data, needs_weight = args[10][:2]
            moved = size(grad, x if needs_weight else None)
            moved += size(weight) * needs_data + size(*(t for t in out if t is not None))
            self.costs.append(Cost(moved, each.flops * (needs_data + needs_weight)))
        return out


def convolutions(step: Callable[[], object]) -> list[Cost]:
    """The cost of each convolution that ``step`` runs, its backward included."""
    with _Counter() as counter:
        step()
    return counter.costs
