"""Larger or finer strokes: the image is painted at another size, and the painting is brought back to the image's size.

A smaller image is made by antialiased bicubic resampling, and its painting is enlarged the same way. That alone would
be soft. So the detail that the smaller image has lost, the image's luma minus that of the enlarged smaller image, is
added to the painting, as far as the painting follows the image there: a gain from 0 to 1, by which the painting's luma
is best predicted from the image's among neighbouring pixels. Edges stay sharp where the painting keeps them. Where it
does not, and where the image is flat but for noise, nothing is added.

Each band of rows of the result is computed by itself, so that float numbers are never in memory for the whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fastperc import reference
from fastperc.devices import free_memory, gigabytes
from fastperc.engine.plan import cut
from fastperc.errors import InputError
from fastperc.presets import LARGEST_STROKE, MINIMUM_SIDE, SMALLEST_STROKE, STROKE_SIDE
from fastperc.types import Window

Size = tuple[int, int]  # height and width in pixels
LEVELS = 255
BAND_PIXELS = 1 << 19  # of a band of rows
UNCHECKED_BYTES = 512 << 20  # less is taken without asking for the free memory, which takes time
RADIUS = 2  # pixels of the smaller image on each side of the one whose gain is computed
NOISE = 0.02**2  # a variance of the luma below which the gain is small


def painted_size(height: int, width: int, stroke: float | str) -> Size:
    """The size at which an image of ``height`` × ``width`` is painted.

    Args:
        height, width: pixels.
        stroke: how many times as large strokes are, from 0.1 to 100. ``"auto"`` is 1 up to a longer side of 1000
            pixels, and for larger images the longer side / 1000.

    Raises:
        ValueError: ``stroke`` is no valid value.
        InputError: a side of less than 16 pixels would remain.
    """
    if stroke == "auto":
        stroke = max(1.0, min(max(height, width) / STROKE_SIDE, min(height, width) / MINIMUM_SIDE))
    if not isinstance(stroke, (int, float)) or not SMALLEST_STROKE <= stroke <= LARGEST_STROKE:
        raise ValueError(
            f"stroke must be 'auto' or a number from {SMALLEST_STROKE:g} to {LARGEST_STROKE:g}, got {stroke!r}"
        )
    if stroke == 1:
        return height, width
    size = round(height / stroke), round(width / stroke)
    if min(size) < MINIMUM_SIDE:
        largest = min(height, width) / MINIMUM_SIDE
        raise InputError(
            f"with stroke {stroke:g}, {width}×{height} is painted at {size[1]}×{size[0]}; both sides need at least "
            f"{MINIMUM_SIDE} pixels, so use a stroke of at most {math.floor(10 * largest) / 10:g}"
        )
    return size


def resized(image: Tensor, size: Size) -> Tensor:
    """``image`` [N, 3, H, W] at another size, by antialiased bicubic resampling.

    Returns:
        uint8 levels, rounded, of levels; of floating-point numbers float32, or float64 of float64.
    """
    wide, bands = _wide(image.dtype), image.split(_band_rows(image.shape[3]), dim=2)
    y = torch.cat([_resampled(band.contiguous().to(wide), (band.shape[2], size[1])) for band in bands], dim=2)
    y = _resampled(y, size)
    return reference.to_levels(y / LEVELS) if image.dtype == torch.uint8 else y


def painted_whole(image: Tensor, size: Size, dtype: torch.dtype, paint: Callable[[Tensor], Tensor]) -> Tensor:
    """The pictures of ``image`` [N, 3, H, W] in one piece, with operations that a CUDA graph can record.

    Args:
        image: uint8 levels, or RGB in 0–1.
        size: see :func:`painted_size`.
        dtype: of the pictures, [N, 3, H, W].
        paint: gives the pictures of a smaller or larger image, RGB in 0–1, in float32 or wider.
    """
    small = resized(image, size)
    layers = _layers(paint(small), small, enlarged=size[0] < image.shape[2])
    layers = _resampled(layers, tuple(image.shape[2:]))
    return _as(_with_detail(layers, image), dtype)


def tiles(
    image: Tensor, size: Size, dtype: torch.dtype, paint: Callable[[Tensor], Iterable[tuple[Window, Tensor]]]
) -> Iterator[tuple[Window, Tensor]]:
    """The picture of ``image`` [1, 3, H, W] in bands of rows: the place of each, and its pixels [1, 3, h, W].

    Args:
        image: uint8 levels, or RGB in 0–1.
        size: see :func:`painted_size`.
        dtype: of the bands.
        paint: gives the picture of a smaller or larger image in tiles, RGB in 0–1, in any dtype.

    Raises:
        InputError: not enough memory for the other image and its painting.
    """
    needed = 3 * math.prod(size) * (image.element_size() + _wide(image.dtype).itemsize)
    if needed > UNCHECKED_BYTES and needed > (free := free_memory(image.device)):
        raise InputError(
            f"with this stroke {size[1]}×{size[0]} pixels are painted, which take {gigabytes(needed)}; "
            f"{gigabytes(free)} are free; use a larger stroke"
        )
    small = resized(image, size)
    painting = torch.empty(small.shape, dtype=_wide(image.dtype), device=image.device)
    for window, part in paint(small):
        cut(painting, Window(0, 0, *size), window).copy_(part)
    yield from brought_back(painting, small, image, dtype)


def brought_back(painting: Tensor, small: Tensor, image: Tensor, dtype: torch.dtype) -> Iterator[tuple[Window, Tensor]]:
    """``painting`` of ``small``, both [N, 3, h, w], at the size of ``image`` [N, 3, H, W], in bands of rows.

    Args:
        painting: RGB in 0–1, float32 or float64.
        small: ``image`` at another size, as :func:`resized` gives it.
        image: uint8 levels, or RGB in 0–1.
        dtype: of the bands, [N, 3, rows, W].
    """
    height, width = image.shape[2:]
    rows = _band_rows(width)
    for top in range(0, height, rows):
        count = min(rows, height - top)
        first, weights = _row_weights(painting.shape[2], height, top, count)
        above = min(first, RADIUS)  # rows that only gains need
        needed = slice(first - above, first + weights.shape[1] + RADIUS)
        part = _layers(painting[:, :, needed], small[:, :, needed], enlarged=painting.shape[2] < height)
        part = part[:, :, above : above + weights.shape[1]].contiguous()
        part = _resampled(part, (part.shape[2], width))
        with torch.autocast(part.device.type, enabled=False):
            part = weights.to(part.dtype).to(part.device) @ part
        yield Window(top, 0, count, width), _as(_with_detail(part, image[:, :, top : top + count]), dtype)


def _layers(painting: Tensor, small: Tensor, enlarged: bool) -> Tensor:
    """``painting`` and, if it will be ``enlarged``, the gain of the image's detail and the luma of ``small``."""
    if not enlarged:
        return painting
    luma, painted = _luma(small, painting.dtype), _luma(painting, painting.dtype)
    moments = _mean(torch.cat([luma, painted, luma * luma, luma * painted], dim=1))
    mean, painted_mean, square, product = moments.split(1, dim=1)
    variance, covariance = square - mean * mean, product - mean * painted_mean
    return torch.cat([painting, (covariance / (variance + NOISE)).clamp(0, 1), luma], dim=1)


def _with_detail(layers: Tensor, image: Tensor) -> Tensor:
    """The picture of ``layers``, which were resampled to the size of ``image`` and are overwritten."""
    if layers.shape[1] == 3:
        return layers
    painting, gain, luma = layers.split((3, 1, 1), dim=1)
    return painting.addcmul_(gain, _luma(image, layers.dtype).sub_(luma))


def _luma(x: Tensor, dtype: torch.dtype) -> Tensor:
    """:func:`fastperc.reference.luma` of levels or of RGB in 0–1, in 0–1.

    It copies no numbers to a GPU, which a CUDA graph could not record.
    """
    shares = [share / LEVELS if x.dtype == torch.uint8 else share for share in reference.LUMA]
    red, green, blue = x.split(1, dim=1)
    y = red.to(dtype) * shares[0]
    return y.add_(green, alpha=shares[1]).add_(blue, alpha=shares[2])


def _mean(x: Tensor) -> Tensor:
    """The mean of each pixel's neighbourhood."""
    x = F.pad(x, (RADIUS,) * 4, mode="replicate")
    for dim in (2, 3):  # on a CPU, sums of slices are faster than F.avg_pool2d
        x = x.unfold(dim, 2 * RADIUS + 1, 1).mean(dim=-1)
    return x


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _as(y: Tensor, dtype: torch.dtype) -> Tensor:
    """``y``, RGB in 0–1, in ``dtype``. Overwrites ``y``."""
    if dtype != torch.uint8:
        return y.to(dtype)
    return y.clamp_(0, 1).mul_(LEVELS).round_().to(dtype)  # reference.to_levels, in less memory


def _resampled(x: Tensor, size: tuple[int, ...]) -> Tensor:
    return F.interpolate(x, list(size), mode="bicubic", antialias=True)


def _band_rows(width: int) -> int:
    return max(BAND_PIXELS // width, 1)


def _row_weights(source: int, target: int, top: int, count: int) -> tuple[int, Tensor]:
    """How ``count`` rows from ``top`` on, of ``target`` in all, are made of ``source`` rows: the first that is needed,
    and the weights of it and of those after it, float64 [count, needed].

    They are those of ``F.interpolate`` with ``mode="bicubic"`` and ``antialias=True``.
    """
    scale = source / target
    spread = max(scale, 1.0)
    centers = (torch.arange(top, top + count, dtype=torch.float64) + 0.5) * scale
    first = max(int(centers[0] - 2 * spread), 0)
    last = min(int(centers[-1] + 2 * spread) + 1, source)
    distances = (torch.arange(first, last, dtype=torch.float64) + 0.5 - centers[:, None]).abs() / spread
    near = (1.5 * distances - 2.5) * distances**2 + 1
    far = ((-0.5 * distances + 2.5) * distances - 4) * distances + 2
    weights = torch.where(distances < 1, near, torch.where(distances < 2, far, 0.0))
    return first, weights / weights.sum(dim=1, keepdim=True)
