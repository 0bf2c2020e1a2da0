"""Paints a photo in Python, in the three forms that an engine takes.

python examples/stylize.py photo.jpg -o painted.jpg --style starry_night --size 1024
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image

from fastperc import freeze, load, read_image


def main() -> None:
    parser = argparse.ArgumentParser(description="Paints a photo.")
    parser.add_argument("photo", type=Path)
    parser.add_argument("-o", "--out", type=Path, default=Path("painted.jpg"))
    parser.add_argument("--style", default="great_wave", help="a style that ships, or a file of a network")
    parser.add_argument("--size", type=int, help="pixels of the longer side; default: the photo's")
    parser.add_argument("--strength", type=float, default=1.0, help="0 is the photo, 1 the painting")
    arguments = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    engine = freeze(load(arguments.style), device=device)  # once; then it paints any number of photos, of any size

    if arguments.size is None and arguments.strength == 1:
        painting = engine(arguments.photo)  # 1. a path gives a PIL image
    else:
        photo = read_image(arguments.photo)  # upright and in sRGB, as the engine reads a path
        if arguments.size:
            scale = arguments.size / max(photo.size)
            photo = photo.resize([round(scale * side) for side in photo.size], Image.Resampling.LANCZOS)
        painting = Image.blend(photo, engine(photo), arguments.strength)  # 2. a PIL image gives a PIL image
    painting.convert("RGB").save(arguments.out)
    print(f"{arguments.out}: {painting.width}×{painting.height}")

    # 3. A batch in 0–1, [N, 3, H, W], gives such a batch; its values may leave 0–1 a little.
    photos = torch.rand(2, 3, 96, 128)
    print(engine(photos).clamp(0, 1).shape)


if __name__ == "__main__":
    main()
