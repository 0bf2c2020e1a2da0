"""``fastperc train``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from fastperc.options import add_layers, add_loop, add_training, path, positive, recipe_fields, weight
from fastperc.presets import CONVENTIONS, PRESETS

if TYPE_CHECKING:
    from fastperc.style_training import StyleRecipe


def add(commands: argparse._SubParsersAction[Any]) -> None:
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
    add_training(parser)
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
    add_layers(loss)
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
    add_loop(parser, iterations=40_000, size=256)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from fastperc.training import train

    train(recipe_from(arguments), arguments.out, arguments.resume)
    return 0


def recipe_from(arguments: argparse.Namespace) -> StyleRecipe:
    """The recipe that the arguments spell."""
    from fastperc.style_training import StyleRecipe

    given = vars(arguments)
    residual = {"yes": True, "no": False}.get(given["residual"], given["residual"])
    shape = {key: given[key] for key in ("width", "norm", "padding", "upsample") if given[key] is not None}
    network = dict(preset=given["preset"], residual=residual, **shape)
    return StyleRecipe(**recipe_fields(StyleRecipe, given), network=network)
