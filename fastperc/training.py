"""Training by gradient descent on a folder of photos: the loop, its checkpoints, and how it stops and starts again.

What is trained, and towards what, is a recipe's own: ``fastperc.style_training`` and ``fastperc.sr_training``.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastperc import checkpoints, data
from fastperc.errors import InputError
from fastperc.files import check_writable, write_atomically
from fastperc.images import contact_sheet
from fastperc.progress import Meter, say

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

CHECKPOINT = "checkpoint.safetensors"  # the network and the optimizer: what --resume reads
MODEL = "model.safetensors"  # the network alone: what the other commands read
FILES = frozenset({"data", "vgg", "init", "style"})  # fields that name files
# What may differ between a run and its continuation without changing what is computed.
FREE_TO_CHANGE = FILES - {"style"} | {"iterations", "checkpoint_every", "workers", "tensorboard", "device"}


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
    tensorboard: bool = False
    device: str = "cpu"

    def task(self) -> Task:
        """The network, freshly initialised, and what it is to learn; on the CPU.

        Raises:
            InputError: something in the recipe cannot be used.
        """
        raise NotImplementedError


def train(recipe: Recipe, out: Path, resume: bool = False) -> None:
    """Trains the network of ``recipe`` and leaves the result, previews and checkpoints in ``out``.

    SIGINT and SIGTERM save and stop after the step under way. With ``resume`` the run goes on from its checkpoint,
    bit for bit on the CPU, or begins where there is none.

    Raises:
        InputError: something in the recipe cannot be used, or ``out`` holds a run and ``resume`` is false.
        FloatingPointError: the loss or a weight is no longer finite. The last checkpoint stays as it was.
    """
    checkpoint = check_writable(out / CHECKPOINT)
    if checkpoint.exists() and not resume:
        raise InputError(f"{out}: holds a run already; continue it with --resume, or name another folder")
    start = check_same_recipe(recipe, checkpoint) if checkpoint.exists() else 0

    torch.manual_seed(recipe.seed)
    device = torch.device(recipe.device)
    title, net, loss, degrade = recipe.task()
    if recipe.init is not None and not start:
        initialise(net, recipe.init)
    net.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    loss = loss.to(device) if isinstance(loss, nn.Module) else loss
    optimizer = torch.optim.Adam(net.parameters(), lr=recipe.lr)
    if start:
        checkpoints.load_training(checkpoint, net, optimizer)
    crops = data.PhotoCrops(recipe.data, recipe.size, recipe.seed, recipe.resize)
    previews = torch.stack([crops[i][0] for i in range(min(4, len(crops.paths)))]).to(device) / 255
    board = open_tensorboard(out, start) if recipe.tensorboard else None
    say(f"{len(crops.paths)} photos · {title} · {device}" + f" · from iteration {start}" * bool(start))

    unreadable: set[str] = set()
    step = saved = start
    with stop_requests() as stop, Meter("training", recipe.iterations, start) as meter:
        for photos, skipped in data.batches(crops, recipe.batch, start, recipe.iterations, recipe.workers):
            step += 1
            unreadable |= skipped
            photos = photos.to(device, non_blocking=True, memory_format=torch.channels_last).float() / 255
            optimizer.param_groups[0]["lr"] = learning_rate(recipe, step)
            terms = train_step(net, loss, optimizer, photos, photos if degrade is None else degrade(photos), recipe.amp)
            values = dict(zip(terms._fields, torch.stack(terms).tolist()))
            total = values.pop("total")
            if not math.isfinite(total):
                kept = f"iteration {saved} is kept in {out}" if saved else "none was saved yet"
                raise FloatingPointError(f"the loss is {total} at iteration {step}; {kept}; try a lower --lr")
            parts = " + ".join(f"{name} {value:.4g}" for name, value in values.items())
            meter.advance(f"loss {total:.4g}" + f" = {parts}" * bool(parts))
            if board is not None:
                for name, value in terms._asdict().items():
                    board.add_scalar(f"loss/{name}", value, step)
            if stop.requested or step % recipe.checkpoint_every == 0 or step == recipe.iterations:
                save(recipe, step, net, optimizer, out)
                write_preview(net, previews, degrade, out / "previews" / f"{step:06d}.png")
                saved = step
            if stop.requested:
                break
    if board is not None:
        board.close()
    for path in sorted(unreadable):
        say(f"skipped {path}: cannot be read")
    if unreadable:
        say(f"{len(unreadable)} of {len(crops.paths)} photos skipped")
    say(f"{'finished' if step >= recipe.iterations else 'stopped'} at iteration {step}: {out / MODEL}")


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


def learning_rate(recipe: Recipe, step: int) -> float:
    """Adam's step size at iteration ``step``, counted from 1."""
    return recipe.lr * (1 + math.cos(math.pi * (step - 1) / recipe.iterations)) / 2 if recipe.decay else recipe.lr


def train_step(
    net: nn.Module,
    loss: Callable[[Tensor, Tensor], Any],
    optimizer: torch.optim.Optimizer,
    photos: Tensor,
    inputs: Tensor,
    amp: bool,
) -> Any:
    """One iteration on ``photos``, RGB in 0–1 [N, 3, H, W], of which the network sees ``inputs``; returns the terms of
    the loss before the update."""
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(photos.device.type, torch.bfloat16, enabled=amp):
        terms = loss(net(inputs), photos)
    terms.total.backward()
    optimizer.step()
    return type(terms)(*(term.detach() for term in terms))


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
def stop_requests() -> Iterator[StopRequest]:
    """Turns SIGINT and SIGTERM into a flag while the block runs; a second one acts as usual."""
    stop = StopRequest()
    previous = {int(number): signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: FrameType | None) -> None:
        stop.requested = True
        say("stopping after this step …")
        signal.signal(number, previous[number])

    for number in previous:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def open_tensorboard(out: Path, start: int) -> SummaryWriter:
    """A writer of scalars to ``out/tensorboard``, without those of steps that a resumed run repeats."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError("TensorBoard is not installed: pip install 'fastperc[tensorboard]'") from None
    return SummaryWriter(str(out / "tensorboard"), purge_step=start + 1)
