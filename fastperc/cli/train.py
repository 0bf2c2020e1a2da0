"""``fastperc train``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from fastperc.cli.options import SEVERAL_GPUS, add_init, add_style_training, recipe_fields

if TYPE_CHECKING:
    from fastperc.training.style import StyleRecipe


def add(commands: argparse._SubParsersAction[Any]) -> None:
    parser = commands.add_parser(
        "train",
        help="train a style of your own",
        description="Trains a network to paint in the style of one image, from a folder of any photos.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  fastperc train --style painting.jpg --data photos/ --out runs/mine --device cuda --amp\n"
        "  fastperc train ... --resume                             go on after a stop, bit for bit on the CPU\n"
        + SEVERAL_GPUS.format(command="train")
        + "Ctrl-C saves and stops. The result is DIR/model.safetensors; DIR/previews shows how it came about,\n"
        "DIR/losses.csv what each iteration's loss was.",
    )
    add_style_training(parser).add_argument(
        "--residual", default="yes", choices=["yes", "no", "he"], help="kind of block (Figure 1); default: %(default)s"
    )
    add_init(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from fastperc.training.loop import train

    train(recipe_from(arguments), arguments.out, arguments.resume)
    return 0


def recipe_from(arguments: argparse.Namespace) -> StyleRecipe:
    """The recipe that the arguments spell."""
    from fastperc.training.style import StyleRecipe

    given = vars(arguments)
    residual = {"yes": True, "no": False}.get(given["residual"], given["residual"])
    shape = {key: given[key] for key in ("width", "norm", "padding", "upsample") if given[key] is not None}
    network = dict(preset=given["preset"], residual=residual, **shape)
    return StyleRecipe(**recipe_fields(StyleRecipe, given), network=network)
