"""PSNR and SSIM against torchmetrics, and luma against MATLAB's values."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torchmetrics.functional import image as metrics

from fastperc.evaluation import luma, psnr, ssim


@pytest.mark.parametrize("shape", [(1, 1, 6, 11), (2, 3, 31, 50), (1, 1, 65, 40)], ids=str)
@pytest.mark.parametrize("data_range", [1.0, 255.0])
def test_psnr_and_ssim_equal_those_of_torchmetrics(shape, data_range):
    x = torch.rand(shape, dtype=torch.float64) * data_range
    y = (x + 0.1 * data_range * torch.randn_like(x)).clamp(0, data_range)
    expected = metrics.peak_signal_noise_ratio(y, x, data_range=data_range)
    assert abs(psnr(y, x, data_range) - expected) < 1e-5
    expected = metrics.structural_similarity_index_measure(y, x, data_range=data_range)
    assert abs(ssim(y, x, data_range) - expected) < 1e-9


def test_equal_images():
    x = torch.rand(20, 30)
    assert psnr(x, x) == math.inf and ssim(x, x) == 1


def test_half_precision_input_is_computed_in_float64():
    x, y = torch.rand(40, 40).half() * 255, torch.rand(40, 40).half() * 255
    error = np.mean((x.numpy().astype(np.float64) - y.numpy().astype(np.float64)) ** 2)
    assert abs(psnr(x, y, 255).item() - 10 * math.log10(255**2 / error)) < 1e-12


@pytest.mark.parametrize("measure", [psnr, ssim])
def test_shapes_that_differ_are_refused(measure):
    with pytest.raises(ValueError, match=r"equal shapes, got \[8, 9\] and \[9, 8\]"):
        measure(torch.rand(8, 9), torch.rand(9, 8))


def test_ssim_refuses_images_that_are_too_small():
    with pytest.raises(ValueError, match="at least 6"):
        ssim(torch.rand(5, 60), torch.rand(5, 60))


def test_luma_equals_that_of_matlab():
    """rgb2ycbcr's Y of the corners of the colour cube; of a gray image the level itself."""
    corners = torch.tensor([[[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255]]], dtype=torch.uint8)
    assert luma(corners).tolist() == [[16, 235, 81, 145, 41]]
    assert luma(corners, gray=True).tolist() == [[0, 255, 255, 0, 0]]
