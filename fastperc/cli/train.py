"""``fastperc train``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from fastperc.cli.training_options import RESULTS, SEVERAL_GPUS, STOPPING, add_init, add_style_training, recipe_fields

if TYPE_CHECKING:
    from fastperc.training.style import StyleRecipe


def add(commands: argparse._SubParsersAction[Any]) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "train",
        help="train a style of your own",
        description="Trains a network to paint in the style of one image. Any folder of photos serves as data.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  fastperc train --style painting.jpg --data photos/ --out runs/mine --device cuda --amp\n"
        "  fastperc train ... --resume                    continue after a stop; on a CPU, bit for bit\n\n"
        + SEVERAL_GPUS.format(command="train")
        + f"{RESULTS}\n{STOPPING}",
    )
    add_style_training(parser).add_argument(
        "--residual",
        default="yes",
        choices=["yes", "no", "he"],
        help="residual connections; he: with a ReLU after the addition, as in He et al.; default: %(default)s",
    )
    add_init(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command and returns its exit status."""
    from fastperc.training.loop import train

    train(recipe_from(arguments), arguments.out, arguments.resume)
    return 0


def recipe_from(arguments: argparse.Namespace) -> StyleRecipe:
    """The training recipe that the options describe."""
    from fastperc.training.style import StyleRecipe

    given = vars(arguments)
    residual = {"yes": True, "no": False}.get(given["residual"], given["residual"])
    shape = {key: given[key] for key in ("width", "norm", "padding", "upsample") if given[key] is not None}
    network = dict(preset=given["preset"], residual=residual, **shape)
    return StyleRecipe(**recipe_fields(StyleRecipe, given), network=network)
