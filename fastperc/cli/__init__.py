"""The command line. Each command imports what it needs when it runs, so that help is instant."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from fastperc._version import __version__
from fastperc.cli import bench, doctor, figure2, optimize, sr, stylize, train, tune
from fastperc.errors import BAD_INPUT, InputError

COMMANDS = stylize, train, figure2, sr, optimize, tune, bench, doctor  # as --help lists them
FAILED, INTERRUPTED = 1, 130  # exit statuses, with BAD_INPUT


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status: 0, 1 for a failure while running, 2 for input it cannot use."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    logging.getLogger("PIL").setLevel(logging.CRITICAL)  # what it logs, its exceptions say as well
    try:
        return arguments.run(arguments)
    except InputError as error:
        status, message = BAD_INPUT, str(error)
    except KeyboardInterrupt:
        status, message = INTERRUPTED, "interrupted"
    except MemoryError:
        status, message = FAILED, "out of memory; try a smaller --size"
    except OSError as error:
        status, message = FAILED, f"{error.filename or 'a file'}: {error.strerror or error}"
    except (RuntimeError, ArithmeticError) as error:
        out_of_memory = "out of memory" in str(error) or "can't allocate memory" in str(error)
        status, message = FAILED, "out of memory; try a smaller --size" if out_of_memory else str(error)
    print(f"{arguments.prog}: {one_line(message)}", file=sys.stderr)
    return status


def one_line(message: str) -> str:
    """``message`` without its line breaks."""
    return " ".join(message.split())


class Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` that says what was wrong in one line, and leaves its name in ``prog``."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.set_defaults(prog=self.prog)

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"{self.prog}: {one_line(message)} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = Parser(
        prog="fastperc",
        description="Paints photographs in the style of a painting, and makes small ones large, in one pass of a small "
        "network (Johnson et al.).",
        epilog="First steps: `fastperc stylize photo.jpg` paints a photo in the style of The Great Wave.",
    )
    parser.add_argument("--version", action="version", version=f"fastperc {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for command in COMMANDS:
        command.add(commands)
    return parser
