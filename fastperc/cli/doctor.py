"""``fastperc doctor``."""

from __future__ import annotations

import argparse
from typing import Any


def add(commands: argparse._SubParsersAction[Any]) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "doctor",
        help="show versions, and which backend runs each operation here",
        description="Shows versions, and which backend runs each operation on this machine and why. Put its output in "
        "bug reports.",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command and returns its exit status."""
    from fastperc.tools.doctor import report

    print(report())
    return 0
