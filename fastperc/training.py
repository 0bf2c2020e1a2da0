"""Training by gradient descent on a folder of photos: the loop, its checkpoints, and how it stops and starts again.

What is trained, and towards what, is a recipe's own: ``fastperc.style_training`` and ``fastperc.sr_training``.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastperc import checkpoints, data
from fastperc.distributed import Processes, processes
from fastperc.errors import InputError
from fastperc.files import check_writable, write_atomically
from fastperc.images import contact_sheet
from fastperc.progress import Meter, say, silent
from fastperc.step import TrainStep, adam

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

CHECKPOINT = "checkpoint.safetensors"  # the network and the optimizer: what --resume reads
LOSSES = "losses.csv"  # a row for each iteration
MODEL = "model.safetensors"  # the network alone: what the other commands read
FILES = frozenset({"data", "vgg", "init", "style"})  # fields that name files
# What may differ between a run and its continuation without changing what is computed.
FREE_TO_CHANGE = FILES - {"style"} | {"iterations", "checkpoint_every", "workers", "tensorboard", "device", "cache"}
LOG_EVERY = 50  # iterations on a GPU between looks at the losses, for which it must have finished them


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
        crops = data.PhotoCrops(recipe.data, recipe.size, recipe.seed, recipe.resize, cache=recipe.cache == "auto")
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
        photo_batches = data.batches(
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


class Log:
    """What becomes of the terms of each step: they wait on the device, and are fetched and written now and then.

    They go to the meter on the screen, to ``losses.csv``, a row for each iteration, and to TensorBoard; each the mean
    over the processes. A context's end, by whatever cause, leaves whole rows.
    """

    def __init__(self, recipe: Recipe, out: Path, start: int, together: Processes) -> None:
        self.every = LOG_EVERY if together.device.type == "cuda" else 1
        self._out, self._together, self._written = out, together, start
        self._waiting: list[Tensor] = []  # [terms] each
        self._fields: tuple[str, ...] = ()
        self._path = out / LOSSES
        self._kept: list[str] | None = rows_until(self._path, start) if start else []
        self._board = open_tensorboard(out, start) if recipe.tensorboard and together.first else None
        self._meter = Meter("training", recipe.iterations, start).__enter__()

    def add(self, terms: Any) -> None:
        """Keeps the terms of the next step, a NamedTuple of scalars."""
        self._fields = terms._fields
        self._waiting.append(torch.stack(terms))

    def write(self, saved: int) -> None:
        """Fetches what waits, and writes it.

        Raises:
            FloatingPointError: a loss is not finite; ``saved`` is the iteration of the last checkpoint.
        """
        rows = self._together.mean(torch.stack(self._waiting)).tolist() if self._waiting else []
        self._waiting.clear()
        lines = []
        bad = next((i for i, (total, *_) in enumerate(rows) if not math.isfinite(total)), len(rows))
        for row in rows[:bad]:
            self._written += 1
            lines.append(",".join([str(self._written), *(f"{value:.9g}" for value in row)]))
            self._show(dict(zip(self._fields, row)))
        self._append(lines)
        if bad < len(rows):
            kept = f"iteration {saved} is kept in {self._out}" if saved else "none was saved yet"
            raise FloatingPointError(
                f"the loss is {rows[bad][0]} at iteration {self._written + 1}; {kept}; try a lower --lr"
            )

    def _show(self, values: dict[str, float]) -> None:
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(f"loss/{name}", value, self._written)
        total = values.pop("total")
        parts = " + ".join(f"{name} {value:.4g}" for name, value in values.items())
        self._meter.advance(f"loss {total:.4g}" + f" = {parts}" * bool(parts))

    def _append(self, lines: list[str]) -> None:
        if not lines or not self._together.first:
            return
        if self._kept is not None:  # the first time: without what a resumed run repeats
            header = ",".join(["iteration", *self._fields])
            lines = [header, *(self._kept[1:] if self._kept[:1] == [header] else []), *lines]
            self._kept = None
            with write_atomically(self._path) as temporary:
                temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
            return
        with self._path.open("ab", buffering=0) as file:
            file.write(("\n".join(lines) + "\n").encode())  # in one piece

    def close(self) -> None:
        """Nothing more will come."""
        self._meter.__exit__()
        if self._board is not None:
            self._board.close()


def rows_until(path: Path, step: int) -> list[str]:
    """The header and the whole rows of the losses in ``path`` up to iteration ``step``; nothing if there are none."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # behind the last line break stands nothing, or half
    except (OSError, ValueError):
        return []
    found = [line for line in lines[1:] if (first := line.partition(",")[0]).isdecimal() and int(first) <= step]
    return [*lines[:1], *found]


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


def open_tensorboard(out: Path, start: int) -> SummaryWriter:
    """A writer of scalars to ``out/tensorboard``, without those of steps that a resumed run repeats."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError("TensorBoard is not installed: pip install 'fastperc[tensorboard]'") from None
    return SummaryWriter(str(out / "tensorboard"), purge_step=start + 1)
