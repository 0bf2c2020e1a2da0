"""``fastperc sr upscale``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fastperc.cli.clips import add_clips, run_photos_and_clips
from fastperc.cli.networks import ARCHIVES, METHODS, load_painter, local_file, super_resolution_file
from fastperc.cli.options import SEVERAL_INPUTS, add_device, add_files, add_match, add_tile, network_file
from fastperc.errors import InputError
from fastperc.presets import SCALES


def add(commands: argparse._SubParsersAction[Any]) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "upscale",
        help="enlarge photos and clips",
        description="Enlarges photos and clips four or eight times with a network that ships with fastperc, or with\n"
        "your own.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  fastperc sr upscale photo.jpg                                writes photo-x4.jpg\n"
        "  fastperc sr upscale thumbnails/ -o large/ --scale 8\n"
        "  fastperc sr upscale photo.jpg -o large.png --method feature  sharper, but with lower PSNR\n"
        "  fastperc sr upscale photo.jpg --model runs/mine/model.safetensors\n"
        "  fastperc sr upscale clip.mp4 -o out.mp4                      with its sound\n\n" + SEVERAL_INPUTS,
    )
    add_files(parser)
    parser.add_argument(
        "--scale", type=int, choices=SCALES, help="how many times to enlarge; default: 4, or the model's"
    )
    network = parser.add_mutually_exclusive_group()
    network.add_argument(
        "--method",
        default="pixel",
        choices=METHODS[1:],
        help="which shipped network: trained on pixels (clean), trained on VGG-16's features (sharp, with a faint grid "
        "as in the paper), or SRCNN; default: %(default)s",
    )
    network.add_argument(
        "--model",
        type=network_file,
        metavar="FILE",
        help=f"a network trained by `fastperc sr train`, on disk or as hf://OWNER/NAME/FILE on the Hugging Face Hub, "
        f"{ARCHIVES}",
    )
    add_match(parser)
    add_tile(parser, "enlarge")
    add_device(parser)
    add_clips(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command and returns its exit status."""
    from fastperc.devices import find_device
    from fastperc.files import check_overwrites
    from fastperc.photos.formats import check_size
    from fastperc.photos.jobs import plan_jobs
    from fastperc.photos.photo import Photo, read_first_frame
    from fastperc.photos.upscale import upscale
    from fastperc.progress import Watch
    from fastperc.video.formats import ClipFormats
    from fastperc.video.painters import EnlargeFrames

    scale = arguments.scale or 4
    source = local_file(arguments.model) if arguments.model else super_resolution_file(arguments.method, scale)
    painter = load_painter(source, arguments.scale, find_device(arguments.device))

    def paint(path: Path, watch: Watch) -> Photo:
        photo = read_first_frame(path)
        check_size(targets[path], *(side * painter.scale for side in photo.rgb.size))
        try:
            return upscale(painter, photo, arguments.match, arguments.tile, watch)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None

    labels = [f"x{scale}" for scale in SCALES]
    jobs = plan_jobs(arguments.inputs, arguments.out, f"x{painter.scale}", labels, ClipFormats())
    targets = dict(jobs)
    check_overwrites(targets.values(), [source])
    frames = EnlargeFrames(painter, arguments.match, arguments.tile)
    return run_photos_and_clips(arguments, jobs, "enlarging", paint, frames)
