"""From an image to a network's input: a window of it, reflected beyond its border, scaled."""

from __future__ import annotations

import torch
from torch import Tensor

from fastperc import _native, reference
from fastperc.backends import Implementation, Operation, TuningCases, register
from fastperc.ops.common import COMMON_CPP_SOURCES, COMMON_CUDA_SOURCES, empty_like, why_not_compiled, why_not_frozen
from fastperc.types import Window


def image_io(image: Tensor, window: Window, input_range: tuple[float, float], dtype: torch.dtype) -> Tensor:
    """The ``window`` of ``image`` as a network's first convolution sees it, in one pass.

    Args:
        image: [N, 3, H, W] of any strides: RGB in 0–1, or uint8 levels.
        window: top, left, height and width in pixels of the image; beyond its border lie reflected pixels.
        input_range: RGB in 0–1 is multiplied by the first number, and the second is added.
        dtype: of the result: float32, float16, bfloat16 or float64.

    Returns:
        [N, 3, height, width], channels-last.

    Raises:
        ValueError: ``image`` has another shape.
    """
    if image.dim() != 4 or image.shape[1] != 3:
        raise ValueError(f"expected RGB images [N, 3, H, W], got {list(image.shape)}")
    return IMAGE_IO(image, window, input_range, dtype)


def pixel_range(image: Tensor, input_range: tuple[float, float]) -> tuple[float, float]:
    """``input_range`` for the numbers that ``image`` holds: those of uint8 are levels."""
    scale, shift = input_range
    return (scale / 255, shift) if image.dtype == torch.uint8 else input_range


def _native_image_io(image: Tensor, window: Window, input_range: tuple[float, float], dtype: torch.dtype) -> Tensor:
    out = empty_like(image.new_empty(0, dtype=dtype), (len(image), 3, window.height, window.width))
    _native.image_io(image, window, *pixel_range(image, input_range), out)
    return out


def _why_not_native(image: Tensor, window: Window, input_range: tuple[float, float], dtype: torch.dtype) -> str | None:
    return why_not_frozen(image) or why_not_compiled(torch.empty(0, dtype=dtype, device=image.device))


IMAGE_IO = register(
    Operation(
        "image_io",
        "Image to network input",
        (
            Implementation("native", _native_image_io, _why_not_native),
            Implementation("reference", reference.image_io),
        ),
        TuningCases(
            lambda batch, size: [((batch, 3, size, size),)],
            lambda image: (image, Window(0, 0, *image.shape[2:]), (2.0, -1.0), image.dtype),
        ),
        (*COMMON_CPP_SOURCES, *COMMON_CUDA_SOURCES, "csrc/image_io*", "fastperc/ops/image_io.py"),
        frozen=True,
    )
)
