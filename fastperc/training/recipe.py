"""All that decides a training run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

if TYPE_CHECKING:
    pass

FILES = frozenset({"data", "vgg", "init", "style"})  # fields that name files


# What may differ between a run and its continuation without changing what is computed.
FREE_TO_CHANGE = FILES - {"style"} | {"iterations", "checkpoint_every", "workers", "tensorboard", "device", "cache"}


class Task(NamedTuple):
    """What a recipe asks for, built."""

    title: str
    net: nn.Module
    loss: Callable[[Tensor, Tensor], Any]  # (output, photos) → terms, a NamedTuple of scalars, `total` the first
    degrade: Callable[[Tensor], Tensor] | None = None  # photos → what the network sees; None: the photos themselves


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that decides a training run, whatever is trained. The defaults are the paper's where it gives a number."""

    data: str
    vgg: str | None = None
    init: str | None = None  # a network of the same shape to start from
    iterations: int = 40_000
    size: int = 256  # side of the training crops
    resize: bool = True  # whether photos are resized to `size` on the shorter side; else crops are of their own pixels
    batch: int = 4
    lr: float = 1e-3
    decay: bool = False  # lower lr along half a cosine to zero at `iterations`; the paper keeps it constant
    seed: int = 0
    amp: bool = False
    checkpoint_every: int = 1000
    workers: int = 1
    cache: str = "auto"  # or "off": photos are decoded whenever they are needed
    sync_bn: bool = False  # batch statistics over all processes rather than each one's own
    tensorboard: bool = False
    device: str = "cpu"

    def task(self) -> Task:
        """The network, freshly initialised, and what it is to learn; on the CPU.

        Raises:
            InputError: something in the recipe cannot be used.
        """
        raise NotImplementedError


def learning_rate(recipe: Recipe, step: int) -> float:
    """Adam's step size at iteration ``step``, counted from 1."""
    return recipe.lr * (1 + math.cos(math.pi * (step - 1) / recipe.iterations)) / 2 if recipe.decay else recipe.lr
