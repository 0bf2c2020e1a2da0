"""``fastperc completion``."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from fastperc.cli.options import network_file, output, path

SHELLS = "bash", "zsh", "fish"


def add(commands: argparse._SubParsersAction[Any]) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "completion",
        help="print a script that completes commands and options in your shell",
        description="Prints a script that completes commands, options, names of styles and files in your shell.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="the line to add:\n"
        '  bash   eval "$(fastperc completion bash)"       to ~/.bashrc\n'
        '  zsh    eval "$(fastperc completion zsh)"        to ~/.zshrc, below compinit\n'
        "  fish   fastperc completion fish | source        to ~/.config/fish/config.fish\n\n"
        "It needs a package: pip install 'fastperc[completion]'",
    )
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help=f"one of {', '.join(SHELLS)}")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command and returns its exit status."""
    from fastperc.errors import InputError

    try:
        import shtab
    except ImportError:
        raise InputError("completion needs shtab; run `pip install 'fastperc[completion]'`") from None
    for action in actions(arguments.parser):
        if suggestions := getattr(action, "suggestions", None):
            action.choices = suggestions
        elif action.choices is None and action.type in (path, output, network_file):
            vars(action)["complete"] = shtab.DIRECTORY if action.metavar == "DIR" else shtab.FILE
    print(shtab.complete(arguments.parser, arguments.shell))
    return 0


def actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Every option and argument of ``parser`` and of its commands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from actions(command)
