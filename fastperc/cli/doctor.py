"""``fastperc doctor``."""

from __future__ import annotations

import argparse
from typing import Any


def add(commands: argparse._SubParsersAction[Any]) -> None:
    parser = commands.add_parser("doctor", help="show versions and which backend runs each operation here")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from fastperc.tools.doctor import report

    print(report())
    return 0
