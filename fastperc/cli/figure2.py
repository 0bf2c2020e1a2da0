"""``fastperc figure2``."""

from __future__ import annotations

import argparse
from typing import Any

from fastperc.cli.training_options import (
    SEVERAL_GPUS,
    STOPPING,
    add_style_training,
    resume_command,
    separate_defaults,
)


def add(commands: argparse._SubParsersAction[Any]) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "figure2",
        help="repeat the paper's Figure 2: train with and without residual connections",
        description="Trains a style network with residual connections and one without, in the same way,\n"
        "and draws their losses by iteration, as in the paper's Figure 2.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  fastperc figure2 --style great_wave.jpg --data photos/ --out runs/figure2 --device cuda --amp\n"
        "  fastperc figure2 --resume --out runs/figure2            continue after a stop\n\n"
        + SEVERAL_GPUS.format(command="figure2")
        + f"Results: the runs are DIR/residual and DIR/non-residual, the figure is DIR/figure2.png.\n{STOPPING}",
    )
    add_style_training(parser)
    parser.set_defaults(run=run)
    separate_defaults(parser)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command and returns its exit status."""
    from fastperc.cli.train import recipe_from
    from fastperc.files import check_overwrites
    from fastperc.photos.folders import search
    from fastperc.training.figure2 import RUNS, table, train_both, with_blocks
    from fastperc.training.resume import check_inputs
    from fastperc.training.run_folder import FIGURE, RESIDUAL, is_output

    recipe = recipe_from(arguments, arguments.out / RESIDUAL)
    photos = (path for path in search(recipe.data).images if not is_output(path))
    check_overwrites([arguments.out / FIGURE], [recipe.style, *filter(None, [recipe.vgg]), *photos])
    for name, residual in RUNS.items():  # before the first is trained
        check_inputs(with_blocks(recipe, residual), arguments.out / name, arguments.resume)
    command = resume_command("figure2", arguments.out)
    losses = train_both(recipe, arguments.out, arguments.resume, command)
    if losses is not None:
        print(table(losses))
    return 0
