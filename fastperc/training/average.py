"""The mean of a network's weights over the last iterations of a run."""

from __future__ import annotations

import copy

import torch
from torch import nn

from fastperc.training.recipe import Recipe

SHARE = 10  # the mean is over the last 1/SHARE of the iterations


def first_averaged(recipe: Recipe) -> int:
    """The first iteration after which the weights count in the mean, from 1. At least the last iteration does."""
    return recipe.iterations - max(1, recipe.iterations // SHARE) + 1


class WeightAverage:
    """The mean of a network's weights, and of its statistics, over the iterations from ``first`` on.

    It follows weights that change in place, by an optimizer or by the replay of a CUDA graph. It never waits for a GPU.

    Args:
        net: the network that is trained, on its device.
        first: the iteration after which the weights count first.
        done: iterations done before. If they reach ``first``, the means must be loaded into ``self.net``.
    """

    def __init__(self, net: nn.Module, first: int, done: int = 0) -> None:
        self.net = copy.deepcopy(net)  # its weights and statistics are the means
        self.first = first
        self.count = max(0, done - first + 1)  # states in the mean
        pairs = list(zip(self.net.state_dict().values(), net.state_dict().values()))
        self._means, self._weights = zip(*(pair for pair in pairs if pair[0].is_floating_point()))
        self._counters = [pair for pair in pairs if not pair[0].is_floating_point()]  # of batch norms

    @property
    def begun(self) -> bool:
        """Whether there is a mean already."""
        return self.count > 0

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the weights after iteration ``step``. Call it once after each, on the stream that called the step.

        A :class:`~fastperc.training.step.TrainStep` makes that stream wait for the step, and the next step for it.
        """
        if step < self.first:
            return
        self.count += 1
        torch._foreach_lerp_(self._means, self._weights, 1 / self.count)
        for mean, counter in self._counters:
            mean.copy_(counter)
