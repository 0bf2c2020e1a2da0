"""The least an operation must do: bytes, each input read and each output written once, and floating-point operations.

Convolutions are counted where the reference runs them, by the formulas below; what stands between (normalisation, ReLU,
pooling, addition) counts nothing, for it can be fused into them. What else a case must do, it states. The floor of
several is the sum of each.
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
    bytes: float
    flops: float

    def floor(self, bandwidth: float, rate: float) -> float:
        """Seconds at ``bandwidth`` bytes and ``rate`` operations a second, memory and arithmetic overlapped."""
        return max(self.bytes / bandwidth, self.flops / rate)


def convolution(x: Tensor, weight: Tensor, out: Tensor, transposed: bool) -> Cost:
    """2·N·H'·W'·C'·C·k² operations; of a ½-stride one H × W, the smaller map's: its zeros are not multiplied."""
    taken = x if transposed else out
    return Cost(size(x, weight, out), 2 * taken.shape[0] * taken.shape[2:].numel() * weight.numel())


def gram_loss(shape: tuple[int, ...], itemsize: int) -> list[Cost]:
    """ψψᵀ reads features [N, C, H, W]; backward, (G − A)ψ reads them again, writes as much; 2·N·C²·HW operations each.

    A symmetric product needs half of the first, which no library makes use of.
    """
    moved, flops = prod(shape) * itemsize, 2 * prod(shape) * shape[1]
    return [Cost(moved, flops), Cost(2 * moved, flops)]


def size(*tensors: Tensor | None) -> int:
    """Bytes of the tensors together."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.costs: list[Cost] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is aten.convolution.default:
            self.costs.append(convolution(args[0], args[1], out, args[6]))
        elif func is aten.convolution_backward.default:
            grad, x, weight = args[:3]
            each = convolution(x, weight, grad, args[7])  # as much for the data gradient as for the weights'
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
