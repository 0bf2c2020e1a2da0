"""``fastperc bench``."""

from __future__ import annotations

import argparse
from typing import Any

from fastperc.cli.networks import add_style_network, load_style, style_file
from fastperc.cli.options import add_device, sizes


def add(commands: argparse._SubParsersAction[Any]) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "bench",
        help="measure how fast this machine paints",
        description="Measures how fast a style network paints on this machine: in plain PyTorch, and as "
        "`fastperc stylize` runs it.",
    )
    add_style_network(parser)
    parser.add_argument(
        "--sizes",
        type=sizes,
        default="256,512,1280x720",
        metavar="A,B,...",
        help="sizes of the images: N pixels a side, or WIDTHxHEIGHT; default: %(default)s",
    )
    add_device(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command and returns its exit status."""
    from fastperc.devices import find_device
    from fastperc.tools.bench import report

    device = find_device(arguments.device)
    print(report(load_style(style_file(arguments), device), arguments.sizes, device))
    return 0
