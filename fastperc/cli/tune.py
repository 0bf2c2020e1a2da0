"""``fastperc tune``."""

from __future__ import annotations

import argparse
from typing import Any

from fastperc.cli.options import add_device, positive


def add(commands: argparse._SubParsersAction[Any]) -> None:
    parser = commands.add_parser(
        "tune",
        help="measure which backend is the fastest here, and use it from then on",
        description="Times every backend of each operation on this machine, at the shapes of a training step, and "
        "keeps a table: from then on the fastest is used. Other sizes and batches add to the table.",
    )
    parser.add_argument(
        "--size", type=positive, default=256, metavar="N", help="side of the images; default: %(default)s"
    )
    parser.add_argument("--batch", type=positive, default=4, metavar="N", help="default: %(default)s")
    add_device(parser)
    table = parser.add_mutually_exclusive_group()
    table.add_argument("--show", action="store_true", help="print the table in use and where it lies; measure nothing")
    table.add_argument("--clear", action="store_true", help="remove the table; measure nothing")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from fastperc import dispatch
    from fastperc.devices import find_device
    from fastperc.files import check_writable
    from fastperc.progress import track
    from fastperc.tools import tuning

    device = find_device(arguments.device)
    path = dispatch.path_of(device)
    if arguments.clear:
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
