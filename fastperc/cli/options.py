"""What several commands share: converters from an option's text to its value, and groups of options.

Imports neither torch nor anything else that is slow before a command runs, because ``--help`` must be instant.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastperc.presets import CONVENTIONS, MINIMUM_SIDE, PRESETS

if TYPE_CHECKING:
    from fastperc.training.recipe import Recipe

# Parts of the commands' epilogs.
EXIT_STATUS = "Exit status: 0 success, 1 failure while running, 2 bad input, 130 Ctrl-C."
SEVERAL_INPUTS = "With several photos, unusable ones are named and skipped, and the exit status is 2."
STOPPING = "Ctrl-C saves the run and stops it, with exit status 0."
RESULTS = (
    "Results: DIR/model.safetensors is the network, DIR/previews shows its progress, DIR/losses.csv has the loss of\n"
    "every iteration."
)
SEVERAL_GPUS = (
    "Several GPUs of one machine share each batch; --batch is the size of the whole batch:\n"
    "  torchrun --nproc-per-node=2 -m fastperc {command} ... --batch 8 --sync-bn\n"
)


def path(text: str) -> Path:
    """A path. An empty one is refused: it comes from an unset shell variable, and would mean the current folder.

    Raises:
        argparse.ArgumentTypeError: the text is empty. The other converters raise it for text that they cannot use.
    """
    if not text:
        raise argparse.ArgumentTypeError("the name is empty")
    return Path(text)


def natural(text: str) -> int:
    """A whole number from 0 up that fits in 64 bits."""
    value = _integer(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 2^63")
    return value


def positive(text: str) -> int:
    """A whole number from 1 up that fits in 64 bits."""
    value = natural(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return value


def positive_float(text: str) -> float:
    """A finite number above 0."""
    value = _number(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number above 0")
    return value


def weight(text: str) -> float:
    """A finite number from 0 up."""
    value = _number(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number from 0 up")
    return value


def fraction(text: str) -> float:
    """A number from 0 to 1."""
    value = _number(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def tile(text: str) -> int | str:
    """``auto``, ``off``, or the side of a tile in pixels, at least what a network accepts."""
    if text in ("auto", "off"):
        return text
    with suppress(ValueError):
        if int(text) >= MINIMUM_SIDE:
            return int(text)
    raise argparse.ArgumentTypeError(f"{text} is not auto, off or a number from {MINIMUM_SIDE} up")


def square(text: str) -> tuple[int, int, int]:
    """Left, top and side of a square in pixels, such as ``120,80,64``."""
    numbers = text.split(",")
    if len(numbers) != 3 or not all(number.isdecimal() for number in numbers) or int(numbers[2]) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not a square like 120,80,64: left, top and side in pixels")
    left, top, side = map(int, numbers)
    return left, top, side


def names(text: str) -> tuple[str, ...]:
    """At least one name; commas separate them."""
    values = tuple(name.strip() for name in text.split(",") if name.strip())
    if not values:
        raise argparse.ArgumentTypeError("no name given")
    return values


def sizes(text: str) -> list[tuple[int, int]]:
    """Widths and heights in pixels, such as ``512,1920x1080``."""
    values = []
    for name in names(text):
        sides = name.lower().replace("×", "x").split("x")
        if len(sides) > 2 or not all(side.isdecimal() and int(side) >= MINIMUM_SIDE for side in sides):
            raise argparse.ArgumentTypeError(
                f"{name} is not a size like 512 or 1920x1080, with {MINIMUM_SIDE} pixels or more a side"
            )
        values.append((int(sides[0]), int(sides[-1])))
    return values


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


def add_layers(parser: argparse._ActionsContainer) -> None:
    """Adds the options that choose the VGG-16 layers of the losses."""
    parser.add_argument(
        "--style-layers",
        type=names,
        default="relu1_2,relu2_2,relu3_3,relu4_3",
        metavar="A,B,...",
        help="VGG-16 layers of the style loss; default: %(default)s",
    )
    parser.add_argument(
        "--content-layer", default="relu2_2", metavar="L", help="VGG-16 layer of the content loss; default: %(default)s"
    )


def add_device(parser: argparse._ActionsContainer) -> None:
    """Adds ``--device``."""
    parser.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1, ...; default: a GPU if there is one")


def add_files(parser: argparse.ArgumentParser) -> None:
    """Adds the input photos and ``--out``."""
    parser.add_argument("inputs", nargs="+", type=path, metavar="INPUT", help="photos, or folders of photos")
    parser.add_argument(
        "-o", "--out", type=path, help="a file for one photo, a folder for several; default: beside INPUT"
    )


def add_tile(parser: argparse.ArgumentParser, verb: str) -> None:
    """Adds ``--tile``. ``verb`` is what the command does with a photo."""
    parser.add_argument(
        "--tile",
        type=tile,
        default="auto",
        metavar="auto|N|off",
        help=f"{verb} in tiles of N pixels a side: the same picture, in less memory; off: never tile; "
        "auto: tile if the whole would take too much memory, on a CPU 2 GiB; default: %(default)s",
    )


def add_match(parser: argparse.ArgumentParser) -> None:
    """Adds ``--no-match``, stored as ``match``."""
    parser.add_argument(
        "--no-match",
        dest="match",
        action="store_false",
        help="keep the network's colours; by default the picture gets the colour histogram of the small photo",
    )


def add_vgg(parser: argparse.ArgumentParser) -> None:
    """Adds ``--vgg``."""
    parser.add_argument(
        "--vgg",
        type=path,
        metavar="FILE",
        help="VGG-16 weights (.npz, .pth or .safetensors); default: torchvision's, downloaded once",
    )


def add_training(parser: argparse.ArgumentParser) -> None:
    """Adds the files and folders of a training run."""
    parser.add_argument(
        "--data", required=True, type=path, metavar="DIR", help="a folder of photos; its subfolders are searched too"
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
        "--seed", type=natural, default=0, metavar="N", help="seed of the random numbers; default: %(default)s"
    )
    loop.add_argument("--amp", action="store_true", help="mixed precision: autocast to bfloat16")
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
    loop.add_argument("--resume", action="store_true", help="continue the run in --out")
    loop.add_argument("--tensorboard", action="store_true", help="also log to DIR/tensorboard")
    add_device(loop)


def add_style_training(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Adds the options for training a style network; returns the group with the options of the network."""
    parser.add_argument("--style", required=True, type=path, metavar="IMG", help="the painting")
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
    add_loop(parser, iterations=40_000, size=256)
    return network


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
    files = {name: str(values[name].resolve()) for name in FILES if values.get(name)}
    return values | files | dict(device=str(find_device(given["device"])))
