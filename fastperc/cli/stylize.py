"""``fastperc stylize``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fastperc.cli.clips import add_clips, run_photos_and_clips
from fastperc.cli.networks import add_masked_networks, load_masked_painter, network_files
from fastperc.cli.options import SEVERAL_INPUTS, add_device, add_files, add_stroke, add_tile, fraction, positive
from fastperc.cli.web import add_webcam, run_webcam
from fastperc.errors import InputError
from fastperc.weights import STYLES


def add(commands: argparse._SubParsersAction[Any]) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "stylize",
        help="paint photos and clips in a style",
        description="Paints photos and clips in a style that ships with fastperc, or in your own.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  fastperc stylize photo.jpg                              writes photo-great_wave.jpg\n"
        "  fastperc stylize photo.jpg -o out.png --style starry_night --size 1024\n"
        "  fastperc stylize holiday/ -o painted/ --strength 0.7 --keep-colors\n"
        "  fastperc stylize photo.jpg -o out.jpg --model runs/mine/model.safetensors\n"
        "  fastperc stylize photo.jpg -o out.jpg --model exported.pt2\n"
        "  fastperc stylize photo.jpg -o out.jpg --mask sky.png    where the mask is white\n"
        "  fastperc stylize photo.jpg --style great_wave --mask sea.png --style starry_night --mask sky.png\n"
        "  fastperc stylize clip.mp4 -o out.mp4 --smooth 0.5       with its sound\n"
        "  fastperc stylize --webcam 0                             a camera, in the browser\n\n" + SEVERAL_INPUTS,
    )
    add_files(parser, required=False)
    add_masked_networks(parser)
    parser.add_argument(
        "--size",
        type=positive,
        metavar="N",
        help="resize photos and clips so that the longer side has N pixels; default: no resizing",
    )
    parser.add_argument(
        "--strength",
        type=fraction,
        default=1.0,
        metavar="0..1",
        help="blend of photo and painting: 0 is the photo, 1 the painting; default: 1",
    )
    parser.add_argument(
        "--keep-colors", action="store_true", help="keep the photo's colours, take only the lightness of the painting"
    )
    add_stroke(parser)
    add_tile(parser, "paint")
    add_device(parser)
    add_clips(parser)
    add_webcam(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command and returns its exit status."""
    if arguments.webcam is not None:
        return run_webcam(arguments)
    if not arguments.inputs:
        raise InputError("the following arguments are required: INPUT, or --webcam DEVICE")
    if arguments.port is not None:
        raise InputError("--port is for --webcam")
    from fastperc.devices import find_device
    from fastperc.files import check_overwrites
    from fastperc.photos.formats import check_size
    from fastperc.photos.jobs import plan_jobs
    from fastperc.photos.photo import Photo
    from fastperc.photos.stylize import check_stroke, read_photo, stylize
    from fastperc.progress import Watch
    from fastperc.video.formats import ClipFormats
    from fastperc.video.painters import StyleFrames

    sources = network_files(arguments)
    label = "-".join(dict.fromkeys(source.stem for source in sources))
    jobs = plan_jobs(arguments.inputs, arguments.out, label, STYLES, ClipFormats())
    targets = dict(jobs)
    check_overwrites(targets.values(), [*sources, *arguments.masks])
    painter = load_masked_painter(sources, arguments.masks, find_device(arguments.device))

    def paint(path: Path, watch: Watch) -> Photo:
        photo = read_photo(path, arguments.size)
        check_size(targets[path], *photo.rgb.size)
        check_stroke(path, photo, arguments.stroke)
        how = arguments.strength, arguments.keep_colors, arguments.tile
        return stylize(painter, photo, *how, watch, arguments.stroke)

    frames = StyleFrames(painter, arguments.strength, arguments.keep_colors, arguments.tile, arguments.stroke)
    return run_photos_and_clips(arguments, jobs, "stylizing", paint, frames)
