"""``fastperc train``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastperc.cli.training_options import (
    RESULTS,
    SEVERAL_GPUS,
    STOPPING,
    add_init,
    add_style_training,
    recipe_of,
    resume_command,
    separate_defaults,
)

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
        "  fastperc train --resume --out runs/mine        continue after a stop; on a CPU, bit for bit\n\n"
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
    separate_defaults(parser)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command and returns its exit status."""
    from fastperc.training.loop import train

    recipe = recipe_from(arguments, arguments.out)
    train(recipe, arguments.out, arguments.resume, resume_command("train", arguments.out))
    return 0


def recipe_from(arguments: argparse.Namespace, run: Path | None = None) -> StyleRecipe:
    """The training recipe that the options describe; with ``--resume`` the rest is as in the folder ``run``."""
    from fastperc.training.style import StyleRecipe

    return recipe_of(StyleRecipe, arguments, run, network_fields)


def network_fields(options: Mapping[str, Any], saved: StyleRecipe | None) -> dict[str, Any]:
    """The field ``network`` of a recipe: ``options`` of the network, over those of a ``saved`` recipe."""
    network = {key: options[key] for key in ("preset", "width", "norm", "padding", "upsample") if options.get(key)}
    if "residual" in options:
        network["residual"] = {"yes": True, "no": False}.get(options["residual"], options["residual"])
    return {"network": (saved.network if saved else {}) | network}
