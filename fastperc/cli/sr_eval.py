"""``fastperc sr eval``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastperc.cli.networks import METHODS, load_painter, super_resolution_file
from fastperc.cli.options import add_device, add_match, names, output, path, square, weight
from fastperc.errors import InputError
from fastperc.presets import SCALES
from fastperc.weights import SUPER_RESOLUTION

if TYPE_CHECKING:
    import torch

    from fastperc.photos.evaluate import Method


def add(commands: argparse._SubParsersAction[Any]) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "eval",
        help="measure PSNR and SSIM against ground truth",
        description="Makes the images of a folder small, enlarges them with each method, and compares the luma\n"
        "with the original's: PSNR in dB and SSIM. If the folder is called Set5, Set14 or BSD100, the\n"
        "paper's scores are added.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  fastperc sr eval --data Set5 --scale 4 --methods bicubic,pixel --csv set5.csv\n"
        "  fastperc sr eval --data Set5 --blur 1 --pictures compared/      as the networks were trained\n"
        "  fastperc sr eval --data Set5 --methods bicubic,runs/mine/model.safetensors",
    )
    parser.add_argument("--data", required=True, type=path, metavar="DIR", help="a folder of images in full resolution")
    parser.add_argument(
        "--scale", type=int, default=4, choices=SCALES, help="how many times to enlarge; default: %(default)s"
    )
    parser.add_argument(
        "--methods",
        type=names,
        metavar="A,B,...",
        help=f"any of {', '.join(METHODS)}, and files of networks; default: all that ship for the scale",
    )
    parser.add_argument(
        "--blur",
        type=weight,
        default=0.0,
        metavar="X",
        help="sigma in pixels of a Gaussian blur before the images are made small: 1 as in training; default: 0, as in "
        "published tables",
    )
    parser.add_argument("--csv", type=path, metavar="FILE", help="write the scores there, a row for each image")
    parser.add_argument("--markdown", type=path, metavar="FILE", help="write the printed table there")
    parser.add_argument(
        "--pictures",
        type=output,
        metavar="DIR",
        help="write a figure for each image there: one part of it by all methods",
    )
    parser.add_argument(
        "--crop",
        type=square,
        metavar="X,Y,SIDE",
        help="the part to show: left, top and side in pixels; default: where the methods differ most",
    )
    add_match(parser)
    add_device(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command and returns its exit status."""
    from fastperc.devices import find_device
    from fastperc.files import check_distinct, check_overwrites, check_writable, write_atomically
    from fastperc.photos import evaluate
    from fastperc.photos.folders import find_images
    from fastperc.photos.jobs import plan_jobs
    from fastperc.photos.photo import Photo, write_image
    from fastperc.progress import track

    shipped = [name for name in METHODS if name == "bicubic" or f"x{arguments.scale}_{name}" in SUPER_RESOLUTION]
    methods = {
        name: load_method(name, arguments.scale, arguments.match, find_device(arguments.device))
        for name in arguments.methods or shipped
    }
    figures = dict(plan_jobs([arguments.data], arguments.pictures, "compared")) if arguments.pictures else {}
    images = {str(file.relative_to(arguments.data)): file for file in figures or find_images(arguments.data)}
    outputs = [target for target in (arguments.csv, arguments.markdown, *figures.values()) if target is not None]
    check_overwrites(outputs, [*images.values(), *(Path(name) for name in methods if name not in METHODS)])
    check_distinct(outputs)
    for target in outputs:
        check_writable(target)
    scores = {}
    comparisons = evaluate.compare(images.items(), methods, arguments.scale, arguments.blur)
    for comparison in track(comparisons, "evaluating", len(images)):
        scores[comparison.name] = comparison.scores
        if figures:
            target = figures[images[comparison.name]]
            write_image(target, Photo(evaluate.figure(comparison, arguments.crop)))
    paper = evaluate.paper_scores(arguments.data, arguments.scale)
    table = evaluate.as_markdown(scores, paper, arguments.blur)
    if arguments.csv:
        evaluate.write_csv(arguments.csv, scores)
    if arguments.markdown:
        with write_atomically(arguments.markdown) as temporary:
            temporary.write_bytes(f"{table}\n".encode("utf-8", "surrogateescape"))  # names of files may be any bytes
    print(table)
    return 0


def load_method(name: str, scale: int, match: bool, device: torch.device) -> Method:
    """The method called ``name``: one of ``METHODS``, or the file of a network.

    Raises:
        InputError: neither, or a network that cannot be used.
    """
    from functools import partial

    from fastperc.photos import evaluate
    from fastperc.photos.upscale import upscale

    if name == "bicubic":
        return evaluate.bicubic(scale)
    source = super_resolution_file(name, scale) if name in METHODS else Path(name)
    if name not in METHODS and not source.exists():
        raise InputError(f"{name}: neither a method ({', '.join(METHODS)}) nor a file")
    return partial(upscale, load_painter(source, scale, device), match=match)
