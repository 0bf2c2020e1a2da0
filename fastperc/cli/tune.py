"""``fastperc tune``."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from fastperc.cli.options import add_device, positive, positive_float
from fastperc.errors import INTERRUPTED, InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from fastperc.dispatch import Key, Milliseconds
    from fastperc.tools.tuning import Case


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
    parser.add_argument(
        "--minutes",
        type=positive_float,
        default=2.0,
        metavar="N",
        help="time to spend, on what matters most here first; cases left out are measured by the next run; "
        "default: %(default)s",
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
    cases = tuning.choices(device, tuning.cases(arguments.batch, arguments.size))
    if not cases:
        print(f"nothing to choose from: plain PyTorch alone runs on {device}")
        return 0
    table = dispatch.table(device)
    known = table.times if table and table.path == path else {}
    return measure([case for case in cases if case.key not in known] or cases, device, arguments)


def measure(cases: Sequence[Case], device: torch.device, arguments: argparse.Namespace) -> int:
    """Times ``cases``, adds what was measured to the table, also on Ctrl-C, and returns the exit status."""
    from fastperc import dispatch
    from fastperc.progress import Meter, say
    from fastperc.tools import tuning

    times: dict[Key, Milliseconds] = {}
    try:
        with Meter("tuning", len(cases)) as meter:
            for measured in tuning.tune(device, cases, 60 * arguments.minutes):
                key = measured.case.key
                if measured.times:
                    times[key] = measured.times
                meter.advance(f"{key.operation} {key.dtype}", measured.seconds_left)
    except KeyboardInterrupt as stop:
        if times:
            dispatch.save(device, times)
        if type(stop) is not KeyboardInterrupt:  # SIGTERM or SIGHUP, which have a line of their own
            raise
        kept = f"kept in {dispatch.path_of(device)}" if times else "nothing to keep"
        print(f"{arguments.prog}: interrupted; {len(times)} of {len(cases)} cases measured, {kept}", file=sys.stderr)
        return INTERRUPTED
    if times:
        dispatch.save(device, times)
    print(f"{tuning.report(times)}\n{dispatch.path_of(device)}")
    if left_out := len(cases) - len(times):
        say(f"{left_out} of {len(cases)} cases left out for lack of time; `fastperc tune` again measures them")
    return 0
