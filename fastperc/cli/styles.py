"""``fastperc styles``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastperc.cli.options import add_device, path, positive, suggest
from fastperc.errors import InputError
from fastperc.weights import STYLES, SUPER_RESOLUTION

SIZE = 450  # pixels, the default of --size


def add(commands: argparse._SubParsersAction[Any]) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "styles",
        help="list the networks that ship, or show what the styles look like",
        description="Lists the styles and the super-resolution networks that ship with fastperc, and how each was\n"
        "trained. With --out, paints one photo in every style instead, side by side.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  fastperc styles\n"
        "  fastperc styles great_wave                   all that its file says of its training\n"
        "  fastperc styles -o sheet.png --photo photo.jpg",
    )
    names = parser.add_argument("names", nargs="*", metavar="NAME", help="networks to show all of; default: a table")
    suggest(names, STYLES | SUPER_RESOLUTION)
    parser.add_argument("-o", "--out", type=path, metavar="FILE", help="write a sheet of pictures in the styles there")
    parser.add_argument("--photo", type=path, metavar="FILE", help="the photo of the sheet; default: a cat's")
    parser.add_argument(
        "--size",
        type=positive,
        metavar="N",
        help=f"the longer side of each picture of the sheet in pixels; default: {SIZE}",
    )
    add_device(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command and returns its exit status."""
    if arguments.out is not None:
        write_sheet(arguments, files_of(arguments.names, STYLES))
        return 0
    for option in ("photo", "size", "device"):
        if getattr(arguments, option) is not None:
            raise InputError(f"--{option} is for the sheet, which needs --out FILE")

    from fastperc.tools.shipped import Network, details, table

    networks = map(Network.read, files_of(arguments.names, STYLES | SUPER_RESOLUTION))
    print("\n\n".join(map(details, networks)) if arguments.names else table(networks))
    return 0


def files_of(names: Sequence[str], known: Mapping[str, Path]) -> list[Path]:
    """The files of the ``known`` networks that are named; of all of them for no name, and for ``all``.

    Raises:
        InputError: no such name.
    """
    if not names or "all" in names:
        return list(known.values())
    if unknown := [name for name in names if name not in known]:
        raise InputError(f"no {'style' if known is STYLES else 'network'} {unknown[0]!r} ships; use {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(names)]


def write_sheet(arguments: argparse.Namespace, files: Sequence[Path]) -> None:
    """Writes the sheet of the styles in ``files``.

    Raises:
        InputError: a file that cannot be read or written.
    """
    from fastperc.cli.networks import load_style_painter
    from fastperc.devices import find_device
    from fastperc.files import check_overwrites
    from fastperc.photos.jobs import run_jobs
    from fastperc.photos.photo import Photo, check_format
    from fastperc.photos.sheet import SAMPLE, labelled_sheet
    from fastperc.photos.stylize import read_photo, stylize
    from fastperc.progress import Watch

    source, device = arguments.photo or SAMPLE, find_device(arguments.device)
    check_overwrites([check_format(arguments.out)], [source])

    def paint(source: Path, watch: Watch) -> Photo:
        photo = read_photo(source, arguments.size or SIZE)
        paintings = ((file.stem, stylize(load_style_painter(file, device), photo, stroke="auto")) for file in files)
        return Photo(labelled_sheet([("photo", photo.visible()), *((name, each.rgb) for name, each in paintings)]))

    run_jobs([(source, arguments.out)], "painting", paint)
