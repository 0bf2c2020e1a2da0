"""Trains a style by the library's own loop, as `fastperc train` does: with previews, checkpoints and resuming.

python examples/train.py --style painting.jpg --data photos/ --out runs/mine
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from fastperc import freeze, load
from fastperc.training import StyleRecipe, train


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains a style.")
    parser.add_argument("--style", required=True, help="the painting")
    parser.add_argument("--data", required=True, help="a folder of photos")
    parser.add_argument("--out", required=True, type=Path, help="the folder of the run")
    parser.add_argument("--vgg", help="VGG-16's weights; default: torchvision's, downloaded once")
    parser.add_argument("--iterations", type=int, default=40_000)
    parser.add_argument("--size", type=int, default=256, help="pixels of the training crops' sides")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--resume", action="store_true", help="go on after a stop")
    arguments = parser.parse_args()

    recipe = StyleRecipe(  # everything that decides the run; what is not named here has the paper's value
        style=arguments.style,
        data=arguments.data,
        vgg=arguments.vgg,
        network={"preset": "instance", "padding": "reflect", "upsample": "nearest"},  # no borders, no checkerboard
        iterations=arguments.iterations,
        size=arguments.size,
        batch=arguments.batch,
        decay=True,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
    train(recipe, arguments.out, resume=arguments.resume)  # Ctrl-C saves and stops

    engine = freeze(load(arguments.out / "model.safetensors"))
    engine(arguments.style).save(arguments.out / "painted.jpg")


if __name__ == "__main__":
    main()
