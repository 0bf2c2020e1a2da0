"""``fastperc bench``."""

from __future__ import annotations

import argparse
from typing import Any

from fastperc.cli.networks import add_style_network, shipped, style_file
from fastperc.cli.options import add_device, names, sizes

DTYPES = "float32", "bfloat16", "float16"


def add(commands: argparse._SubParsersAction[Any]) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "bench",
        help="measure how fast this machine paints",
        description="Measures how fast networks paint on this machine: in stock PyTorch, eager and channels_last, and "
        "as fastperc runs them. Prints the median and the spread (from the first quartile to the third) of each.",
    )
    network = add_style_network(parser)
    network.add_argument(
        "--networks",
        type=names,
        metavar="A,B,...",
        help="several networks that ship, styles or super-resolution, such as great_wave,x4_pixel; all: all of them",
    )
    parser.add_argument(
        "--sizes",
        "--size",
        type=sizes,
        default="256,512,1280x720",
        metavar="A,B,...",
        help="sizes of the images: N pixels a side, or WIDTHxHEIGHT; default: %(default)s",
    )
    parser.add_argument(
        "--dtype",
        type=dtypes,
        default="float32,bfloat16",
        metavar="A,B,...",
        help=f"of the weights and the computation: {', '.join(DTYPES)}; default: %(default)s",
    )
    add_device(parser)
    parser.set_defaults(run=run)


def dtypes(text: str) -> tuple[str, ...]:
    """Names of dtypes; commas separate them.

    Raises:
        argparse.ArgumentTypeError: no such dtype.
    """
    values = names(text)
    for name in values:
        if name not in DTYPES:
            raise argparse.ArgumentTypeError(f"{name} is not one of {', '.join(DTYPES)}")
    return values


def run(arguments: argparse.Namespace) -> int:
    """Runs the command and returns its exit status."""
    import torch

    from fastperc import checkpoints
    from fastperc.devices import find_device
    from fastperc.tools.bench import report

    device = find_device(arguments.device)
    files = shipped(arguments.networks) if arguments.networks else [style_file(arguments)]
    networks = [(file.stem, checkpoints.load(file, device)) for file in files]
    print(report(networks, arguments.sizes, [getattr(torch, name) for name in arguments.dtype], device))
    return 0
