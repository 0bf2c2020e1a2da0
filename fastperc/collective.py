"""Sums over the processes that train one network, with the same bits in each process."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gathered(values: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The ``values`` of every process in ``group`` (default: all), stacked in the order of ranks: [processes, ...].

    All processes of the group must call it, with equal shapes and dtypes. It may be differentiated any number of times
    if all of them do so; a gradient is summed over the processes.
    """
    return _Gather.apply(values, group)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        values = values.contiguous()
        parts = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, values, group=group)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Gather.apply(grad, ctx.group)[:, dist.get_rank(ctx.group)].sum(0), None


def combine_over_processes(statistics: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Channel statistics over the values of all processes, from the statistics of each process.

    Args:
        statistics: count, mean and Σ (x - mean)² of each channel in this process, float32 or float64 [3, C]. Where
            the count is 0, the other two must be 0 too.
        group: default: all processes. They must call this in the same order.

    Returns:
        The three statistics of all values, [3, C] in the same dtype, with the same bits in every process.
        Differentiable.
    """
    counts, means, squares = gathered(statistics.double(), group).unbind(1)  # [processes, C] each
    count, mean, square = counts[0], means[0], squares[0]
    for next_count, next_mean, next_square in zip(counts[1:], means[1:], squares[1:]):  # Chan, Golub and LeVeque
        delta, total = next_mean - mean, count + next_count
        share = next_count / total.clamp(min=1)
        mean = mean + delta * share
        square = square + next_square + delta.square() * count * share
        count = total
    return torch.stack([count, mean, square]).to(statistics.dtype)
