"""Runs and trains a network that fastperc did not write: `freeze` for pictures, `accelerate` for training.

python examples/freeze_your_network.py --size 512

Put your own network in the place of `Painter`; it stays as it is.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastperc import accelerate, freeze


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.ReflectionPad2d(1),
            nn.Conv2d(channels, channels, 3),
            nn.InstanceNorm2d(channels, affine=True),
            nn.ReLU(),
            nn.ReflectionPad2d(1),
            nn.Conv2d(channels, channels, 3),
            nn.InstanceNorm2d(channels, affine=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class Painter(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 9, padding=4)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(*(Block(2 * width) for _ in range(3)))
        self.up = nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1)
        self.last = nn.Conv2d(width, 3, 9, padding=4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.down(torch.relu(self.first(x))))
        return torch.sigmoid(self.last(torch.relu(self.up(self.blocks(x)))))


def milliseconds(call: Callable[[], object], runs: int) -> float:
    """The shortest of some runs, after two for the warm-up."""
    times = []
    for _ in range(runs + 2):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1000 * min(times[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description="Freezes and accelerates a network.")
    parser.add_argument("--size", type=int, default=256, help="pixels of the image's sides")
    parser.add_argument("--runs", type=int, default=5, help="of each measurement")
    arguments = parser.parse_args()

    net = Painter().eval()
    image = torch.rand(1, 3, arguments.size, arguments.size)

    fast = freeze(net)  # a copy of the weights: after more training, freeze again
    with torch.inference_mode():
        error = (fast(image) - net(image)).abs().max().item()  # the first call of a shape times both
        plain = milliseconds(lambda: net(image), arguments.runs)
    frozen = milliseconds(lambda: fast(image), arguments.runs)
    print(f"frozen: {frozen:.1f} ms, PyTorch {plain:.1f} ms; the results differ by {error:.1e}")
    print(fast.explain())  # what runs each layer, and why

    net.train()
    training_net = accelerate(net)  # the same parameters, under the same names
    optimizer = torch.optim.Adam(training_net.parameters())

    def step(model: nn.Module) -> None:
        optimizer.zero_grad()
        (model(image) - image).square().mean().backward()
        optimizer.step()

    accelerated = milliseconds(lambda: step(training_net), arguments.runs)
    plain = milliseconds(lambda: step(net), arguments.runs)
    print(f"training step: {accelerated:.1f} ms, PyTorch {plain:.1f} ms")


if __name__ == "__main__":
    main()
