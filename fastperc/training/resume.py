"""Where a run starts: random weights, a trained network (``--init``), or its own checkpoint (``--resume``).

The checkpoints that a run writes and those that it resumes from are both here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple, Union, get_args, get_origin, get_type_hints

import torch
from torch import nn

from fastperc import checkpoints
from fastperc.errors import InputError
from fastperc.files import check_overwrites, check_readable
from fastperc.photos.folders import search, search_and_say
from fastperc.training.average import WeightAverage, first_averaged
from fastperc.training.contents import check_same_contents
from fastperc.training.recipe import FILES, FREE_TO_CHANGE, Recipe
from fastperc.training.run_folder import CHECKPOINT, LOCK, LOSSES, MODEL

MAX_BYTES = 4 << 30  # of each file that a run reads whole


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


class SavedRun(NamedTuple):
    """A run as its checkpoint describes it."""

    recipe: Recipe
    step: int  # the last iteration done
    contents: Mapping[str, str] | None  # of its files; None: saved by a version that did not say


def read_run(kind: type[Recipe], checkpoint: Path) -> SavedRun:
    """The run that saved ``checkpoint``, whose recipe must be of that ``kind``.

    Raises:
        InputError: it cannot be read, or is of another kind of run.
    """
    training = checkpoints.read_training(checkpoint)
    try:
        step, contents = int(training.pop("step")), training.pop("contents", None)
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in training.items()}
        hints = get_type_hints(kind)
        if not isinstance(contents, dict | None) or not all(_is_of(value, hints[k]) for k, value in values.items()):
            raise TypeError
        return SavedRun(kind(**values), step, contents)
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{checkpoint}: not a checkpoint of such a training run") from None


def _is_of(value: Any, hint: Any) -> bool:
    """Whether ``value`` has the type ``hint``: a class, a tuple of one class, a dict, or a union of these."""
    if get_origin(hint) in (Union, UnionType):
        return any(_is_of(value, option) for option in get_args(hint))
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(isinstance(element, get_args(hint)[0]) for element in value)
    return isinstance(value, (int, float) if hint is float else get_origin(hint) or hint)


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
    saved_run = read_run(type(recipe), checkpoint)
    check_same_recipe(saved_run, recipe, checkpoint)
    return saved_run.step


def check_inputs(recipe: Recipe, out: Path, resume: bool) -> None:
    """Checks that the files of ``recipe`` are there, before anything is downloaded or computed, and that the run in
    ``out`` writes over none of them and over no network that another run has left.

    Raises:
        InputError: a file is missing or would be overwritten, there are no photos, or as :func:`iterations_done`.
    """
    start = iterations_done(recipe, out, resume)
    names = [name for name in ("style", "vgg", "init") if not (start and name == "init")]  # the checkpoint replaces it
    files = [file for file in (getattr(recipe, name, None) for name in names) if file is not None]
    written_before = [out / name for name in (LOSSES, LOCK) if (out / name).exists()]
    for file in (*files, *written_before):
        if check_readable(file).stat().st_size > MAX_BYTES:
            raise InputError(f"{file}: has more than {MAX_BYTES >> 30} GiB")
    if not search(recipe.data).images:
        search_and_say(recipe.data)  # raises the error
    check_overwrites((out / name for name in (MODEL, CHECKPOINT, LOSSES, LOCK)), files)
    if not resume and (out / MODEL).exists():
        raise InputError(f"{out / MODEL}: would be overwritten; name another folder")


def check_same_recipe(saved_run: SavedRun, recipe: Recipe, checkpoint: Path) -> None:
    """Checks that ``recipe`` goes on with what ``saved_run`` began, whose ``checkpoint`` messages name.

    Raises:
        InputError: it differs; the message lists how.
    """
    saved, given = asdict(saved_run.recipe), asdict(recipe)
    for fields in (saved, given):
        if saved_run.contents is None and fields.get("style"):  # an older checkpoint knows the painting by its name
            fields["name of the painting"] = Path(fields["style"]).name
    fixed = [name for name in saved if name not in FREE_TO_CHANGE or (name == "iterations" and recipe.decay)]
    differences = [f"{name} {saved[name]}, not {given[name]}" for name in fixed if saved[name] != given[name]]
    if differences:
        raise InputError(f"{checkpoint}: was trained with {'; '.join(differences)}; give the same to resume")
    if recipe.average and saved_run.step >= first_averaged(recipe) != first_averaged(saved_run.recipe):
        raise InputError(
            f"{checkpoint}: is of iteration {saved_run.step}; with --iterations {recipe.iterations} the mean of the "
            f"weights would have begun at {first_averaged(recipe)}; give {saved['iterations']} as before, or many more"
        )


def load_checkpoint(recipe: Recipe, contents: Mapping[str, str], out: Path, state: State) -> None:
    """Puts what the checkpoint in ``out`` holds into ``state``.

    Raises:
        InputError: it cannot be read, is of another network, or was trained on files with other ``contents``.
    """
    check_same_contents(read_run(type(recipe), out / CHECKPOINT).contents or {}, contents, out / CHECKPOINT)
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


def save(recipe: Recipe, contents: Mapping[str, str], step: int, state: State, out: Path) -> None:
    """Writes the network after iteration ``step`` to ``out``, then the checkpoint to resume from.

    In this order a run that is killed between the two repeats some iterations when it is resumed. In the other order
    it could end without its last network. The network's metadata names files without their folders. ``contents`` says
    what the files hold.

    Raises:
        FloatingPointError: a weight is not finite. The files stay as they were.
        OSError: a file cannot be written.
    """
    training = asdict(recipe) | dict(step=step, contents=dict(contents))
    names = {key: Path(training[key]).name for key in FILES if training.get(key)}
    checkpoints.save(state.result, out / MODEL, training=training | names)
    checkpoints.save(state.net, out / CHECKPOINT, training=training, optimizer=state.optimizer, average=state.averaged)


def is_complete(recipe: Recipe, out: Path) -> bool:
    """Whether the run in ``out`` has done all iterations of ``recipe``; a run that a signal has stopped has not."""
    return checkpoints.read_training(out / CHECKPOINT)["step"] >= recipe.iterations
