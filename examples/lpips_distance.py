"""LPIPS, the perceptual distance of two pictures of one size; and as a loss that a picture is optimised by.

python examples/lpips_distance.py photo.jpg compressed.jpg
python examples/lpips_distance.py photo.jpg compressed.jpg --steps 100 -o closer.png

LPIPS' own weights, 7 KB, are those of an installed `lpips` or `torchmetrics`, or a file.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastperc import LPIPS, read_image


def tensor(path: Path) -> Tensor:
    """RGB in 0–1, [1, 3, H, W]."""
    return torch.from_numpy(np.array(read_image(path).convert("RGB"))).permute(2, 0, 1)[None] / 255


def main() -> None:
    parser = argparse.ArgumentParser(description="The perceptual distance of two pictures.")
    parser.add_argument("target", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--vgg", help="VGG-16's weights; default: torchvision's, downloaded once")
    parser.add_argument("--channel-weights", help="LPIPS' own weights")
    parser.add_argument("--steps", type=int, default=0, help="of moving the picture closer to the target")
    parser.add_argument("-o", "--out", type=Path, default=Path("closer.png"))
    arguments = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    lpips = LPIPS(weights=arguments.vgg, channel_weights=arguments.channel_weights, normalize=True, reduction="mean")
    lpips.to(device)
    target, picture = tensor(arguments.target).to(device), tensor(arguments.picture).to(device)
    with torch.no_grad():  # a measurement needs no gradients
        print(f"{lpips(picture, target).item():.4f}")

    features = lpips.prepare(target)  # of a target that stays: computed once
    picture.requires_grad_()
    optimizer = torch.optim.Adam([picture], lr=0.01)
    for _ in range(arguments.steps):
        optimizer.zero_grad()
        distance = lpips(picture, features)
        distance.backward()
        optimizer.step()
        with torch.no_grad():
            picture.clamp_(0, 1)
    if arguments.steps:
        levels = (255 * picture.detach()[0]).round().byte().permute(1, 2, 0)
        Image.fromarray(levels.cpu().numpy()).save(arguments.out)
        print(f"{distance.item():.4f} after {arguments.steps} steps: {arguments.out}")


if __name__ == "__main__":
    main()
