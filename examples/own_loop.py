"""Trains a style network in a loop of your own, with fastperc's network and loss.

python examples/own_loop.py --style painting.jpg --data photos/ -o mine.safetensors
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastperc import PerceptualLoss, TransformNet, VGG16Features, read_image, save


def tensor(image: Image.Image) -> Tensor:
    """RGB in 0–1, [3, H, W]."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) / 255


class Photos(Dataset):
    """The photos of a folder, each cropped to a square in its middle."""

    def __init__(self, folder: Path, size: int) -> None:
        self.paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
        self.size = size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        return tensor(ImageOps.fit(read_image(self.paths[index]), (self.size, self.size)))


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains a style.")
    parser.add_argument("--style", type=Path, required=True, help="the painting")
    parser.add_argument("--data", type=Path, required=True, help="a folder of photos")
    parser.add_argument("-o", "--out", type=Path, default=Path("mine.safetensors"))
    parser.add_argument("--vgg", help="VGG-16's weights; default: torchvision's, downloaded once")
    parser.add_argument("--steps", type=int, default=2_000)
    parser.add_argument("--size", type=int, default=256, help="pixels of the crops' sides")
    parser.add_argument("--batch", type=int, default=4)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    net = TransformNet("instance").to(device, memory_format=torch.channels_last)
    painting = tensor(ImageOps.contain(read_image(arguments.style), (2 * arguments.size, 2 * arguments.size)))
    loss = PerceptualLoss(VGG16Features(arguments.vgg), painting[None]).to(device)  # it has no trainable parameters
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    dataset = Photos(arguments.data, arguments.size)
    if not len(dataset):
        parser.error(f"{arguments.data} holds no photos")
    loader = DataLoader(dataset, arguments.batch, shuffle=True)

    step = 0
    while step < arguments.steps:
        for photos in loader:
            photos = photos.to(device)
            terms = loss(net(photos), photos)  # content, style, tv, and their weighted sum, total
            optimizer.zero_grad()
            terms.total.backward()
            optimizer.step()

            step += 1
            if step % 50 == 0 or step == arguments.steps:  # reading a number makes the CPU wait for the GPU
                print(f"{step:6}  content {terms.content.item():.4f}  style {terms.style.item():.4f}")
            if step == arguments.steps:
                break

    save(net, arguments.out)
    print(f"fastperc stylize photo.jpg --model {arguments.out}")


if __name__ == "__main__":
    main()
