"""Training a style (paper, section 4.1): the loop, its checkpoints, and how it stops and starts again."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastperc import checkpoints, data
from fastperc.errors import InputError
from fastperc.files import PathLike, check_writable, write_atomically
from fastperc.images import contact_sheet, read_image
from fastperc.losses import PerceptualLoss, PerceptualTerms
from fastperc.models import TransformNet, VGG16Features
from fastperc.models.common import MINIMUM_SIDE
from fastperc.progress import Meter, say

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

CHECKPOINT = "checkpoint.safetensors"  # the network and the optimizer: what --resume reads
MODEL = "model.safetensors"  # the network alone: what stylize reads
# What may differ between a run and its continuation without changing what is computed.
FREE_TO_CHANGE = frozenset({"iterations", "checkpoint_every", "workers", "tensorboard", "device", "vgg", "data"})


@dataclass(frozen=True)
class Recipe:
    """All that decides a training run. The defaults are the paper's where it gives a number."""

    style: str
    data: str
    vgg: str | None = None
    network: dict[str, Any] = field(default_factory=lambda: {"preset": "paper"})  # arguments of TransformNet
    style_layers: tuple[str, ...] = ("relu1_2", "relu2_2", "relu3_3", "relu4_3")
    content_layer: str = "relu2_2"
    convention: str = "relative"
    content_weight: float | None = None  # None: the convention's own
    style_weight: float | None = None
    tv_weight: float | None = None
    iterations: int = 40_000
    size: int = 256
    style_size: int | None = None  # the painting's shorter side in pixels; None: as `size`
    batch: int = 4
    lr: float = 1e-3
    decay: bool = False  # lower lr along half a cosine to zero at `iterations`; the paper keeps it constant
    seed: int = 0
    amp: bool = False
    checkpoint_every: int = 1000
    workers: int = 1
    tensorboard: bool = False
    device: str = "cpu"


def train_style(recipe: Recipe, out: Path, resume: bool = False) -> None:
    """Trains a :class:`TransformNet` by ``recipe`` and leaves the result, previews and checkpoints in ``out``.

    SIGINT and SIGTERM save and stop after the step under way. With ``resume`` the run goes on from its checkpoint,
    bit for bit on the CPU, or begins where there is none.

    Raises:
        InputError: something in the recipe cannot be used, or ``out`` holds a run and ``resume`` is false.
        FloatingPointError: the loss or a weight is no longer finite. The last checkpoint stays as it was.
    """
    if recipe.size < MINIMUM_SIDE:
        raise InputError(f"training crops need a side of at least {MINIMUM_SIDE} pixels, not {recipe.size}")
    checkpoint = check_writable(out / CHECKPOINT)
    if checkpoint.exists() and not resume:
        raise InputError(f"{out}: holds a run already; continue it with --resume, or name another folder")
    start = check_same_recipe(recipe, checkpoint) if checkpoint.exists() else 0

    torch.manual_seed(recipe.seed)
    device = torch.device(recipe.device)
    net = TransformNet(**recipe.network).to(device)
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.Adam(net.parameters(), lr=recipe.lr)
    if start:
        checkpoints.load_training(checkpoint, net, optimizer)
    crops = data.PhotoCrops(recipe.data, recipe.size, recipe.seed)
    previews = torch.stack([crops[i][0] for i in range(min(4, len(crops.paths)))]).to(device) / 255
    loss = build_loss(
        recipe.style,
        recipe.style_size or recipe.size,
        recipe.vgg,
        recipe.style_layers,
        recipe.content_layer,
        recipe.convention,
        content_weight=recipe.content_weight,
        style_weight=recipe.style_weight,
        tv_weight=recipe.tv_weight,
    ).to(device)
    board = open_tensorboard(out, start) if recipe.tensorboard else None
    say(
        f"{len(crops.paths)} photos · {Path(recipe.style).name} · {recipe.network['preset']} network · {device}"
        + f" · from iteration {start}" * bool(start)
    )

    unreadable: set[str] = set()
    step = saved = start
    with stop_requests() as stop, Meter("training", recipe.iterations, start) as meter:
        for photos, skipped in data.batches(crops, recipe.batch, start, recipe.iterations, recipe.workers):
            step += 1
            unreadable |= skipped
            photos = photos.to(device, non_blocking=True, memory_format=torch.channels_last).float() / 255
            optimizer.param_groups[0]["lr"] = learning_rate(recipe, step)
            terms = train_step(net, loss, optimizer, photos, recipe.amp)
            total, content, style, tv = torch.stack(terms).tolist()
            if not math.isfinite(total):
                kept = f"iteration {saved} is kept in {out}" if saved else "none was saved yet"
                raise FloatingPointError(f"the loss is {total} at iteration {step}; {kept}; try a lower --lr")
            meter.advance(f"loss {total:.4g} = content {content:.4g} + style {style:.4g} + tv {tv:.3g}")
            if board is not None:
                for name, value in terms._asdict().items():
                    board.add_scalar(f"loss/{name}", value, step)
            if stop.requested or step % recipe.checkpoint_every == 0 or step == recipe.iterations:
                save(recipe, step, net, optimizer, out)
                write_preview(net, previews, out / "previews" / f"{step:06d}.png")
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


def learning_rate(recipe: Recipe, step: int) -> float:
    """Adam's step size at iteration ``step``, counted from 1."""
    return recipe.lr * (1 + math.cos(math.pi * (step - 1) / recipe.iterations)) / 2 if recipe.decay else recipe.lr


def train_step(
    net: torch.nn.Module, loss: PerceptualLoss, optimizer: torch.optim.Optimizer, photos: Tensor, amp: bool
) -> PerceptualTerms:
    """One iteration on ``photos``, RGB in 0–1 [N, 3, H, W]; returns the terms before the update."""
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(photos.device.type, torch.bfloat16, enabled=amp):
        terms = loss(net(photos), photos)
    terms.total.backward()
    optimizer.step()
    return PerceptualTerms(*(term.detach() for term in terms))


def build_loss(
    style: PathLike,
    style_size: int,
    vgg: PathLike | None,
    style_layers: Sequence[str],
    content_layer: str,
    convention: str = "relative",
    **weights: float | None,
) -> PerceptualLoss:
    """The objective that paints like the image file ``style``, resized to ``style_size`` on its shorter side.

    Raises:
        InputError: a file that cannot be read, weights that do not reach a layer, an unknown layer.
    """
    painting = read_style(style, style_size)
    try:
        features = VGG16Features(vgg, dict.fromkeys((*style_layers, content_layer)))
        return PerceptualLoss(
            features, painting, content_layer=content_layer, style_layers=style_layers, convention=convention, **weights
        )
    except InputError:
        raise
    except ValueError as error:  # a layer's name
        raise InputError(str(error)) from None


def read_style(path: PathLike, short_side: int) -> Tensor:
    """A painting, RGB in 0–1 [1, 3, H, W], its shorter side ``short_side`` pixels long.

    Raises:
        InputError: it cannot be read, or would be too small or too large.
    """
    if short_side < MINIMUM_SIDE:
        raise InputError(f"the painting's shorter side must have at least {MINIMUM_SIDE} pixels, not {short_side}")
    photo = read_image(path)
    width, height = photo.rgb.size
    try:
        return photo.resized(round(short_side * max(width, height) / min(width, height))).tensor()
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def check_same_recipe(recipe: Recipe, checkpoint: Path) -> int:
    """The iteration ``checkpoint`` stands at, once its recipe is known to be this one."""
    saved = checkpoints.read_training(checkpoint)
    try:
        step = int(saved.pop("step"))
        before = Recipe(**saved | dict(style_layers=tuple(saved["style_layers"])))
    except (KeyError, TypeError):
        raise InputError(f"{checkpoint}: not a checkpoint of a training run") from None
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
    names = {key: Path(training[key]).name for key in ("style", "data", "vgg") if training[key]}
    checkpoints.save(net, out / MODEL, training=training | names)
    checkpoints.save(net, out / CHECKPOINT, training=training, optimizer=optimizer)


def write_preview(net: torch.nn.Module, photos: Tensor, path: Path) -> None:
    """A contact sheet: the photos, and below them what ``net`` makes of them now."""
    net.eval()
    with torch.inference_mode():
        sheet = contact_sheet([photos, net(photos)])
    net.train()
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(path) as temporary:
        sheet.save(temporary)


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
