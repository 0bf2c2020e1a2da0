"""The command line. Each command imports what it needs when it runs, so that help is instant."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from fastperc import __version__
from fastperc.errors import InputError
from fastperc.options import fraction, names, natural, path, positive, positive_float, sizes, tile, weight
from fastperc.presets import CONVENTIONS, PRESETS
from fastperc.weights import STYLES

if TYPE_CHECKING:
    import torch
    from torch import nn

    from fastperc.training import Recipe

DEFAULT_STYLE = "great_wave"
BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130  # exit statuses


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
    print(f"fastperc {arguments.command}: {one_line(message)}", file=sys.stderr)
    return status


def one_line(message: str) -> str:
    """``message`` without its line breaks."""
    return " ".join(message.split())


class Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` that says what was wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"{self.prog}: {one_line(message)} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = Parser(
        prog="fastperc",
        description="Paints photographs in the style of a painting, in one pass of a small network (Johnson et al.).",
        epilog="First steps: `fastperc stylize photo.jpg` paints a photo in the style of The Great Wave.",
    )
    parser.add_argument("--version", action="version", version=f"fastperc {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    add_stylize(commands)
    add_train(commands)
    add_optimize(commands)
    add_tune(commands)
    add_bench(commands)
    doctor = commands.add_parser("doctor", help="show versions and which backend runs each operation here")
    doctor.set_defaults(run=run_doctor)
    return parser


def add_stylize(commands: argparse._SubParsersAction[Parser]) -> None:
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
    parser.add_argument("inputs", nargs="+", type=path, metavar="INPUT", help="a photo, several, or folders of them")
    parser.add_argument(
        "-o", "--out", type=path, help="a file for one photo, a folder for several; default: beside INPUT"
    )
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
    parser.add_argument(
        "--tile",
        type=tile,
        default="auto",
        metavar="auto|N|off",
        help="paint in parts of N pixels a side, which looks the same and takes less memory; default: auto, where the "
        "whole would take more than 2 GiB",
    )
    add_device(parser)
    parser.set_defaults(run=run_stylize)


def run_stylize(arguments: argparse.Namespace) -> int:
    from fastperc.stylize import plan

    source = model_file(arguments)
    jobs = plan(arguments.inputs, arguments.out, source.stem)

    from fastperc.devices import find_device
    from fastperc.engine import freeze
    from fastperc.files import check_writable
    from fastperc.stylize import stylize_files

    net = load_style(source, find_device(arguments.device))
    for _, target in jobs:
        check_writable(target)
    given = arguments.size, arguments.strength, arguments.keep_colors, arguments.tile
    failed = stylize_files(freeze(net), jobs, *given)
    return BAD_INPUT if failed else 0


def add_model(parser: Parser) -> None:
    """Options that name a style network."""
    model = parser.add_mutually_exclusive_group()
    model.add_argument(
        "--style", default=DEFAULT_STYLE, metavar="NAME", help=f"one of {', '.join(STYLES)}; default: %(default)s"
    )
    model.add_argument(
        "--model",
        type=path,
        metavar="FILE",
        help="a trained network: fastperc's .safetensors, or a state_dict of PyTorch's fast_neural_style example",
    )


def model_file(arguments: argparse.Namespace) -> Path:
    """The file of the network that :func:`add_model`'s options name."""
    if arguments.model is None and arguments.style not in STYLES:
        raise InputError(f"no style {arguments.style!r}; there are {', '.join(STYLES)} (or give a --model FILE)")
    return arguments.model or STYLES[arguments.style]


def load_style(source: Path, device: torch.device) -> nn.Module:
    """The style network in the file ``source``."""
    from fastperc import checkpoints
    from fastperc.models import TransformNet

    net = checkpoints.load(source, device)
    if not isinstance(net, TransformNet):
        raise InputError(f"{source}: holds a {type(net).__name__}, which is no style network")
    return net


def add_train(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = commands.add_parser(
        "train",
        help="train a style of your own",
        description="Trains a network to paint in the style of one image, from a folder of any photos.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  fastperc train --style painting.jpg --data photos/ --out runs/mine --device cuda --amp\n"
        "  fastperc train ... --resume                             go on after a stop, bit for bit on the CPU\n"
        "Ctrl-C saves and stops. The result is DIR/model.safetensors; DIR/previews shows how it came about.",
    )
    parser.add_argument("--style", required=True, type=path, metavar="IMG", help="the painting")
    parser.add_argument("--data", required=True, type=path, metavar="DIR", help="a folder of photos, flat or nested")
    parser.add_argument(
        "--out", required=True, type=path, metavar="DIR", help="where checkpoints, previews and the result go"
    )
    parser.add_argument(
        "--vgg",
        type=path,
        metavar="FILE",
        help="VGG-16 weights (.npz, .pth or .safetensors); default: fetch torchvision's",
    )
    network = parser.add_argument_group("the network")
    network.add_argument("--preset", default="paper", choices=PRESETS, help="default: %(default)s")
    network.add_argument(
        "--residual", default="yes", choices=["yes", "no", "he"], help="kind of block (Figure 1); default: %(default)s"
    )
    network.add_argument(
        "--width", type=positive, metavar="N", help="channels of the first convolution; default: the preset's"
    )
    network.add_argument("--norm", choices=["batch", "instance"], help="default: the preset's")
    network.add_argument("--padding", choices=["zero", "reflect", "reflect40"], help="default: the preset's")
    network.add_argument("--upsample", choices=["transposed", "nearest"], help="default: the preset's")
    loss = parser.add_argument_group("the objective")
    loss.add_argument(
        "--style-layers",
        type=names,
        default="relu1_2,relu2_2,relu3_3,relu4_3",
        metavar="A,B,...",
        help="default: %(default)s",
    )
    loss.add_argument("--content-layer", default="relu2_2", metavar="L", help="default: %(default)s")
    loss.add_argument(
        "--convention",
        default="relative",
        choices=CONVENTIONS,
        help="what the weights multiply; default: %(default)s",
    )
    loss.add_argument("--content-weight", type=weight, metavar="X", help="default: the convention's")
    loss.add_argument("--style-weight", type=weight, metavar="X", help="default: the convention's")
    loss.add_argument("--tv-weight", type=weight, metavar="X", help="default: the convention's")
    loss.add_argument(
        "--style-size",
        type=positive,
        metavar="N",
        help="the painting's shorter side in pixels: larger, broader strokes; default: --size",
    )
    loop = parser.add_argument_group("the loop")
    loop.add_argument("--iterations", type=positive, default=40_000, metavar="N", help="default: %(default)s")
    loop.add_argument(
        "--size", type=positive, default=256, metavar="N", help="side of the training crops; default: %(default)s"
    )
    loop.add_argument("--batch", type=positive, default=4, metavar="N", help="default: %(default)s")
    loop.add_argument("--lr", type=positive_float, default=1e-3, metavar="X", help="Adam's step; default: %(default)s")
    loop.add_argument("--decay", action="store_true", help="lower the step to zero along a cosine; suits short runs")
    loop.add_argument("--seed", type=natural, default=0, metavar="N", help="default: %(default)s")
    loop.add_argument("--amp", action="store_true", help="autocast to bfloat16")
    loop.add_argument(
        "--workers", type=natural, default=1, metavar="N", help="processes that load photos; default: %(default)s"
    )
    loop.add_argument(
        "--checkpoint-every", type=positive, default=1000, metavar="N", help="iterations; default: %(default)s"
    )
    loop.add_argument("--resume", action="store_true", help="continue the run in --out")
    loop.add_argument("--tensorboard", action="store_true", help="also log to DIR/tensorboard")
    add_device(loop)
    parser.set_defaults(run=run_train)


def run_train(arguments: argparse.Namespace) -> int:
    from fastperc.training import train_style

    train_style(recipe_from(arguments), arguments.out, arguments.resume)
    return 0


def recipe_from(arguments: argparse.Namespace) -> Recipe:
    """The training recipe that ``fastperc train``'s arguments spell."""
    from dataclasses import fields

    from fastperc.devices import find_device
    from fastperc.training import Recipe

    given = vars(arguments)
    residual = {"yes": True, "no": False}.get(given["residual"], given["residual"])
    shape = {key: given[key] for key in ("width", "norm", "padding", "upsample") if given[key] is not None}
    recipe = {field.name: given[field.name] for field in fields(Recipe) if field.name in given}
    for key in ("style", "data", "vgg"):
        recipe[key] = recipe[key] and str(recipe[key].resolve())
    recipe["device"] = str(find_device(given["device"]))
    return Recipe(**recipe, network=dict(preset=given["preset"], residual=residual, **shape))


def add_optimize(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = commands.add_parser(
        "optimize",
        help="paint one photo by optimising its pixels (slow; the paper's baseline)",
        description="Optimises the picture itself under the training objective: minutes, not milliseconds, and no "
        "network to train.",
    )
    parser.add_argument("input", type=path, metavar="INPUT", help="the photo")
    parser.add_argument("-o", "--out", required=True, type=path, help="the picture to write")
    parser.add_argument("--style", required=True, type=path, metavar="IMG", help="the painting")
    parser.add_argument("--vgg", type=path, metavar="FILE", help="VGG-16 weights; default: fetch torchvision's")
    parser.add_argument(
        "--style-layers",
        type=names,
        default="relu1_2,relu2_2,relu3_3,relu4_3",
        metavar="A,B,...",
        help="default: %(default)s",
    )
    parser.add_argument("--content-layer", default="relu2_2", metavar="L", help="default: %(default)s")
    parser.add_argument("--content-weight", type=weight, metavar="X", help="beside a style weight of 1; default: 0.3")
    parser.add_argument("--tv-weight", type=weight, metavar="X", help="default: 0")
    parser.add_argument(
        "--style-size",
        type=positive,
        default=256,
        metavar="N",
        help="the painting's shorter side; default: %(default)s",
    )
    parser.add_argument(
        "--size", type=positive, metavar="N", help="resize so that the longer side has N pixels; default: as it is"
    )
    parser.add_argument("--iterations", type=positive, default=500, metavar="N", help="default: %(default)s")
    parser.add_argument("--optimizer", choices=["lbfgs", "adam"], default="lbfgs", help="default: %(default)s")
    parser.add_argument("--lr", type=positive_float, metavar="X", help="default: 1 for lbfgs, 0.02 for adam")
    add_device(parser)
    parser.set_defaults(run=run_optimize)


def run_optimize(arguments: argparse.Namespace) -> int:
    from fastperc.devices import find_device
    from fastperc.files import check_writable
    from fastperc.images import Photo, check_format, to_image, write_image
    from fastperc.optimize import optimize
    from fastperc.stylize import read_photo
    from fastperc.training import build_loss

    if os.path.realpath(arguments.out) == os.path.realpath(arguments.input):
        raise InputError(f"{arguments.out}: would overwrite the photo; name another output")
    check_writable(check_format(arguments.out))
    device = find_device(arguments.device)
    photo = read_photo(arguments.input, arguments.size)
    loss = build_loss(
        arguments.style,
        arguments.style_size,
        arguments.vgg,
        arguments.style_layers,
        arguments.content_layer,
        content_weight=arguments.content_weight,
        tv_weight=arguments.tv_weight,
    ).to(device)
    image = optimize(photo.tensor().to(device), loss, arguments.iterations, arguments.optimizer, arguments.lr)
    write_image(arguments.out, Photo(to_image(image[0]), photo.alpha, photo.metadata))
    return 0


def add_tune(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = commands.add_parser(
        "tune",
        help="measure which backend is the fastest here, and use it from then on",
        description="Times every backend of each operation on this machine, at the shapes of a training step, and "
        "keeps a table: from then on the fastest is used. Other sizes and batches add to the table.",
    )
    parser.add_argument(
        "--size", type=positive, default=256, metavar="N", help="side of the images; default: %(default)s"
    )
    parser.add_argument("--batch", type=positive, default=4, metavar="N", help="default: %(default)s")
    add_device(parser)
    table = parser.add_mutually_exclusive_group()
    table.add_argument("--show", action="store_true", help="print the table in use and where it lies; measure nothing")
    table.add_argument("--clear", action="store_true", help="remove the table; measure nothing")
    parser.set_defaults(run=run_tune)


def run_tune(arguments: argparse.Namespace) -> int:
    from fastperc import dispatch, tuning
    from fastperc.devices import find_device
    from fastperc.files import check_writable
    from fastperc.progress import track

    device = find_device(arguments.device)
    path = dispatch.path_of(device)
    if arguments.clear:
        print(f"removed {path}" if dispatch.clear(device) else f"there was no table, {path}")
        return 0
    if arguments.show:
        table = dispatch.table(device)
        print(f"{tuning.report(table.times)}\n{table.path}, {table.date}" if table else f"there is no table, {path}")
        return 0
    check_writable(path)
    cases = list(tuning.cases(arguments.batch, arguments.size))
    times = tuning.tune(device, track(cases, "tuning", len(cases)))
    if not times:
        print(f"nothing to choose from: plain PyTorch alone runs on {device}")
        return 0
    dispatch.save(device, times)
    print(f"{tuning.report(times)}\n{path}")
    return 0


def add_bench(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = commands.add_parser(
        "bench",
        help="time pictures on this machine",
        description="Times a style network on this machine: in plain PyTorch, and as `fastperc stylize` runs it.",
    )
    add_model(parser)
    parser.add_argument(
        "--sizes",
        type=sizes,
        default="256,512,1280x720",
        metavar="A,B,...",
        help="of the images, N pixels a side or WIDTHxHEIGHT; default: %(default)s",
    )
    add_device(parser)
    parser.set_defaults(run=run_bench)


def run_bench(arguments: argparse.Namespace) -> int:
    from fastperc.bench import report
    from fastperc.devices import find_device

    device = find_device(arguments.device)
    print(report(load_style(model_file(arguments), device), arguments.sizes, device))
    return 0


def run_doctor(arguments: argparse.Namespace) -> int:
    from fastperc.doctor import report

    print(report())
    return 0


def add_device(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1, ...; default: a GPU if there is one")
