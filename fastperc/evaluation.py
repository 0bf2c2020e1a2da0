"""Image quality metrics: PSNR and SSIM, and the luma on which super-resolution papers measure them; and the spectrum of
what a network makes of a flat grey area, in which dots and hatches at a fixed period are peaks."""

from __future__ import annotations

import math
from collections.abc import Callable
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
        gray: return the levels of the first channel instead, as the literature does for Set14's files with one channel.

    Returns:
        float64 [H, W].
    """
    if gray:
        return levels[..., 0].double()
    weights = torch.tensor([65.481, 128.553, 24.966], dtype=torch.float64) / 255
    return (levels.double() @ weights + 16).round()


SPECTRUM_WINDOW = 128  # pixels: side of the windows whose power spectra are averaged
FLAT_SIDE, FLAT_BORDER = 512, 32  # pixels: side of the flat area, and what is cut off around its picture
BUSY_WIDTH, BUSY_SCALE = 256, 8  # pixels: width of the area beside it, and size of its blots
FLAT_NOISE = 1 / 255  # standard deviation of the flat area's noise in RGB 0–1: one level
LOW_FREQUENCIES, FLOOR_RADIUS = 6, 6  # bins: around frequency 0, where no peak is looked for; around a peak, its floor


class Peak(NamedTuple):
    """A peak in a power spectrum."""

    decibels: float  # above the noise floor around it
    amplitude: float  # of the wave, in the unit of the image
    frequency: tuple[float, float]  # cycles per pixel downwards and to the right, -0.5 to 0.5

    def __str__(self) -> str:
        down, right = self.frequency
        return (
            f"{self.decibels:.1f} dB, with an amplitude of {self.amplitude:.2g}, at {abs(down):.3g} cycles per pixel "
            f"downwards and {abs(right):.3g} across"
        )


def power_spectrum(image: Tensor) -> Tensor:
    """The mean power spectrum of half-overlapping windows of ``image`` [H, W] (Welch's method, Hann windows).

    Returns:
        float64 [``SPECTRUM_WINDOW``, ``SPECTRUM_WINDOW``] with frequency 0 in the middle.

    Raises:
        ValueError: the image is smaller than a window.
    """
    side = SPECTRUM_WINDOW
    if image.dim() != 2 or min(image.shape) < side:
        raise ValueError(f"power_spectrum needs [H, W] with {side} pixels or more a side, got {list(image.shape)}")
    hann = _hann(side, image.device)
    windows = image.double().unfold(0, side, side // 2).unfold(1, side, side // 2).flatten(0, 1)
    windows = (windows - windows.mean(dim=(1, 2), keepdim=True)) * hann[:, None] * hann
    return torch.fft.fftshift(torch.fft.fft2(windows).abs().square().mean(0))


def highest_peak(power: Tensor) -> Peak:
    """The frequency at which ``power`` [N, N] stands highest above its noise floor; frequency 0 is in the middle.

    The floor at a frequency is the median of the power at the frequencies around it, without its direct neighbours.
    White noise has a highest peak of about 2 dB. A pattern with a fixed period is a narrow peak, while strokes that
    have about the same width and no fixed place are a broad hill, which is its own floor. Periods of more than 21
    pixels are left out: there such hills are steep. An image without any change has a peak of 0 dB at frequency 0.
    """
    side, radius = len(power), FLOOR_RADIUS
    if not power.max() > 0:
        return Peak(0.0, 0.0, (0.0, 0.0))
    power = power.clamp_min(1e-12 * float(power.max()))  # rounding is no floor
    width = 2 * radius + 1
    around = F.pad(power[None, None], (radius,) * 4, mode="circular")[0, 0].unfold(0, width, 1).unfold(1, width, 1)
    is_floor = torch.ones(width, width, dtype=torch.bool)
    is_floor[radius - 1 : radius + 2, radius - 1 : radius + 2] = False
    ratio = power / around[..., is_floor].median(dim=-1).values
    low = slice(side // 2 - LOW_FREQUENCIES, side // 2 + LOW_FREQUENCIES + 1)
    ratio[low, low] = 0
    row, column = divmod(int(ratio.argmax()), side)
    frequency = (row - side // 2) / side, (column - side // 2) / side
    shares = 1 if all(f in (0, -0.5) for f in frequency) else 2  # a wave has a share at its frequency and at minus that
    amplitude = shares * math.sqrt(float(power[row, column])) / float(_hann(side, power.device).sum()) ** 2
    return Peak(10 * math.log10(float(ratio.max())), amplitude, frequency)


def _hann(side: int, device: torch.device) -> Tensor:
    return torch.hann_window(side, periodic=False, dtype=torch.float64, device=device)


def flat_picture(paint: Callable[[Tensor], Tensor], level: float = 0.5, seed: int = 0) -> Tensor:
    """What ``paint``, a network or an engine, makes of a flat grey area: RGB in 0–1 [3, H, W] without its borders.

    The area has noise of one level, as a clear sky has in a photo: a network that pads by reflection makes a constant
    of a constant. Beside it lie blots of random colours. Instance norm divides by the standard deviation of the whole
    image, and without them the noise would be all there is. The picture is rounded to 8 bits, as its file would be:
    what is fainter does not count.

    Args:
        paint: RGB in 0–1 [1, 3, H, W] → RGB in 0–1 of the same size, on the CPU.
        level: the grey, 0–1.
        seed: of the noise and the colours.
    """
    generator = torch.Generator().manual_seed(seed)
    flat = level + FLAT_NOISE * torch.randn(1, 3, FLAT_SIDE, FLAT_SIDE, generator=generator)
    colours = torch.rand(1, 3, FLAT_SIDE // BUSY_SCALE, BUSY_WIDTH // BUSY_SCALE, generator=generator)
    busy = F.interpolate(colours, scale_factor=BUSY_SCALE, mode="bicubic").clamp(0, 1)
    with torch.inference_mode():
        picture = paint(torch.cat([flat, busy], dim=3))[0]
    inner = slice(FLAT_BORDER, FLAT_SIDE - FLAT_BORDER)
    return (255 * picture[:, inner, inner].clamp(0, 1)).round() / 255
