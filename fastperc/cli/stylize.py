"""``fastperc stylize``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fastperc.cli.options import add_device, add_files, add_model, add_tile, fraction, load_style, model_file, positive
from fastperc.errors import BAD_INPUT


def add(commands: argparse._SubParsersAction[Any]) -> None:
    parser = commands.add_parser(
        "stylize",
        help="paint photos in a style",
        description="Paints photos in a style that ships with fastperc or that you trained.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  fastperc stylize photo.jpg                              writes photo-great_wave.jpg\n"
        "  fastperc stylize photo.jpg -o out.png --style starry_night --size 1024\n"
        "  fastperc stylize holiday/ -o painted/ --strength 0.7 --keep-colors\n"
        "  fastperc stylize photo.jpg -o out.jpg --model runs/mine/model.safetensors",
    )
    add_files(parser)
    add_model(parser)
    parser.add_argument(
        "--size", type=positive, metavar="N", help="resize so that the longer side has N pixels; default: as it is"
    )
    parser.add_argument(
        "--strength",
        type=fraction,
        default=1.0,
        metavar="0..1",
        help="blend with the photo; default: 1, the painting alone",
    )
    parser.add_argument("--keep-colors", action="store_true", help="paint with the photo's own colours")
    add_tile(parser, "paint")
    add_device(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from fastperc.devices import find_device
    from fastperc.engine import freeze
    from fastperc.photos.jobs import jobs_of, paint_files
    from fastperc.photos.photo import Photo
    from fastperc.photos.stylize import read_photo, stylize
    from fastperc.progress import Watch

    source = model_file(arguments)
    jobs = jobs_of(arguments.inputs, arguments.out, source.stem)
    engine = freeze(load_style(source, find_device(arguments.device)))

    def paint(path: Path, watch: Watch) -> Photo:
        photo = read_photo(path, arguments.size)
        return stylize(engine, photo, arguments.strength, arguments.keep_colors, arguments.tile, watch)

    return BAD_INPUT if paint_files(jobs, "stylizing", paint) else 0
