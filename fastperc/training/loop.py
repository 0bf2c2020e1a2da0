"""Training by gradient descent on a folder of photos: the loop, its checkpoints, and how it stops and starts again.

What is trained, and towards what, the recipe says: ``fastperc.training.style``, ``fastperc.training.super_resolution``.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastperc import checkpoints
from fastperc.errors import InputError
from fastperc.files import check_writable, write_atomically
from fastperc.photos.photo import contact_sheet
from fastperc.progress import say, silent
from fastperc.training.crops import PhotoCrops, batches
from fastperc.training.log import Log
from fastperc.training.processes import Processes, processes
from fastperc.training.recipe import FILES, FREE_TO_CHANGE, Recipe, learning_rate
from fastperc.training.step import TrainStep, adam

if TYPE_CHECKING:
    pass

CHECKPOINT = "checkpoint.safetensors"  # the network and the optimizer: what --resume reads
MODEL = "model.safetensors"  # the network alone: what the other commands read


def train(recipe: Recipe, out: Path, resume: bool = False) -> None:
    """Trains the network of ``recipe`` and leaves the result, previews, losses and checkpoints in ``out``.

    SIGINT and SIGTERM save and stop after the step under way. With ``resume`` the run goes on from its checkpoint,
    bit for bit on the CPU, or begins where there is none. Started by ``torchrun``, every process trains on its share
    of each batch, and the first alone writes and speaks; they stop together, a GPU's within ``LOG_EVERY`` steps. What
    they descend is the mean of the losses of their shares, which is the loss of the batch where that is a mean over
    its photos.

    Raises:
        InputError: something in the recipe cannot be used, or ``out`` holds a run and ``resume`` is false.
        FloatingPointError: the loss or a weight is no longer finite. The last checkpoint stays as it was.
    """
    with processes(recipe.device) as together, silent(not together.first):
        _train(recipe, out, resume, together)


def _train(recipe: Recipe, out: Path, resume: bool, together: Processes) -> None:
    if recipe.batch % together.count:
        raise InputError(f"a batch of {recipe.batch} cannot be shared evenly by {together.count} processes")
    with together.one_first():  # or one would remove the folders that another has just made to see whether it can
        checkpoint = check_writable(out / CHECKPOINT)
    if checkpoint.exists() and not resume:
        raise InputError(f"{out}: holds a run already; continue it with --resume, or name another folder")
    start = check_same_recipe(recipe, checkpoint) if checkpoint.exists() else 0

    torch.manual_seed(recipe.seed)
    device = together.device
    with together.one_first():  # it may fetch weights
        title, net, loss, degrade = recipe.task()
    if recipe.init is not None and not start:
        initialise(net, recipe.init)
    net.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    loss = loss.to(device) if isinstance(loss, nn.Module) else loss
    optimizer = adam(net.parameters(), recipe.lr, device)
    if start:
        checkpoints.load_training(checkpoint, net, optimizer)
    with together.one_first():  # it may pack the photos
        crops = PhotoCrops(recipe.data, recipe.size, recipe.seed, recipe.resize, cache=recipe.cache == "auto")
    previews = torch.stack([crops[i][0] for i in range(min(4, len(crops.paths)))]).to(device) / 255
    step_of = TrainStep(shared(net, together, recipe.sync_bn), loss, optimizer, recipe.amp, degrade)
    say(
        f"{len(crops.paths)} photos · {title} · {device}"
        + f" · {together.count} processes" * (together.count > 1)
        + f" · from iteration {start}" * bool(start)
    )

    unreadable: set[str] = set()
    step = saved = start
    log = Log(recipe, out, start, together)
    with closing(log), stop_requests(patient=together.count > 1) as stop:
        photo_batches = batches(
            crops, recipe.batch, start, recipe.iterations, recipe.workers, together.rank, together.count
        )
        for photos, skipped in photo_batches:
            step += 1
            unreadable |= skipped
            log.add(step_of(photos, learning_rate(recipe, step)))
            due = step % recipe.checkpoint_every == 0 or step == recipe.iterations
            looks = due or step % log.every == 0
            # Alone, a request is heard at once; several processes hear it where they look, together.
            stops = together.any(stop.requested) if looks or together.count == 1 else False
            if looks or stops:
                log.write(saved)
            if (due or stops) and together.first:
                save(recipe, step, net, optimizer, out)
                write_preview(net, previews, degrade, out / "previews" / f"{step:06d}.png")
            if due or stops:
                saved = step
            if stops:
                break
    for path in sorted(unreadable):
        say(f"skipped {path}: cannot be read")
    if unreadable:
        say(f"{len(unreadable)} of {len(crops.paths)} photos skipped")
    say(f"{'finished' if step >= recipe.iterations else 'stopped'} at iteration {step}: {out / MODEL}")


def shared(net: nn.Module, together: Processes, sync_bn: bool) -> nn.Module:
    """``net`` with its gradients averaged over the processes and, with ``sync_bn``, batch norms over their values.

    Running statistics are those of the first, which are the same in all where the norms are.
    """
    if together.count == 1:
        return net
    devices = [together.device] if together.device.type == "cuda" else None
    model = nn.parallel.DistributedDataParallel(net, devices)
    if sync_bn:  # now, for it would refuse such norms on a CPU; the parameters stay the same
        nn.SyncBatchNorm.convert_sync_batchnorm(net)
    return model


def initialise(net: nn.Module, path: str) -> None:
    """Gives ``net`` the weights of the trained network in ``path``.

    Raises:
        InputError: it cannot be read, or is another network.
    """
    trained = checkpoints.load(path)
    if type(trained) is not type(net) or trained.config != net.config:
        wanted, found = (f"{type(one).__name__} of {one.config}" for one in (net, trained))
        raise InputError(f"{path}: holds a {found}, which cannot start a {wanted}")
    net.load_state_dict(trained.state_dict())


def check_same_recipe(recipe: Recipe, checkpoint: Path) -> int:
    """The iteration ``checkpoint`` stands at, once its recipe is known to be this one."""
    saved = checkpoints.read_training(checkpoint)
    try:
        step = int(saved.pop("step"))
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()}
        before = type(recipe)(**values)
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{checkpoint}: not a checkpoint of such a training run") from None
    old, new = asdict(before), asdict(recipe)
    for name in old.keys() - FREE_TO_CHANGE:
        if old[name] != new[name]:
            raise InputError(
                f"{checkpoint}: was trained with {name} {old[name]}, not {new[name]}; give the same to resume"
            )
    return step


def save(recipe: Recipe, step: int, net: torch.nn.Module, optimizer: torch.optim.Optimizer, out: Path) -> None:
    """Writes the network alone, whose metadata names files but no folders, then the checkpoint to resume from.

    In this order a run killed between the two repeats the step; in the other, its last network could be missing.
    """
    training = asdict(recipe) | dict(step=step)
    names = {key: Path(training[key]).name for key in FILES if training.get(key)}
    checkpoints.save(net, out / MODEL, training=training | names)
    checkpoints.save(net, out / CHECKPOINT, training=training, optimizer=optimizer)


def write_preview(net: nn.Module, photos: Tensor, degrade: Callable[[Tensor], Tensor] | None, path: Path) -> None:
    """A contact sheet: what ``net`` sees, below it what it makes of that now, and the photos, if it sees others."""
    net.eval()
    with torch.inference_mode():
        inputs = photos if degrade is None else degrade(photos)
        rows = [F.interpolate(inputs, photos.shape[2:]), net(inputs), *([] if degrade is None else [photos])]
    net.train()
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(path) as temporary:
        contact_sheet(rows).save(temporary)


class StopRequest:
    """Whether somebody has asked the run to stop."""

    requested = False


@contextmanager
def stop_requests(patient: bool = False) -> Iterator[StopRequest]:
    """Turns SIGINT and SIGTERM into a flag while the block runs; a second one acts as usual, unless ``patient``: a
    launcher passes on what its processes have heard themselves."""
    stop = StopRequest()
    previous = {int(number): signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: FrameType | None) -> None:
        if not stop.requested:
            say("stopping after this step …")
        stop.requested = True
        if not patient:
            signal.signal(number, previous[number])

    for number in previous:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
