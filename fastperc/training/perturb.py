"""Small random changes to the photos that a network sees in training, and the loss that makes it ignore them.

Everything here can be recorded in a CUDA graph: random numbers are drawn on the device, and nothing waits for it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fastperc.losses import PerceptualLoss, PerceptualTerms

SHIFT = 4  # pixels: how far a copy of a photo is shifted at most, in each direction
LEAST_NOISE = 0.02  # standard deviation of the noise on that copy where less is asked for


def seed_step(device: torch.device, seed: int, step: int, rank: int) -> None:
    """Seeds PyTorch's random numbers on ``device`` for iteration ``step``, so that a resumed run draws the same."""
    bits = int(np.random.SeedSequence((seed, 2, step, rank)).generate_state(1, np.uint64)[0] >> 1)
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(bits)
    elif device.type == "cpu":
        torch.default_generator.manual_seed(bits)
    else:
        torch.manual_seed(bits)


def add_noise(photos: Tensor, deviation: float) -> Tensor:
    """``photos`` [N, 3, H, W] with Gaussian noise of that standard deviation; values may leave 0–1."""
    return photos + deviation * torch.randn_like(photos) if deviation else photos


def shifted(photos: Tensor, shift: Tensor) -> Tensor:
    """``photos`` [N, 3, H, W] moved by ``shift``, pixels down and to the right as int64 [2], reflected at the borders.

    Returns the same shape in channels-last memory.
    """
    for dim, offset in zip((2, 3), shift):
        last = photos.shape[dim] - 1
        source = (torch.arange(last + 1, device=photos.device) - offset).abs()  # reflected at the near border
        photos = photos.index_select(dim, last - (last - source).abs())  # and at the far one
    return photos.contiguous(memory_format=torch.channels_last)


def shifted_back(pictures: Tensor, shift: Tensor) -> Tensor:
    """``pictures`` [N, 3, H, W] moved back by ``shift``, int64 [2], without ``SHIFT`` pixels at each border."""
    for dim, offset in zip((2, 3), shift):
        inner = torch.arange(SHIFT, pictures.shape[dim] - SHIFT, device=pictures.device)
        pictures = pictures.index_select(dim, inner + offset)
    return pictures


class StableTerms(NamedTuple):
    """The weighted terms of a :class:`StabilityLoss` and their sum; scalars."""

    total: Tensor
    content: Tensor
    style: Tensor
    tv: Tensor
    stability: Tensor


class StabilityLoss(nn.Module):
    """A perceptual loss, and how much a picture changes when its photo changes a little.

    :meth:`perturb` makes a batch of twice the size: the photos, and copies of them that are shifted by up to ``SHIFT``
    pixels and have noise. The stability term is ``weight`` times the mean squared difference between the pictures of
    the two, the second shifted back, where both show the same.

    Args:
        loss: the loss of the pictures of the photos themselves.
        weight: of the stability term; it multiplies a mean over pixels and channels in 0–1.
        noise: standard deviation of the noise on the photos in RGB 0–1. Their copies get at least ``LEAST_NOISE``.
    """

    shift: Tensor

    def __init__(self, loss: PerceptualLoss, weight: float, noise: float = 0.0) -> None:
        super().__init__()
        self.loss, self.weight, self.noise = loss, weight, noise
        self.register_buffer("shift", torch.zeros(2, dtype=torch.int64))  # down and right, of the current batch

    def perturb(self, photos: Tensor) -> Tensor:
        """``photos`` [N, 3, H, W] in 0–1 and their copies, [2N, 3, H, W]."""
        self.shift.random_(-SHIFT, SHIFT + 1)
        copies = shifted(photos, self.shift)
        return torch.cat([add_noise(photos, self.noise), add_noise(copies, max(self.noise, LEAST_NOISE))])

    def forward(self, output: Tensor, photos: Tensor) -> StableTerms:
        """The terms for ``output`` [2N, 3, H, W], the pictures of what :meth:`perturb` returned for ``photos``."""
        pictures, copies = output.chunk(2)
        terms: PerceptualTerms = self.loss(pictures, photos)
        inside = pictures[:, :, SHIFT:-SHIFT, SHIFT:-SHIFT]
        stability = self.weight * (shifted_back(copies, self.shift).float() - inside.float()).square().mean()
        return StableTerms(*terms._replace(total=terms.total + stability), stability)
