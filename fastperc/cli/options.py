"""What several commands share: converters from an option's text to its value, and groups of options.

Imports neither torch nor anything else that is slow before a command runs, because ``--help`` must be instant.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from fastperc.errors import InputError
from fastperc.hub import SCHEME, Address
from fastperc.presets import LARGEST_STROKE, MINIMUM_SIDE, SMALLEST_STROKE, STROKE_SIDE

# Parts of the commands' epilogs.
EXIT_STATUS = "Exit status: 0 success, 1 failure while running, 2 bad input, 130 Ctrl-C."
SEVERAL_INPUTS = "With several photos, unusable ones are named and skipped, and the exit status is 2."


def suggest(action: argparse.Action, values: Iterable[str]) -> None:
    """Has ``fastperc completion`` complete the value of an option or argument with ``values``; others stay allowed."""
    vars(action)["suggestions"] = tuple(values)


def path(text: str) -> Path:
    """A path. An empty one is refused: it comes from an unset shell variable, and would mean the current folder.

    Raises:
        argparse.ArgumentTypeError: the text is empty. The other converters raise it for text that they cannot use.
    """
    if not text:
        raise argparse.ArgumentTypeError("the name is empty")
    return Path(text)


def network_file(text: str) -> Path | Address:
    """A path, or the address of a file on the Hugging Face Hub, which begins with ``hf://``."""
    if not text.startswith(SCHEME):
        return path(text)
    try:
        return Address.parse(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def output(text: str) -> str:
    """The name of an output: as :func:`path`, but a slash at the end stays, which says that it is a folder."""
    path(text)
    return text


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


def stroke(text: str) -> float | str:
    """``auto``, or how many times as large strokes are."""
    if text == "auto":
        return text
    value = _number(text)
    if not SMALLEST_STROKE <= value <= LARGEST_STROKE:
        raise argparse.ArgumentTypeError(
            f"{text} is not auto or a number from {SMALLEST_STROKE:g} to {LARGEST_STROKE:g}"
        )
    return value


def square(text: str) -> tuple[int, int, int]:
    """Left, top and side of a square in pixels, such as ``120,80,64``."""
    numbers = text.split(",")
    if len(numbers) != 3 or not all(number.isdecimal() for number in numbers) or int(numbers[2]) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not a square like 120,80,64: left, top and side in pixels")
    left, top, side = map(int, numbers)
    return left, top, side


def side_range(text: str) -> tuple[int, int]:
    """The lowest and the highest number of pixels, such as ``256-512``; ``256`` alone stands for both."""
    sides = text.split("-")
    if len(sides) > 2 or not all(side.isdecimal() for side in sides) or not 0 < int(sides[0]) <= int(sides[-1]):
        raise argparse.ArgumentTypeError(f"{text} is not a range of pixels like 256-512")
    return int(sides[0]), int(sides[-1])


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
    parser.add_argument(
        "--device", metavar="D", help="cpu, cuda, cuda:1, mps, ...; default: cuda if there is one, else cpu"
    )


def add_files(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """Adds the input photos and ``--out``. ``required`` says whether the parser refuses a command without inputs."""
    parser.add_argument(
        "inputs",
        nargs="+" if required else "*",
        type=path,
        metavar="INPUT",
        help="photos and clips, or folders of them; earlier results of other INPUTs are skipped",
    )
    parser.add_argument(
        "-o",
        "--out",
        type=output,
        help="a file for one input, a folder for several; a name that ends in / is a folder; default: beside INPUT",
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


def add_stroke(parser: argparse.ArgumentParser) -> None:
    """Adds ``--stroke``."""
    parser.add_argument(
        "--stroke",
        type=stroke,
        default="auto",
        metavar="auto|S",
        help="strokes S times as large: paint a picture of 1/S of the size and bring the painting back to the full "
        "size; below 1: finer strokes; auto: 1 up to a longer side of "
        f"{STROKE_SIDE:,} pixels, the longer side / {STROKE_SIDE:,} above; default: %(default)s",
    )


def add_match(parser: argparse.ArgumentParser) -> None:
    """Adds ``--no-match``, stored as ``match``."""
    parser.add_argument(
        "--no-match",
        dest="match",
        action="store_false",
        help="keep the network's colours; by default the picture gets the colour histogram of the small photo, or only "
        "its mean colour where the histogram would make the picture worse",
    )


def add_vgg(parser: argparse.ArgumentParser) -> None:
    """Adds ``--vgg`` and ``--vgg-preprocessing``."""
    parser.add_argument(
        "--vgg",
        type=path,
        metavar="FILE",
        help="VGG-16 weights (.npz, .pth or .safetensors); default: torchvision's, downloaded once",
    )
    parser.add_argument(
        "--vgg-preprocessing",
        choices=["caffe", "caffe-rgb", "torchvision"],
        help="how those weights expect the image: caffe, BGR from 0 to 255 minus the mean; caffe-rgb, the same in RGB; "
        "torchvision, RGB over its deviation; default: by the weights",
    )
