"""``fastperc figure2``."""

from __future__ import annotations

import argparse
from typing import Any

from fastperc.cli.options import SEVERAL_GPUS, add_style_training


def add(commands: argparse._SubParsersAction[Any]) -> None:
    parser = commands.add_parser(
        "figure2",
        help="the paper's Figure 2: train with and without residual connections, compare the losses",
        description="Trains a style network and its twin without residual connections, one after the other and\n"
        "alike, and draws their losses by iteration, as in the paper's Figure 2.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  fastperc figure2 --style great_wave.jpg --data photos/ --out runs/figure2 --device cuda --amp\n"
        "  fastperc figure2 ... --resume                           go on after a stop\n"
        + SEVERAL_GPUS.format(command="figure2")
        + "The runs are DIR/residual and DIR/non-residual, the figure is DIR/figure2.png.",
    )
    add_style_training(parser)
    parser.set_defaults(run=run, residual="yes")


def run(arguments: argparse.Namespace) -> int:
    from fastperc.cli.train import recipe_from
    from fastperc.training.figure2 import table, train_both

    losses = train_both(recipe_from(arguments), arguments.out, arguments.resume)
    if losses is not None:
        print(table(losses))
    return 0
