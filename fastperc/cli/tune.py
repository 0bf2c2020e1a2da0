"""``fastperc tune``."""

from __future__ import annotations

import argparse
from typing import Any

from fastperc.cli.options import add_device, positive
from fastperc.errors import InputError


def add(commands: argparse._SubParsersAction[Any]) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "tune",
        help="measure which backend is fastest here, and use it from then on",
        description="Measures every implementation of each operation here, at the shapes of a training step, and "
        "writes a table. From then on the fastest backend is used. Other sizes and batches add to the table.",
    )
    parser.add_argument(
        "--size", type=positive, default=256, metavar="N", help="side of the images in pixels; default: %(default)s"
    )
    parser.add_argument(
        "--batch", type=positive, default=4, metavar="N", help="images in a batch; default: %(default)s"
    )
    add_device(parser)
    table = parser.add_mutually_exclusive_group()
    table.add_argument("--show", action="store_true", help="print the table in use and its file; measure nothing")
    table.add_argument("--clear", action="store_true", help="remove the table; measure nothing")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command and returns its exit status."""
    from fastperc import dispatch
    from fastperc.devices import find_device
    from fastperc.files import check_writable
    from fastperc.progress import track
    from fastperc.tools import tuning

    device = find_device(arguments.device)
    path = dispatch.path_of(device)
    if arguments.clear:
        if path.is_dir():
            raise InputError(f"{path}: is a folder, not a table")
        print(f"removed {path}" if dispatch.clear(device) else f"there was no table, {path}")
        return 0
    if arguments.show:
        table = dispatch.table(device)
        print(f"{tuning.report(table.times)}\n{table.path}, {table.date}" if table else f"there is no table, {path}")
        return 0
    check_writable(path)
    cases = list(tuning.cases(arguments.batch, arguments.size))
    times = tuning.tune(device, track(cases, "tuning", len(cases)))
    if not times:
        print(f"nothing to choose from: plain PyTorch alone runs on {device}")
        return 0
    dispatch.save(device, times)
    print(f"{tuning.report(times)}\n{path}")
    return 0
