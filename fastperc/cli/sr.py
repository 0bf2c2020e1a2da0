"""``fastperc sr train | upscale | eval``: super-resolution."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastperc.cli.options import (
    SEVERAL_GPUS,
    add_device,
    add_files,
    add_init,
    add_loop,
    add_tile,
    add_training,
    names,
    path,
    recipe_fields,
    square,
    weight,
)
from fastperc.errors import BAD_INPUT, InputError
from fastperc.presets import ARCHITECTURES, SCALES
from fastperc.weights import SUPER_RESOLUTION

if TYPE_CHECKING:
    import torch

    from fastperc.photos.evaluate import Method
    from fastperc.photos.jobs import Painter
    from fastperc.training.super_resolution import SuperResolutionRecipe

METHODS = "bicubic", "srcnn", "pixel", "feature"


def add(commands: argparse._SubParsersAction[Any]) -> None:
    parser = commands.add_parser(
        "sr",
        help="super-resolution: enlarge photos, train and evaluate networks that do",
        description="Super-resolution as in the paper: enlarge photos, train networks that do, evaluate them.",
        epilog="`fastperc sr upscale photo.jpg` enlarges a photo four times.",
    )
    kinds = parser.add_subparsers(required=True, metavar="COMMAND")
    add_upscale(kinds)
    add_train(kinds)
    add_eval(kinds)


def add_upscale(commands: argparse._SubParsersAction[Any]) -> None:
    parser = commands.add_parser(
        "upscale",
        help="enlarge photos",
        description="Enlarges photos four or eight times by a network that ships with fastperc or that you trained.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  fastperc sr upscale photo.jpg                                photo-x4.jpg, beside the photo\n"
        "  fastperc sr upscale thumbnails/ -o large/ --scale 8\n"
        "  fastperc sr upscale photo.jpg -o large.png --method feature  sharper, farther in numbers\n"
        "  fastperc sr upscale photo.jpg --model runs/mine/model.safetensors",
    )
    add_files(parser)
    parser.add_argument("--scale", type=int, choices=SCALES, help="how many times; default: 4, or the model's")
    network = parser.add_mutually_exclusive_group()
    network.add_argument(
        "--method",
        default="pixel",
        choices=METHODS[1:],
        help="which shipped network: trained by pixels (clean), by VGG's features (sharp, with a faint grid as in the "
        "paper), or SRCNN; default: %(default)s",
    )
    network.add_argument("--model", type=path, metavar="FILE", help="a network that `fastperc sr train` made")
    add_match(parser)
    add_tile(parser, "enlarge")
    add_device(parser)
    parser.set_defaults(run=run_upscale)


def run_upscale(arguments: argparse.Namespace) -> int:
    from fastperc.devices import find_device
    from fastperc.photos.jobs import jobs_of, paint_files
    from fastperc.photos.photo import Photo, read_image
    from fastperc.photos.upscale import upscale
    from fastperc.progress import Watch

    source = arguments.model or shipped(arguments.method, arguments.scale or 4)
    painter = load_painter(source, arguments.scale, find_device(arguments.device))

    def paint(path: Path, watch: Watch) -> Photo:
        photo = read_image(path)
        try:
            return upscale(painter, photo, arguments.match, arguments.tile, watch)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None

    jobs = jobs_of(arguments.inputs, arguments.out, f"x{painter.scale}")
    return BAD_INPUT if paint_files(jobs, "enlarging", paint) else 0


def add_match(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--no-match",
        dest="match",
        action="store_false",
        help="leave the colours as the network has them, rather than give them the small photo's histogram",
    )


def shipped(method: str, scale: int) -> Path:
    """The file of the shipped network of a method and scale."""
    name = f"x{scale}_{method}"
    if name not in SUPER_RESOLUTION:
        there = ", ".join(known.partition("_")[2] for known in SUPER_RESOLUTION if known.startswith(f"x{scale}_"))
        raise InputError(f"no {method!r} network ships for ×{scale}; there are {there} (or give a file)")
    return SUPER_RESOLUTION[name]


def load_painter(source: Path, scale: int | None, device: torch.device) -> Painter:
    """The super-resolution network in the file ``source``, ready to paint; of that ``scale``, if one is given."""
    from fastperc import checkpoints
    from fastperc.models import SRCNN, SuperResolutionNet
    from fastperc.photos.upscale import painter_of

    net = checkpoints.load(source, device)
    if not isinstance(net, (SRCNN, SuperResolutionNet)):
        raise InputError(f"{source}: holds a {type(net).__name__}, which is no super-resolution network")
    if scale is not None and net.config["scale"] != scale:
        raise InputError(f"{source}: enlarges {net.config['scale']} times, not {scale}")
    return painter_of(net)


def add_train(commands: argparse._SubParsersAction[Any]) -> None:
    parser = commands.add_parser(
        "train",
        help="train a network that enlarges",
        description="Trains a network to undo the blur and the loss of pixels of photos made small.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  fastperc sr train --data photos/ --out runs/pixel --device cuda --amp\n"
        "  fastperc sr train --data photos/ --out runs/feature --loss feature --init runs/pixel/model.safetensors\n"
        "  fastperc sr train ... --resume                          go on after a stop, bit for bit on the CPU\n"
        + SEVERAL_GPUS.format(command="sr train")
        + "Ctrl-C saves and stops. The result is DIR/model.safetensors; DIR/previews shows how it came about,\n"
        "DIR/losses.csv what each iteration's loss was.",
    )
    add_training(parser)
    add_init(parser)
    parser.add_argument("--scale", type=int, default=4, choices=SCALES, help="default: %(default)s")
    parser.add_argument(
        "--loss",
        default="pixel",
        choices=["pixel", "feature"],
        help="what is compared: pixels, or VGG-16's relu2_2; default: %(default)s",
    )
    parser.add_argument(
        "--arch",
        default="paper",
        choices=ARCHITECTURES,
        help="the paper's Table 2, or SRCNN with kernels 9-5-5 or 9-1-5; default: %(default)s",
    )
    parser.add_argument(
        "--blur",
        type=weight,
        default=1.0,
        metavar="X",
        help="sigma in pixels of the Gaussian before photos are made small; default: %(default)s",
    )
    add_loop(parser, iterations=200_000, size=288)
    parser.set_defaults(run=run_train)


def run_train(arguments: argparse.Namespace) -> int:
    from fastperc.training.loop import train

    train(recipe_from(arguments), arguments.out, arguments.resume)
    return 0


def recipe_from(arguments: argparse.Namespace) -> SuperResolutionRecipe:
    """The recipe that the arguments spell."""
    from fastperc.training.super_resolution import SuperResolutionRecipe

    return SuperResolutionRecipe(**recipe_fields(SuperResolutionRecipe, vars(arguments)))


def add_eval(commands: argparse._SubParsersAction[Any]) -> None:
    parser = commands.add_parser(
        "eval",
        help="measure PSNR and SSIM against ground truth",
        description="Makes the images of a folder small, enlarges them by each method, and compares the luma with the\n"
        "original's: PSNR in dB and SSIM, beside the paper's figures where the folder is called Set5, Set14 or BSD100.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  fastperc sr eval --data Set5 --scale 4 --methods bicubic,pixel --csv set5.csv\n"
        "  fastperc sr eval --data Set5 --blur 1 --pictures compared/      as the networks were trained\n"
        "  fastperc sr eval --data Set5 --methods bicubic,runs/mine/model.safetensors",
    )
    parser.add_argument("--data", required=True, type=path, metavar="DIR", help="a folder of images in full resolution")
    parser.add_argument("--scale", type=int, default=4, choices=SCALES, help="default: %(default)s")
    parser.add_argument(
        "--methods",
        type=names,
        metavar="A,B,...",
        help=f"of {', '.join(METHODS)}, and files of networks; default: all that ship for the scale",
    )
    parser.add_argument(
        "--blur",
        type=weight,
        default=0.0,
        metavar="X",
        help="sigma in pixels of a Gaussian before the images are made small: 1 as in training; default: 0, as in "
        "published tables",
    )
    parser.add_argument("--csv", type=path, metavar="FILE", help="write the figures there, a row for each image")
    parser.add_argument("--markdown", type=path, metavar="FILE", help="write the table there")
    parser.add_argument("--pictures", type=path, metavar="DIR", help="show a part of each image by all methods there")
    parser.add_argument(
        "--crop", type=square, metavar="X,Y,SIDE", help="which part; default: where the methods differ most"
    )
    add_match(parser)
    add_device(parser)
    parser.set_defaults(run=run_eval)


def run_eval(arguments: argparse.Namespace) -> int:
    from fastperc.devices import find_device
    from fastperc.files import check_writable, write_atomically
    from fastperc.photos import evaluate
    from fastperc.photos.jobs import jobs_of
    from fastperc.photos.photo import Photo, find_images, write_image
    from fastperc.progress import track

    there = [name for name in METHODS if name == "bicubic" or f"x{arguments.scale}_{name}" in SUPER_RESOLUTION]
    methods = {
        name: method_of(name, arguments.scale, arguments.match, find_device(arguments.device))
        for name in arguments.methods or there
    }
    figures = dict(jobs_of([arguments.data], arguments.pictures, "compared")) if arguments.pictures else {}
    for target in (arguments.csv, arguments.markdown, *figures.values()):
        if target is not None:
            check_writable(target)
    images = {str(file.relative_to(arguments.data)): file for file in figures or find_images(arguments.data)}
    scores = {}
    compared = evaluate.compare(images.items(), methods, arguments.scale, arguments.blur)
    for comparison in track(compared, "evaluating", len(images)):
        scores[comparison.name] = comparison.scores
        if figures:
            target = figures[images[comparison.name]]
            write_image(target, Photo(evaluate.figure(comparison, arguments.crop)))
    published = evaluate.published(arguments.data, arguments.scale)
    table = evaluate.as_markdown(scores, published, arguments.blur)
    if arguments.csv:
        evaluate.write_csv(arguments.csv, scores)
    if arguments.markdown:
        with write_atomically(arguments.markdown) as temporary:
            temporary.write_text(table + "\n", encoding="utf-8")
    print(table)
    return 0


def method_of(name: str, scale: int, match: bool, device: torch.device) -> Method:
    """The method called so: one of ``METHODS``, or a file with a network."""
    from functools import partial

    from fastperc.photos import evaluate
    from fastperc.photos.upscale import upscale

    if name == "bicubic":
        return evaluate.bicubic(scale)
    source = shipped(name, scale) if name in METHODS else Path(name)
    if name not in METHODS and not source.exists():
        raise InputError(f"{name}: neither a method ({', '.join(METHODS)}) nor a file")
    return partial(upscale, load_painter(source, scale, device), match=match)
