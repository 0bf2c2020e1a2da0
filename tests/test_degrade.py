"""The small photos that super-resolution learns from: bicubic resampling and Gaussian blur."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import error
from pictures import picture
from PIL import Image

from fastperc import reference
from fastperc.photos.photo import Photo


@pytest.mark.parametrize("size", [(12, 9), (31, 50), (80, 64)], ids=lambda size: f"{size[0]}x{size[1]}")
def test_bicubic_is_pillows(size):
    """Pillow's cubic is the a = -½ one too, and antialiased."""
    channel = picture(64, 48).convert("L").convert("F")
    expected = torch.from_numpy(np.array(channel.resize(size[::-1], Image.Resampling.BICUBIC)))
    x = torch.from_numpy(np.array(channel))[None, None]
    assert error(reference.bicubic(x, size)[0, 0], expected) < 1e-5


def test_half_precision_is_resampled_in_float32():
    x = torch.rand(1, 3, 16, 16).half()
    assert torch.equal(reference.bicubic(x, (64, 64)), reference.bicubic(x.float(), (64, 64)))


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.5])
def test_gaussian_blur_is_the_sum_over_a_gaussian(sigma):
    """Against the two-dimensional sum, pixel by pixel, over the image with reflected borders."""
    x = torch.rand(2, 3, 14, 17, dtype=torch.float64)
    radius = int(np.ceil(4 * sigma))
    wide = torch.from_numpy(np.pad(x.numpy(), ((0, 0), (0, 0), (radius, radius), (radius, radius)), mode="reflect"))
    offsets = range(-radius, radius + 1)
    weights = {(i, j): np.exp(-(i * i + j * j) / (2 * sigma**2)) for i in offsets for j in offsets}
    expected = sum(
        weight * wide[:, :, radius + i : radius + i + 14, radius + j : radius + j + 17]
        for (i, j), weight in weights.items()
    ) / sum(weights.values())
    assert error(reference.gaussian_blur(x, sigma), expected) < 1e-12


@pytest.mark.parametrize("scale", [2, 4, 8])
def test_degraded_photos_are_small_and_have_levels(scale):
    x = Photo(picture(64, 48)).tensor()
    sharp, blurred = (reference.degrade(x, scale, blur) for blur in (0.0, 1.0))
    assert sharp.shape == (1, 3, 48 // scale, 64 // scale)
    for small in (sharp, blurred):
        assert torch.equal((small * 255).round() / 255, small)
    assert reference.tv_loss(blurred) < reference.tv_loss(sharp)
