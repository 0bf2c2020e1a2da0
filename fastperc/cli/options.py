"""The command line's options: what their texts stand for, and those that several commands have.

Python alone before a command runs: `--help` is to be instant.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastperc.errors import InputError
from fastperc.presets import CONVENTIONS, MINIMUM_SIDE, PRESETS
from fastperc.weights import STYLES

if TYPE_CHECKING:
    import torch
    from torch import nn

    from fastperc.training.recipe import Recipe

DEFAULT_STYLE = "great_wave"


def path(text: str) -> Path:
    """A path; an empty one, of a shell variable never set, is not taken for the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("an empty name")
    return Path(text)


def natural(text: str) -> int:
    """A whole number from 0 up, as large as a machine's integer."""
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 2^63")
    return value


def positive(text: str) -> int:
    """A whole number from 1 up."""
    value = natural(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return value


def positive_float(text: str) -> float:
    """A finite number above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def weight(text: str) -> float:
    """A finite number from 0 up."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number from 0 up")
    return value


def tile(text: str) -> int | str:
    """``auto``, ``off``, or a number of pixels that a network can paint."""
    if text in ("auto", "off"):
        return text
    side = int(text)
    if side < MINIMUM_SIDE:
        raise argparse.ArgumentTypeError(f"{text} is none of auto, off and the numbers from {MINIMUM_SIDE} up")
    return side


def square(text: str) -> tuple[int, int, int]:
    """Left, top and side of a square in pixels, such as ``120,80,64``."""
    sides = text.split(",")
    if len(sides) != 3 or not all(side.isdecimal() for side in sides) or int(sides[2]) == 0:
        raise argparse.ArgumentTypeError(f"{text} is no square like 120,80,64: left, top and side in pixels")
    left, top, side = map(int, sides)
    return left, top, side


def fraction(text: str) -> float:
    """A number from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def names(text: str) -> tuple[str, ...]:
    """Names between commas, at least one."""
    found = tuple(name.strip() for name in text.split(",") if name.strip())
    if not found:
        raise argparse.ArgumentTypeError("no name given")
    return found


def sizes(text: str) -> list[tuple[int, int]]:
    """Widths and heights of sizes between commas, such as ``512,1920x1080``."""
    found = []
    for name in names(text):
        sides = name.lower().replace("×", "x").split("x")
        if len(sides) > 2 or not all(side.isdecimal() and int(side) >= MINIMUM_SIDE for side in sides):
            raise argparse.ArgumentTypeError(f"{name} is no size like 512 or 1920x1080, {MINIMUM_SIDE} pixels and more")
        found.append((int(sides[0]), int(sides[-1])))
    return found


def add_model(parser: argparse.ArgumentParser) -> None:
    """Options that name a style network."""
    model = parser.add_mutually_exclusive_group()
    model.add_argument(
        "--style", default=DEFAULT_STYLE, metavar="NAME", help=f"one of {', '.join(STYLES)}; default: %(default)s"
    )
    model.add_argument(
        "--model",
        type=path,
        metavar="FILE",
        help="a trained network: fastperc's .safetensors, or a state_dict of PyTorch's fast_neural_style example",
    )


def model_file(arguments: argparse.Namespace) -> Path:
    """The file of the network that :func:`add_model`'s options name."""
    if arguments.model is None and arguments.style not in STYLES:
        raise InputError(f"no style {arguments.style!r}; there are {', '.join(STYLES)} (or give a --model FILE)")
    return arguments.model or STYLES[arguments.style]


def load_style(source: Path, device: torch.device) -> nn.Module:
    """The style network in the file ``source``."""
    from fastperc import checkpoints
    from fastperc.models import TransformNet

    net = checkpoints.load(source, device)
    if not isinstance(net, TransformNet):
        raise InputError(f"{source}: holds a {type(net).__name__}, which is no style network")
    return net


def add_layers(parser: argparse._ActionsContainer) -> None:
    """Which of VGG-16's layers the objective compares."""
    parser.add_argument(
        "--style-layers",
        type=names,
        default="relu1_2,relu2_2,relu3_3,relu4_3",
        metavar="A,B,...",
        help="default: %(default)s",
    )
    parser.add_argument("--content-layer", default="relu2_2", metavar="L", help="default: %(default)s")


def add_device(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1, ...; default: a GPU if there is one")


def add_files(parser: argparse.ArgumentParser) -> None:
    """What pictures are made of, and where they go."""
    parser.add_argument("inputs", nargs="+", type=path, metavar="INPUT", help="a photo, several, or folders of them")
    parser.add_argument(
        "-o", "--out", type=path, help="a file for one photo, a folder for several; default: beside INPUT"
    )


def add_tile(parser: argparse.ArgumentParser, paints: str) -> None:
    """``--tile``, for a command that ``paints`` large pictures."""
    parser.add_argument(
        "--tile",
        type=tile,
        default="auto",
        metavar="auto|N|off",
        help=f"{paints} in parts of N pixels a side, which looks the same and takes less memory; default: auto, where "
        "the whole would take more than 2 GiB",
    )


def add_training(parser: argparse.ArgumentParser) -> None:
    """What a training run reads and where it writes."""
    parser.add_argument("--data", required=True, type=path, metavar="DIR", help="a folder of photos, flat or nested")
    parser.add_argument(
        "--out", required=True, type=path, metavar="DIR", help="where checkpoints, previews and the result go"
    )
    parser.add_argument(
        "--vgg",
        type=path,
        metavar="FILE",
        help="VGG-16 weights (.npz, .pth or .safetensors); default: fetch torchvision's",
    )


SEVERAL_GPUS = (  # of a training command's epilog
    "Several GPUs of one machine share every batch, of which --batch gives the whole size:\n"
    "  torchrun --nproc-per-node=2 -m fastperc {command} ... --batch 8 --sync-bn\n"
)


def add_init(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--init", type=path, metavar="FILE", help="a trained network of the same shape to start from")


def add_loop(parser: argparse.ArgumentParser, iterations: int, size: int) -> None:
    """How a training run goes on."""
    loop = parser.add_argument_group("the loop")
    loop.add_argument("--iterations", type=positive, default=iterations, metavar="N", help="default: %(default)s")
    loop.add_argument(
        "--size", type=positive, default=size, metavar="N", help="side of the training crops; default: %(default)s"
    )
    loop.add_argument(
        "--batch", type=positive, default=4, metavar="N", help="of all processes together; default: %(default)s"
    )
    loop.add_argument("--lr", type=positive_float, default=1e-3, metavar="X", help="Adam's step; default: %(default)s")
    loop.add_argument("--decay", action="store_true", help="lower the step to zero along a cosine; suits short runs")
    loop.add_argument("--seed", type=natural, default=0, metavar="N", help="default: %(default)s")
    loop.add_argument("--amp", action="store_true", help="autocast to bfloat16")
    loop.add_argument(
        "--cache",
        default="auto",
        choices=["auto", "off"],
        help="auto: decode the photos once, into a file in the cache folder that is as large as their pixels, if there "
        "is room; default: %(default)s",
    )
    loop.add_argument(
        "--workers",
        type=natural,
        default=1,
        metavar="N",
        help="processes that decode photos where there is no such file; default: %(default)s",
    )
    loop.add_argument(
        "--sync-bn",
        action="store_true",
        help="take batch norms' statistics over all processes, not over each one's share of a batch",
    )
    loop.add_argument(
        "--checkpoint-every", type=positive, default=1000, metavar="N", help="iterations; default: %(default)s"
    )
    loop.add_argument("--resume", action="store_true", help="continue the run in --out")
    loop.add_argument("--tensorboard", action="store_true", help="also log to DIR/tensorboard")
    add_device(loop)


def add_style_training(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """All that a style's training is told; returns the group of the network's options."""
    parser.add_argument("--style", required=True, type=path, metavar="IMG", help="the painting")
    add_training(parser)
    network = parser.add_argument_group("the network")
    network.add_argument("--preset", default="paper", choices=PRESETS, help="default: %(default)s")
    network.add_argument(
        "--width", type=positive, metavar="N", help="channels of the first convolution; default: the preset's"
    )
    network.add_argument("--norm", choices=["batch", "instance"], help="default: the preset's")
    network.add_argument("--padding", choices=["zero", "reflect", "reflect40"], help="default: the preset's")
    network.add_argument("--upsample", choices=["transposed", "nearest"], help="default: the preset's")
    loss = parser.add_argument_group("the objective")
    add_layers(loss)
    loss.add_argument(
        "--convention",
        default="relative",
        choices=CONVENTIONS,
        help="what the weights multiply; default: %(default)s",
    )
    loss.add_argument("--content-weight", type=weight, metavar="X", help="default: the convention's")
    loss.add_argument("--style-weight", type=weight, metavar="X", help="default: the convention's")
    loss.add_argument("--tv-weight", type=weight, metavar="X", help="default: the convention's")
    loss.add_argument(
        "--style-size",
        type=positive,
        metavar="N",
        help="the painting's shorter side in pixels: larger, broader strokes; default: --size",
    )
    add_loop(parser, iterations=40_000, size=256)
    return network


def recipe_fields(recipe: type[Recipe], given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a ``recipe`` that options of the same names spell; files by their full names."""
    from dataclasses import fields

    from fastperc.devices import find_device
    from fastperc.training.recipe import FILES

    spelt = {field.name: given[field.name] for field in fields(recipe) if field.name in given}
    files = {name: str(spelt[name].resolve()) for name in FILES if spelt.get(name)}
    return spelt | files | dict(device=str(find_device(given["device"])))
