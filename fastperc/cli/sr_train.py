"""``fastperc sr train``."""

from __future__ import annotations

import argparse
from typing import Any

from fastperc.cli.options import weight
from fastperc.cli.training_options import (
    RESULTS,
    SEVERAL_GPUS,
    STOPPING,
    add_init,
    add_loop,
    add_training,
    recipe_of,
    resume_command,
    separate_defaults,
)
from fastperc.presets import ARCHITECTURES, SCALES


def add(commands: argparse._SubParsersAction[Any]) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "train",
        help="train a network that enlarges photos",
        description="Trains a network to restore photos that were blurred and made small.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  fastperc sr train --data photos/ --out runs/pixel --device cuda --amp\n"
        "  fastperc sr train --data photos/ --out runs/feature --loss feature --init runs/pixel/model.safetensors\n"
        "  fastperc sr train --resume --out runs/pixel    continue after a stop; on a CPU, bit for bit\n\n"
        + SEVERAL_GPUS.format(command="sr train")
        + f"{RESULTS}\n{STOPPING}",
    )
    add_training(parser)
    add_init(parser)
    parser.add_argument(
        "--scale", type=int, default=4, choices=SCALES, help="how many times to enlarge; default: %(default)s"
    )
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
        "--upsample",
        choices=["transposed", "nearest"],
        help="how the paper's network doubles the size: transposed convolutions, or convolutions after "
        "nearest-neighbour resizing; default: transposed, as in the paper",
    )
    parser.add_argument(
        "--blur",
        type=weight,
        default=1.0,
        metavar="X",
        help="sigma in pixels of the Gaussian blur before photos are made small; default: %(default)s",
    )
    add_loop(parser, iterations=200_000, size=288)
    parser.set_defaults(run=run)
    separate_defaults(parser)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command and returns its exit status."""
    from fastperc.training.loop import train
    from fastperc.training.super_resolution import SuperResolutionRecipe

    recipe = recipe_of(SuperResolutionRecipe, arguments, arguments.out)
    train(recipe, arguments.out, arguments.resume, resume_command("sr train", arguments.out))
    return 0
