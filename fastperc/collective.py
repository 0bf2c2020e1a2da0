"""Sums over the processes that train one network, the same bits in each of them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gathered(values: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """``values`` of every process in ``group`` (default: all), stacked in the order of ranks: [processes, ...].

    It may be differentiated any number of times, as long as all processes do: a gradient is summed over them.
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
    """The statistics of what all processes of ``group`` hold, by those of what each holds.

    Args:
        statistics: count, mean and Σ (x - mean)² of each channel here, float32 or float64 [3, C]; where the count is
            0, the others are too.
        group: default: all processes. They must call this in the same order.

    Returns:
        The same of all values: [3, C] in the same dtype, the same bits in every process. Differentiable.
    """
    count, mean, m2 = gathered(statistics.double(), group).unbind(1)  # [processes, C] each
    total, center, spread = count[0], mean[0], m2[0]
    for n, mean_there, m2_there in zip(count[1:], mean[1:], m2[1:]):  # Chan, Golub and LeVeque
        delta, both = mean_there - center, total + n
        share = n / both.clamp(min=1)
        center = center + delta * share
        spread = spread + m2_there + delta.square() * total * share
        total = both
    return torch.stack([total, center, spread]).to(statistics.dtype)
