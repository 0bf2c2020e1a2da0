"""The command line. A command imports what it needs when it runs, so that ``--help`` is instant."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import select
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn, TextIO

from fastperc._version import __version__
from fastperc.cli import (
    bench,
    completion,
    convert,
    doctor,
    export,
    figure2,
    optimize,
    push,
    sr,
    styles,
    stylize,
    train,
    tune,
    web,
)
from fastperc.cli.options import EXIT_STATUS
from fastperc.cli.terminal import guarded, print_any_name
from fastperc.errors import BAD_INPUT, INTERRUPTED, InputError

COMMANDS = (
    stylize,
    styles,
    web,
    train,
    figure2,
    sr,
    optimize,
    convert,
    export,
    push,
    tune,
    bench,
    doctor,
    completion,
)  # in the order of --help
FAILED, PIPE_CLOSED = 1, 141  # exit statuses, with BAD_INPUT and INTERRUPTED


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status: 0, 1 for a failure while running, 2 for bad input, 130 for Ctrl-C.

    Anything but success prints one line on stderr. argparse exits by itself, with 2, if the options are wrong. If the
    reader of stdout is gone, as in ``fastperc doctor | head -1``, the command ends without a line, with status 141.
    SIGTERM and SIGHUP end it with 143 and 129. Characters that the terminal cannot print are printed as escapes.

    Args:
        argv: the arguments; default: those of the process.
    """
    print_any_name()
    try:
        status = run_command(argv)
    except BrokenPipeError:
        status = PIPE_CLOSED
    except SystemExit:  # of argparse
        if failure := flush_streams():
            return failure
        raise
    return flush_streams() or status


def flush_streams() -> int:
    """Flushes stdout and stderr; returns 0, or the exit status if one has no reader or stdout cannot be written.

    Python flushes them once more when it exits. What is left in one that fails goes nowhere then.
    """
    status = 0
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or stream.closed:
            continue
        try:
            stream.flush()
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            if isinstance(error, BrokenPipeError) or error.errno == errno.EIO:  # a closed pipe, a closed terminal
                status = status or PIPE_CLOSED
            elif name == "stdout":
                print(f"fastperc: the output cannot be written: {error.strerror}", file=sys.stderr)
                status = FAILED
    return status


def lost_its_reader(stream: TextIO) -> bool:
    """Whether ``stream`` is a pipe that nobody reads any more."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (AttributeError, OSError, ValueError):  # Windows has no poll; a stream of a test may have no file
        return False


def run_command(argv: Sequence[str] | None) -> int:
    """Runs one command; returns as :func:`main`, or raises BrokenPipeError if the reader of an output is gone."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    logging.getLogger("PIL").setLevel(logging.CRITICAL)  # Pillow's exceptions say what its log says

    def print_warning(message: Warning | str, *details: object, **more: object) -> None:
        print(f"{arguments.prog}: {one_line(str(message))}", file=sys.stderr)

    try:
        with warnings.catch_warnings():
            warnings.showwarning = print_warning
            return guarded(arguments.run)(arguments)
    except InputError as error:
        status, message = BAD_INPUT, str(error)
    except KeyboardInterrupt:
        status, message = INTERRUPTED, "interrupted"
    except MemoryError:
        status, message = FAILED, out_of_memory(arguments)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and any(map(lost_its_reader, (sys.stdout, sys.stderr))):
            raise
        status, message = FAILED, f"{error.filename or 'a file'}: {error.strerror or error}"
    except (RuntimeError, ArithmeticError) as error:
        text = str(error)
        lack_of_memory = "out of memory" in text or "can't allocate memory" in text
        status, message = FAILED, out_of_memory(arguments) if lack_of_memory else text
    print(f"{arguments.prog}: {one_line(message)}", file=sys.stderr)
    return status


def out_of_memory(arguments: argparse.Namespace) -> str:
    """The message for a lack of memory. It names the options of the command that save memory."""
    options = [f"--{name}" for name in ("size", "tile", "batch") if name in arguments]
    return f"out of memory; try a smaller {' or '.join(options) or 'image'}"


def one_line(message: str) -> str:
    """``message`` with spaces for line breaks."""
    return " ".join(message.split())


class Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` that reports errors in one line. It also stores the command's name as ``prog``."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.set_defaults(prog=self.prog)

    def error(self, message: str) -> NoReturn:
        """Prints ``message`` in one line and exits with status 2."""
        self.exit(BAD_INPUT, f"{self.prog}: {one_line(message)} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = Parser(
        prog="fastperc",
        description="Paints photos in the style of a painting, and enlarges photos, in one pass of a\n"
        "small network (Johnson et al. 2016).",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="First steps: `fastperc stylize photo.jpg` paints a photo in the style of The\nGreat Wave.\n\n"
        + EXIT_STATUS,
    )
    parser.add_argument("--version", action="version", version=f"fastperc {__version__}")
    parser.set_defaults(parser=parser)  # for ``completion``
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for command in COMMANDS:
        command.add(commands)
    return parser
