"""A small network's training steps on a CPU, which several tests compare with."""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import torch
from pictures import picture
from torch import Tensor

from fastperc import TransformNet, reference
from fastperc.photos.photo import Photo
from fastperc.training.step import TrainStep, adam


class Terms(NamedTuple):
    total: Tensor
    pixels: Tensor
    tv: Tensor


def objective(output, photos):
    pixels, tv = (output - photos).square().mean(), reference.tv_loss(output, reduction="mean")
    return Terms(pixels + tv, pixels, tv)


def batches(count, size=32):
    """uint8 [2, 3, size, size] each."""
    pairs = [[Photo(picture(size, size, 2 * i + j)).levels() for j in (0, 1)] for i in range(count)]
    return [torch.stack(pair).permute(0, 3, 1, 2) for pair in pairs]


def build(device="cpu", make=lambda: TransformNet("paper", width=4)):
    torch.manual_seed(1)
    return make().to(device, memory_format=torch.channels_last)


def rate(i):
    return 1e-3 / (1 + i)


def trained(count, device="cpu", amp=False, degrade=None, prepare=None, make=None):
    """The network after ``count`` steps, and the terms of each."""
    net = build(device, make) if make else build(device)
    run = TrainStep(net, objective, adam(net.parameters(), 1.0, torch.device(device)), amp, degrade)
    if prepare is not None:
        prepare(run)
    terms = [torch.stack(run(photos, rate(i))) for i, photos in enumerate(batches(count))]
    return net, torch.stack(terms).cpu(), run


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


class FixedAddress:
    """A stand-in for the transfer to a GPU: photos always lie at the same address."""

    def __init__(self):
        self.levels = torch.empty(2, 3, 32, 32, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)

    def to_device(self, photos):
        return self.levels.copy_(photos)

    def compute_stream(self):
        return nullcontext()
