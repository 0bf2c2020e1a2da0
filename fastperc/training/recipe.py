"""Recipes: everything that decides a training run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

FILES = frozenset({"data", "vgg", "init", "style"})  # fields that name files
# Fields in which a resumed run may differ from the run it continues: they do not change what is computed, except that
# `iterations` does with `decay`. Files may have moved; what they hold must be the same.
FREE_TO_CHANGE = FILES | {"iterations", "checkpoint_every", "workers", "tensorboard", "device", "cache"}


class Task(NamedTuple):
    """What a recipe trains, built."""

    title: str
    net: nn.Module
    loss: Callable[[Tensor, Tensor], Any]  # (output, photos) → terms, a NamedTuple of scalars, `total` the first
    degrade: Callable[[Tensor], Tensor] | None = None  # photos → what the network sees; None: the photos themselves
    perturb: Callable[[Tensor], Tensor] | None = None  # changes what it sees at random, in training alone

    def inputs(self, photos: Tensor) -> Tensor:
        """What the network sees of ``photos`` [N, 3, H, W] in a training step; its batch may be a multiple of N."""
        seen = photos if self.degrade is None else self.degrade(photos)
        return seen if self.perturb is None else self.perturb(seen)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides a training run, whatever it trains. Where the paper gives a number, it is the default."""

    data: str
    vgg: str | None = None  # None: torchvision's weights
    vgg_preprocessing: str | None = None  # None: by the weights
    init: str | None = None  # a network of the same shape to start from
    iterations: int = 40_000
    size: int = 256  # side of the training crops, pixels
    # Each photo's shorter side is resized to `size`, or to a side drawn from a range of pixels, both ends included.
    # False: crops show the photo's own pixels.
    resize: bool | tuple[int, int] = True
    batch: int = 4  # of all processes together
    lr: float = 1e-3
    decay: bool = False  # lower lr along half a cosine to zero at `iterations`; the paper keeps it constant
    average: bool = False  # the network is the mean of the weights over the last tenth of the iterations
    seed: int = 0
    amp: bool = False  # autocast to bfloat16
    checkpoint_every: int = 1000  # iterations
    workers: int = 1  # processes that decode photos which are not packed
    cache: str = "auto"  # pack the photos; "off": decode them whenever they are needed
    sync_bn: bool = False  # batch statistics over all processes; False: each process has its own
    tensorboard: bool = False
    device: str = "cpu"

    def task(self) -> Task:
        """Builds the network, freshly initialised, and its loss, on the CPU.

        Raises:
            InputError: something in the recipe cannot be used.
        """
        raise NotImplementedError


def learning_rate(recipe: Recipe, step: int) -> float:
    """Adam's learning rate at iteration ``step``, counted from 1."""
    return recipe.lr * (1 + math.cos(math.pi * (step - 1) / recipe.iterations)) / 2 if recipe.decay else recipe.lr
