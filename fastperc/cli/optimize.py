"""``fastperc optimize``."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from fastperc.cli.options import add_device, add_layers, add_vgg, output, path, positive, positive_float, weight


def add(commands: argparse._SubParsersAction[Any]) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "optimize",
        help="paint one photo by optimising its pixels (slow; the paper's baseline)",
        description="Paints a photo by optimising its pixels under the training objective. Needs no trained network, "
        "and takes minutes.",
        epilog="example: fastperc optimize photo.jpg -o out.jpg --style painting.jpg --size 512",
    )
    parser.add_argument("input", type=path, metavar="INPUT", help="the photo")
    parser.add_argument("-o", "--out", required=True, type=output, help="the picture to write, or a folder/")
    parser.add_argument("--style", required=True, type=path, metavar="IMG", help="the painting")
    add_vgg(parser)
    add_layers(parser)
    parser.add_argument(
        "--content-weight", type=weight, metavar="X", help="weight of the content loss; the style's is 1; default: 0.3"
    )
    parser.add_argument("--tv-weight", type=weight, metavar="X", help="weight of the total variation; default: 0")
    parser.add_argument(
        "--style-size",
        type=positive,
        default=256,
        metavar="N",
        help="the painting's shorter side in pixels; default: %(default)s",
    )
    parser.add_argument(
        "--size",
        type=positive,
        metavar="N",
        help="resize the photo so that its longer side has N pixels; default: no resizing",
    )
    parser.add_argument("--iterations", type=positive, default=500, metavar="N", help="steps; default: %(default)s")
    parser.add_argument(
        "--optimizer", choices=["lbfgs", "adam"], default="lbfgs", help="the optimiser; default: %(default)s"
    )
    parser.add_argument(
        "--lr", type=positive_float, metavar="X", help="learning rate; default: 1 for lbfgs, 0.02 for adam"
    )
    add_device(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command and returns its exit status."""
    from fastperc.devices import find_device
    from fastperc.files import check_overwrites, check_writable
    from fastperc.photos.formats import check_format, check_size
    from fastperc.photos.jobs import SEPARATORS, say_written, writable_name
    from fastperc.photos.optimize import optimize
    from fastperc.photos.photo import Photo, to_image, write_image
    from fastperc.photos.stylize import read_photo
    from fastperc.training.objective import build_loss

    start = time.monotonic()
    out = Path(arguments.out)
    if arguments.out.endswith(SEPARATORS):
        out = writable_name(out / arguments.input.name)
    check_overwrites([out], filter(None, [arguments.input, arguments.style, arguments.vgg]))
    check_writable(check_format(out))
    device = find_device(arguments.device)
    photo = read_photo(arguments.input, arguments.size)
    check_size(out, *photo.rgb.size)
    loss = build_loss(
        arguments.style,
        arguments.style_size,
        arguments.vgg,
        arguments.style_layers,
        arguments.content_layer,
        vgg_preprocessing=arguments.vgg_preprocessing,
        content_weight=arguments.content_weight,
        tv_weight=arguments.tv_weight,
    ).to(device)
    image = optimize(photo.tensor().to(device), loss, arguments.iterations, arguments.optimizer, arguments.lr)
    write_image(out, Photo(to_image(image[0]), photo.alpha, photo.metadata))
    say_written([out], time.monotonic() - start)
    return 0
