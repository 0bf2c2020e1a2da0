"""The options of the commands that train.

Imports neither torch nor anything else that is slow before a command runs, because ``--help`` must be instant.
"""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fastperc.cli.options import (
    add_device,
    add_layers,
    add_vgg,
    natural,
    path,
    positive,
    positive_float,
    side_range,
    weight,
)
from fastperc.errors import InputError
from fastperc.presets import CONVENTIONS, PRESETS

if TYPE_CHECKING:
    from fastperc.training.recipe import Recipe

# Parts of the commands' epilogs.
STOPPING = "Ctrl-C, SIGTERM or a closed terminal saves the run and stops it, with exit status 0."
RESULTS = (
    "Results: DIR/model.safetensors is the network, DIR/previews shows its progress, DIR/losses.csv has the loss of\n"
    "every iteration."
)
SEVERAL_GPUS = (
    "Several GPUs of one machine share each batch; --batch is the size of the whole batch:\n"
    "  torchrun --nproc-per-node=2 -m fastperc {command} ... --batch 8 --sync-bn\n"
)


def add_training(parser: argparse.ArgumentParser) -> None:
    """Adds the files and folders of a training run."""
    parser.add_argument(
        "--data",
        required=True,
        type=path,
        metavar="DIR",
        help="a folder of photos; its subfolders are searched too; needed to begin a run",
    )
    parser.add_argument(
        "--out", required=True, type=path, metavar="DIR", help="the folder for checkpoints, previews and the network"
    )
    add_vgg(parser)


def add_init(parser: argparse.ArgumentParser) -> None:
    """Adds ``--init``."""
    parser.add_argument("--init", type=path, metavar="FILE", help="a trained network of the same shape to start from")


def add_loop(parser: argparse.ArgumentParser, iterations: int, size: int) -> None:
    """Adds the options of the training loop; ``iterations`` and ``size`` are defaults."""
    loop = parser.add_argument_group("the loop")
    loop.add_argument(
        "--iterations", type=positive, default=iterations, metavar="N", help="training steps; default: %(default)s"
    )
    loop.add_argument(
        "--size",
        type=positive,
        default=size,
        metavar="N",
        help="side of the training crops in pixels; default: %(default)s",
    )
    loop.add_argument(
        "--batch",
        type=positive,
        default=4,
        metavar="N",
        help="photos in a batch, over all processes together; default: %(default)s",
    )
    loop.add_argument(
        "--lr", type=positive_float, default=1e-3, metavar="X", help="Adam's learning rate; default: %(default)s"
    )
    loop.add_argument(
        "--decay", action="store_true", help="lower the learning rate to zero along a cosine; suits short runs"
    )
    loop.add_argument(
        "--average",
        action="store_true",
        help="leave the mean of the weights over the last tenth of the iterations; steadier than the last weights",
    )
    loop.add_argument(
        "--seed", type=natural, default=0, metavar="N", help="seed of the random numbers; default: %(default)s"
    )
    loop.add_argument("--amp", action="store_true", help="mixed precision: autocast to bfloat16")
    add_execution(loop)


def add_execution(loop: argparse._ActionsContainer) -> None:
    """Adds the options that say how the loop runs: cache, processes, checkpoints, device."""
    loop.add_argument(
        "--cache",
        default="auto",
        choices=["auto", "off"],
        help="auto: decode the photos once, into a file in the cache folder that is as large as their pixels, if there "
        "is room; off: decode them in every run; default: %(default)s",
    )
    loop.add_argument(
        "--workers",
        type=natural,
        default=1,
        metavar="N",
        help="processes that decode photos if there is no such file; default: %(default)s",
    )
    loop.add_argument(
        "--sync-bn",
        action="store_true",
        help="compute batch norm statistics over all processes, not over each one's share of a batch",
    )
    loop.add_argument(
        "--checkpoint-every",
        type=positive,
        default=1000,
        metavar="N",
        help="iterations between checkpoints; default: %(default)s",
    )
    loop.add_argument(
        "--resume",
        action="store_true",
        help="continue the run in --out; other options are read from it, and those that are given must agree with it",
    )
    loop.add_argument("--tensorboard", action="store_true", help="also log to DIR/tensorboard")
    add_device(loop)


def add_style_training(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Adds the options for training a style network; returns the group with the options of the network."""
    parser.add_argument("--style", required=True, type=path, metavar="IMG", help="the painting; needed to begin a run")
    add_training(parser)
    network = parser.add_argument_group("the network")
    network.add_argument(
        "--preset",
        default="paper",
        choices=PRESETS,
        help="the published network that sets the defaults of the following options; default: %(default)s",
    )
    network.add_argument(
        "--width", type=positive, metavar="N", help="channels of the first convolution; default: the preset's"
    )
    network.add_argument("--norm", choices=["batch", "instance"], help="normalisation; default: the preset's")
    network.add_argument(
        "--padding",
        choices=["zero", "reflect", "reflect40"],
        help="padding of the convolutions: zeros, reflection, or 40 reflected pixels around the image; default: the "
        "preset's",
    )
    network.add_argument(
        "--upsample",
        choices=["transposed", "nearest"],
        help="transposed convolutions, or convolutions after nearest-neighbour resizing; default: the preset's",
    )
    loss = parser.add_argument_group("the objective")
    add_layers(loss)
    loss.add_argument(
        "--convention",
        default="relative",
        choices=CONVENTIONS,
        help="what the weights multiply: the paper's sums, its authors' means, or losses relative to the size of "
        "their targets; default: %(default)s",
    )
    for option, loss_name in (("content", "content loss"), ("style", "style loss"), ("tv", "total variation")):
        loss.add_argument(
            f"--{option}-weight",
            type=weight,
            metavar="X",
            help=f"weight of the {loss_name}; default: the convention's",
        )
    loss.add_argument(
        "--style-size",
        type=positive,
        metavar="N",
        help="the painting's shorter side in pixels; larger gives broader strokes; default: --size",
    )
    add_robustness(parser)
    add_loop(parser, iterations=40_000, size=256)
    return network


def add_robustness(parser: argparse.ArgumentParser) -> None:
    """Adds the options that change at random what a style network sees."""
    inputs = parser.add_argument_group("what the network sees")
    inputs.add_argument(
        "--resize",
        type=side_range,
        default=True,
        metavar="A-B",
        help="cut each crop from its photo at another size, with A to B pixels on the shorter side; default: --size",
    )
    inputs.add_argument(
        "--noise",
        type=weight,
        default=0.0,
        metavar="X",
        help="standard deviation, for colours from 0 to 1, of noise on the photos that the network sees; the content "
        "loss sees none; default: %(default)s",
    )
    inputs.add_argument(
        "--stability",
        type=weight,
        default=0.0,
        metavar="X",
        help="weight of the difference between the pictures of a photo and of a copy with noise, shifted by up to 4 "
        "pixels; takes nearly twice the time in the network; default: %(default)s",
    )


def separate_defaults(parser: argparse.ArgumentParser) -> None:
    """Makes ``parser`` store only options that are given, and all defaults as the mapping ``defaults``.

    Call it after all options are added. A resumed run takes what is not given from its checkpoint. Required options
    other than ``--out`` become optional; :func:`recipe_of` asks for them where a run begins.
    """
    defaults, required = {}, []
    for action in parser._actions:
        if action.dest in ("help", "out", "resume"):
            continue
        convert = action.type if isinstance(action.default, str) and callable(action.type) else None
        defaults[action.dest] = convert(action.default) if convert else action.default
        if action.help:
            action.help = (action.help % (vars(action) | {"prog": parser.prog})).replace("%", "%%")
        if action.required:
            required.append(action.option_strings[-1])
        action.default, action.required = argparse.SUPPRESS, False
    parser.set_defaults(defaults=defaults, required=required)


Kind = TypeVar("Kind", bound="Recipe")
# Options by name → fields of a recipe that have no option of their own. The recipe is that of a run to go on with.
OtherFields = Callable[[Mapping[str, Any], "Kind | None"], Mapping[str, Any]]


def recipe_of(
    kind: type[Kind],
    arguments: argparse.Namespace,
    run: Path | None = None,
    other_fields: OtherFields[Kind] | None = None,
) -> Kind:
    """The recipe that the options describe. What is not given is as in the run to go on with, or else the default.

    Args:
        kind: the class of the recipe.
        arguments: of a parser to which :func:`separate_defaults` was applied.
        run: the folder of the run to go on with, if it has a checkpoint and ``--resume`` is given.
        other_fields: fields made of several options.

    Raises:
        InputError: no such device, a required option is missing, or the checkpoint cannot be read.
    """
    from dataclasses import replace

    from fastperc.training.resume import read_run
    from fastperc.training.run_folder import CHECKPOINT

    given = {name: value for name, value in vars(arguments).items() if name in arguments.defaults}
    vars(arguments).update(arguments.defaults | given)  # for messages that name options of the command
    if run is not None and arguments.resume and (run / CHECKPOINT).exists():
        saved: Any = read_run(kind, run / CHECKPOINT).recipe
        others = other_fields(given, saved) if other_fields else {}
        return replace(saved, **recipe_fields(kind, {"device": saved.device} | given), **others)
    missing = [option for option in arguments.required if option.removeprefix("--") not in given]
    if missing:
        reason = ""
        if arguments.resume:
            reason = f"{arguments.out}: holds no run to resume; "
        elif run is not None and (run / CHECKPOINT).exists():
            reason = f"{arguments.out}: holds a run, which --resume continues; to begin another, "
        raise InputError(f"{reason}the following arguments are required: {', '.join(missing)}")
    options = arguments.defaults | given
    return kind(**recipe_fields(kind, options), **(other_fields(options, None) if other_fields else {}))


def resume_command(command: str, out: Path) -> str:
    """The command line that resumes the run of ``fastperc COMMAND`` in ``out``."""
    processes = os.environ.get("WORLD_SIZE", "1")
    program = "fastperc" if processes == "1" else f"torchrun --nproc-per-node={processes} -m fastperc"
    return f"{program} {command} --resume --out {shlex.quote(str(out))}"


def recipe_fields(recipe: type[Recipe], given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of ``recipe`` that have an option of the same name, with absolute paths for files.

    Args:
        recipe: the class of the recipe.
        given: the options' values by name.

    Raises:
        InputError: no such device.
    """
    from dataclasses import fields

    from fastperc.devices import find_device
    from fastperc.training.recipe import FILES

    values = {field.name: given[field.name] for field in fields(recipe) if field.name in given}
    files = {name: os.path.realpath(values[name]) for name in FILES if values.get(name)}
    return values | files | dict(device=str(find_device(given["device"])))
