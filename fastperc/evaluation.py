"""Image quality metrics: PSNR and SSIM, and the luma on which super-resolution papers measure them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Score(NamedTuple):
    """The quality of a picture against its ground truth."""

    psnr: float  # dB
    ssim: float

    def __str__(self) -> str:
        return f"{self.psnr:.2f} / {self.ssim:.4f}"


def psnr(x: Tensor, target: Tensor, data_range: float = 1.0) -> Tensor:
    """Peak signal-to-noise ratio in dB over all elements: 10 · log₁₀(``data_range``² / mean squared error).

    Args:
        x, target: tensors of any equal shape and any dtype; computed in float64.
        data_range: largest minus smallest possible value: 1 for RGB in 0–1, 255 for levels.

    Returns:
        A float64 scalar; infinite for equal tensors.

    Raises:
        ValueError: the shapes differ.
    """
    _check_shapes(x, target)
    error = (x.double() - target.double()).square().mean()
    return 10 * torch.log10(data_range**2 / error)


def ssim(x: Tensor, target: Tensor, data_range: float = 1.0) -> Tensor:
    """Structural similarity (Wang et al. 2004) with an 11×11 Gaussian window, σ = 1.5, around each pixel.

    Args:
        x, target: [..., H, W] of any dtype, H and W at least 6; computed in float64. Borders are padded by reflection.
        data_range: as for :func:`psnr`.

    Returns:
        The mean over all pixels, a float64 scalar; 1 for equal tensors.

    Raises:
        ValueError: the shapes differ or are too small.
    """
    _check_shapes(x, target)
    if x.dim() < 2 or min(x.shape[-2:]) < 6:
        raise ValueError(f"ssim needs [..., H, W] with H and W of at least 6, got {list(x.shape)}")
    offsets = torch.arange(-5, 6, dtype=torch.float64, device=x.device)
    kernel = torch.exp(-0.5 * (offsets / 1.5) ** 2)
    kernel = kernel / kernel.sum()

    def mean(values: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(values, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))

    planes = (values.double().reshape(-1, 1, *values.shape[-2:]) for values in (x, target))
    x, y = (F.pad(plane, (5, 5, 5, 5), mode="reflect") for plane in planes)
    mean_x, mean_y = mean(x), mean(y)
    variance_x, variance_y = mean(x * x) - mean_x**2, mean(y * y) - mean_y**2
    covariance = mean(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return (luminance * structure).mean()


def _check_shapes(x: Tensor, target: Tensor) -> None:
    if x.shape != target.shape:
        raise ValueError(f"needs equal shapes, got {list(x.shape)} and {list(target.shape)}")


def luma(levels: Tensor, gray: bool = False) -> Tensor:
    """BT.601 luma in 16–235, rounded, as MATLAB's rgb2ycbcr computes it.

    Args:
        levels: RGB, uint8 [H, W, 3].
        gray: return the levels of the first channel instead, as the literature does for Set14's gray images.

    Returns:
        float64 [H, W].
    """
    if gray:
        return levels[..., 0].double()
    weights = torch.tensor([65.481, 128.553, 24.966], dtype=torch.float64) / 255
    return (levels.double() @ weights + 16).round()
