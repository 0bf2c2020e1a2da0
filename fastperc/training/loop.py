"""The training loop: photos in, a trained network out. What is trained, and towards what, a recipe says."""

from __future__ import annotations

from contextlib import closing, nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from fastperc.devices import computes_in
from fastperc.errors import InputError
from fastperc.files import check_overwrites, check_writable
from fastperc.progress import say, silent
from fastperc.training import previews
from fastperc.training.average import WeightAverage, first_averaged
from fastperc.training.contents import contents_of
from fastperc.training.crops import PhotoCrops, batches
from fastperc.training.log import LossLog
from fastperc.training.perturb import seed_step
from fastperc.training.processes import Processes, data_parallel, join_processes
from fastperc.training.recipe import Recipe, Task, learning_rate
from fastperc.training.resume import (
    State,
    check_inputs,
    iterations_done,
    load_checkpoint,
    load_initial_weights,
    save,
)
from fastperc.training.run_folder import CHECKPOINT, LOCK, LOSSES, MODEL, PREVIEWS, locked
from fastperc.training.signals import stop_requests
from fastperc.training.step import TrainStep, adam


class Run(NamedTuple):
    """A training run, ready for its next iteration."""

    recipe: Recipe
    out: Path
    processes: Processes
    task: Task  # its network and loss are on the device
    state: State
    crops: PhotoCrops
    contents: dict[str, str]  # of the files
    start: int  # iterations done before


def train(recipe: Recipe, out: Path, resume: bool = False, command: str | None = None) -> None:
    """Trains the network of ``recipe`` and leaves the result, previews, losses and checkpoints in the folder ``out``.

    SIGINT and SIGTERM save and stop after the step that is running. With ``resume`` the run goes on from its
    checkpoint, or begins if there is none.

    Started by ``torchrun``, each process trains on its share of every batch, and the first process alone writes files
    and prints. All stop at the same iteration, on GPUs within ``GPU_INTERVAL`` iterations of the signal. The gradient
    is that of the mean of the shares' losses, which is the loss of the batch if that is a mean over its photos.

    A lock keeps a second run out of ``out``. ``command`` is the command line that resumes the run, for the line that
    says where it stopped.

    Raises:
        InputError: something in the recipe cannot be used, ``out`` holds a run and ``resume`` is false, a file there
            that would be written is an input, or another process trains there.
        FloatingPointError: the loss or a weight is no longer finite. The last checkpoint stays as it was.
    """
    with join_processes(recipe.device) as processes, silent(not processes.is_first):
        if recipe.batch % processes.count:
            raise InputError(f"a batch of {recipe.batch} cannot be shared evenly by {processes.count} processes")
        with processes.first_before_others():  # the check creates folders and removes them again
            check_inputs(recipe, out, resume)
            for name in (CHECKPOINT, MODEL, LOSSES, f"{PREVIEWS}/{1:06d}.png", LOCK):
                check_writable(out / name)
        with locked(out) if processes.is_first else nullcontext():
            step = run_iterations(prepare(recipe, out, resume, processes))
        if step >= recipe.iterations:
            say(f"finished at iteration {step}: {out / MODEL}")
        else:
            say(f"stopped at iteration {step}: {out / MODEL}" + (f"; go on by: {command}" if command else ""))


def prepare(recipe: Recipe, out: Path, resume: bool, processes: Processes) -> Run:
    """Checks ``recipe`` and ``out``, builds the network and its loss, and loads what the run starts from.

    Raises:
        InputError: as :func:`train`.
    """
    start = iterations_done(recipe, out, resume)

    torch.manual_seed(recipe.seed)
    device = processes.device
    with processes.first_before_others():  # the first may download VGG's weights
        task = recipe.task()
    if recipe.init is not None and not start:
        load_initial_weights(task.net, recipe.init)
    task.net.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if isinstance(task.loss, nn.Module):
        task.loss.to(device)
    average = WeightAverage(task.net, first_averaged(recipe), start) if recipe.average else None
    state = State(task.net, adam(task.net.parameters(), recipe.lr, device), average)
    with processes.first_before_others():  # the first may pack the photos
        crops = PhotoCrops(recipe.data, recipe.size, recipe.seed, recipe.resize, cache=recipe.cache == "auto")
    check_overwrites((out / PREVIEWS).glob("[0-9]*.png"), crops.paths)
    contents = contents_of(getattr(recipe, "style", None), task.loss, recipe.data, crops.paths)
    if start:
        load_checkpoint(recipe, contents, out, state)
    return Run(recipe, out, processes, task, state, crops, contents, start)


def run_iterations(run: Run) -> int:
    """Trains until the recipe's last iteration or until a signal stops the run; returns the last iteration done.

    Raises:
        FloatingPointError: as :func:`train`.
    """
    recipe, out, processes, task, state, crops, contents, start = run
    preview_photos = previews.preview_photos(crops, processes.device)
    net = data_parallel(task.net, processes, recipe.sync_bn)
    amp = recipe.amp and computes_in(torch.bfloat16, processes.device)
    if recipe.amp and not amp:
        say("--amp: this processor is slow in bfloat16; training goes on in float32")
    train_step = TrainStep(net, task.loss, state.optimizer, amp, task.inputs)
    say_what_is_trained(run)

    unreadable: set[str] = set()
    step = saved = start
    log = LossLog(recipe, out, start, processes)
    with closing(log), stop_requests(ignore_repeats=processes.count > 1) as stop:
        shares = batches(crops, recipe.batch, start, recipe.iterations, recipe.workers, processes.rank, processes.count)
        for photos, skipped in shares:
            step += 1
            unreadable |= skipped
            seed_step(processes.device, recipe.seed, step, processes.rank)
            log.add(train_step(photos, learning_rate(recipe, step)))
            if state.average is not None:
                state.average.update(step)
            save_due = step % recipe.checkpoint_every == 0 or step == recipe.iterations
            log_due = save_due or step % log.interval == 0
            # Several processes must ask each other about signals at the same step; one alone can look at every step.
            stopping = (log_due or processes.count == 1) and processes.any(stop.requested)
            if log_due or stopping:
                log.write(saved)  # before saving: it raises if the loss is not finite
            if save_due or stopping:
                if processes.is_first:
                    save(recipe, contents, step, state, out)
                    preview = out / PREVIEWS / f"{step:06d}.png"
                    pictures = previews.write_preview(state.result, preview_photos, task.degrade, preview)
                    if previews.paints_all_alike(preview_photos, pictures):
                        say(f"iteration {step}: the network paints all photos alike; begin again with a lower --lr")
                saved = step
            if stopping:
                break
    say_what_was_skipped(unreadable, crops)
    return step


def say_what_is_trained(run: Run) -> None:
    """Prints a line: the number of photos, the recipe's title, the device, and where a resumed run goes on."""
    parts = [f"{len(run.crops.paths)} photos", run.task.title, str(run.processes.device)]
    if run.processes.count > 1:
        parts.append(f"{run.processes.count} processes")
    if run.start:
        parts.append(f"from iteration {run.start}")
    say(" · ".join(parts))


def say_what_was_skipped(unreadable: set[str], crops: PhotoCrops) -> None:
    """Prints a line for each unreadable photo, and how many there were."""
    for path in sorted(unreadable):
        say(f"skipped {path}: cannot be read")
    if unreadable:
        say(f"{len(unreadable)} of {len(crops.paths)} photos skipped")
