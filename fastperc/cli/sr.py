"""``fastperc sr``: the group of the super-resolution commands."""

from __future__ import annotations

import argparse
from typing import Any

from fastperc.cli import sr_eval, sr_train, sr_upscale


def add(commands: argparse._SubParsersAction[Any]) -> None:
    """Adds the command and its subcommands to the parser."""
    parser = commands.add_parser(
        "sr",
        help="super-resolution: enlarge photos, train and evaluate networks",
        description="Super-resolution as in the paper: enlarge photos, train networks for it, evaluate them.",
        epilog="`fastperc sr upscale photo.jpg` enlarges a photo four times.",
    )
    subcommands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (sr_upscale, sr_train, sr_eval):
        command.add(subcommands)
