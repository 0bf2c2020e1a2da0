"""``fastperc bench``."""

from __future__ import annotations

import argparse
from typing import Any

from fastperc.cli.options import add_device, add_model, load_style, model_file, sizes


def add(commands: argparse._SubParsersAction[Any]) -> None:
    parser = commands.add_parser(
        "bench",
        help="time pictures on this machine",
        description="Times a style network on this machine: in plain PyTorch, and as `fastperc stylize` runs it.",
    )
    add_model(parser)
    parser.add_argument(
        "--sizes",
        type=sizes,
        default="256,512,1280x720",
        metavar="A,B,...",
        help="of the images, N pixels a side or WIDTHxHEIGHT; default: %(default)s",
    )
    add_device(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from fastperc.devices import find_device
    from fastperc.tools.bench import report

    device = find_device(arguments.device)
    print(report(load_style(model_file(arguments), device), arguments.sizes, device))
    return 0
