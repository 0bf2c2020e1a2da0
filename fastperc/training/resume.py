"""Where a run starts: random weights, a trained network (``--init``), or its own checkpoint (``--resume``).

The checkpoints that a run writes and those that it resumes from are both here.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from fastperc import checkpoints
from fastperc.errors import InputError
from fastperc.training.average import WeightAverage, first_averaged
from fastperc.training.recipe import FILES, FREE_TO_CHANGE, Recipe

CHECKPOINT = "checkpoint.safetensors"  # the network and the optimizer: what --resume reads
MODEL = "model.safetensors"  # the network alone: what the other commands read


class State(NamedTuple):
    """What changes while a network is trained."""

    net: nn.Module
    optimizer: torch.optim.Optimizer
    average: WeightAverage | None = None

    @property
    def averaged(self) -> nn.Module | None:
        """The network of mean weights, once the mean has begun."""
        return self.average.net if self.average is not None and self.average.begun else None

    @property
    def result(self) -> nn.Module:
        """The network that the run leaves."""
        return self.averaged or self.net


def iterations_done(recipe: Recipe, out: Path, resume: bool) -> int:
    """How many iterations the run in ``out`` has done: 0 if it has no checkpoint.

    Raises:
        InputError: there is a checkpoint and ``resume`` is false, or the checkpoint is of another recipe.
    """
    checkpoint = out / CHECKPOINT
    if not checkpoint.exists():
        return 0
    if not resume:
        raise InputError(f"{out}: holds a run already; continue it with --resume, or name another folder")
    return check_same_recipe(recipe, checkpoint)


def check_same_recipe(recipe: Recipe, checkpoint: Path) -> int:
    """The iteration at which ``checkpoint`` was saved.

    Raises:
        InputError: it cannot be read, or was saved with another recipe.
    """
    training = checkpoints.read_training(checkpoint)
    try:
        step = int(training.pop("step"))
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in training.items()}
        saved_recipe = type(recipe)(**values)
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{checkpoint}: not a checkpoint of such a training run") from None
    saved, given = asdict(saved_recipe), asdict(recipe)
    for name in saved.keys() - FREE_TO_CHANGE:
        if saved[name] != given[name]:
            raise InputError(
                f"{checkpoint}: was trained with {name} {saved[name]}, not {given[name]}; give the same to resume"
            )
    if recipe.average and step >= first_averaged(recipe) != first_averaged(saved_recipe):
        raise InputError(
            f"{checkpoint}: is of iteration {step}; with --iterations {recipe.iterations} the mean of the weights "
            f"would have begun at {first_averaged(recipe)}; give {saved_recipe.iterations} as before, or many more"
        )
    return step


def load_checkpoint(out: Path, state: State) -> None:
    """Puts what the checkpoint in ``out`` holds into ``state``.

    Raises:
        InputError: it cannot be read, or is of another network.
    """
    checkpoints.load_training(out / CHECKPOINT, state.net, state.optimizer, state.averaged)


def load_initial_weights(net: nn.Module, path: str) -> None:
    """Gives ``net`` the weights of the trained network in the file ``path``.

    Raises:
        InputError: it cannot be read, or is of another network.
    """
    trained = checkpoints.load(path)
    if type(trained) is not type(net) or trained.config != net.config:
        saved, given = (f"{type(network).__name__} of {network.config}" for network in (trained, net))
        raise InputError(f"{path}: holds a {saved}, which cannot start a {given}")
    net.load_state_dict(trained.state_dict())


def save(recipe: Recipe, step: int, state: State, out: Path) -> None:
    """Writes the network after iteration ``step`` to ``out``, then the checkpoint to resume from.

    In this order a run that is killed between the two repeats some iterations when it is resumed. In the other order
    it could end without its last network. The network's metadata names files without their folders.

    Raises:
        FloatingPointError: a weight is not finite. The files stay as they were.
        OSError: a file cannot be written.
    """
    training = asdict(recipe) | dict(step=step)
    names = {key: Path(training[key]).name for key in FILES if training.get(key)}
    checkpoints.save(state.result, out / MODEL, training=training | names)
    checkpoints.save(state.net, out / CHECKPOINT, training=training, optimizer=state.optimizer, average=state.averaged)


def is_complete(recipe: Recipe, out: Path) -> bool:
    """Whether the run in ``out`` has done all iterations of ``recipe``; a run that a signal has stopped has not."""
    return checkpoints.read_training(out / CHECKPOINT)["step"] >= recipe.iterations
