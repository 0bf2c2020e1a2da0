"""How long an iteration of `fastperc train` takes, photos and checkpoints included, on random photos and VGG weights.

    python benchmarks/training_speed.py [--iterations N] [--size N] [--batch N]

Prints the time of the paper's 40,000 iterations, extrapolated from the iterations after the first 100. In those kernels
are compiled and the step becomes a CUDA graph.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from networks import vgg_file
from PIL import Image

from fastperc.training.loop import train
from fastperc.training.style import StyleRecipe

WARM_UP = 100


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=4000 if cuda else 20, metavar="N", help="%(default)s")
    parser.add_argument("--size", type=int, default=256, metavar="N", help="%(default)s")
    parser.add_argument("--batch", type=int, default=4, metavar="N", help="%(default)s")
    arguments = parser.parse_args()
    warm_up = WARM_UP if cuda else 2
    with tempfile.TemporaryDirectory() as folder:
        photos = Path(folder, "photos")
        photos.mkdir()
        rng = np.random.default_rng(0)
        for i in range(200):
            coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
            coarse.resize((640, 480), Image.Resampling.BICUBIC).save(photos / f"{i}.jpg")

        def seconds(iterations: int) -> float:
            recipe = StyleRecipe(
                data=str(photos),
                style=str(photos / "0.jpg"),
                vgg=str(vgg_file()),
                iterations=iterations,
                size=arguments.size,
                batch=arguments.batch,
                amp=cuda,
                device="cuda" if cuda else "cpu",
            )
            began = time.perf_counter()
            train(recipe, Path(folder, "run"), resume=iterations > warm_up)
            return time.perf_counter() - began

        beginning = seconds(warm_up)
        rest = seconds(warm_up + arguments.iterations)
    each = rest / arguments.iterations
    print(
        f"{beginning:.1f} s for the first {warm_up} iterations, then {1000 * each:.3g} ms each: "
        f"40,000 in {40000 * each:.0f} s"
    )


if __name__ == "__main__":
    main()
