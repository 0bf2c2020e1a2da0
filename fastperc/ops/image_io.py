"""Pictures to a network's tensors: a window of an image, mirrored beyond its border, normalised."""

from __future__ import annotations

import torch
from torch import Tensor

from fastperc import _native, backends, reference
from fastperc.ops.frozen import empty_like, native_unsupported, unsupported
from fastperc.types import Window


def image_io(image: Tensor, window: Window, scale: float, shift: float, dtype: torch.dtype) -> Tensor:
    """The ``window`` of ``image`` as a network's first convolution sees it, in one pass.

    Args:
        image: [N, 3, H, W] of any strides: RGB in 0–1, or uint8 in levels.
        window: top, left, height and width in pixels of the image; beyond its border lie mirrored pixels.
        scale, shift: RGB in 0–1 is multiplied by the one, and the other added.
        dtype: of the result: float32, float16, bfloat16 or float64.

    Returns:
        [N, 3, height, width], channels-last.

    Raises:
        ValueError: ``image`` has another shape.
    """
    if image.dim() != 4 or image.shape[1] != 3:
        raise ValueError(f"expected RGB images [N, 3, H, W], got {list(image.shape)}")
    out = torch.empty(0, dtype=dtype, device=image.device)
    obstacle = unsupported(image) or native_unsupported(out)
    if backends.choose("image_io", image, native=obstacle) == "reference":
        return reference.image_io(image, window, scale, shift, dtype)
    out = empty_like(out, (len(image), 3, window.height, window.width))
    _native.image_io(image, window, scale_of(image, scale), shift, out)
    return out


def scale_of(image: Tensor, scale: float) -> float:
    """What the numbers of ``image`` are multiplied by for RGB in 0–1 times ``scale``."""
    return scale / 255 if image.dtype == torch.uint8 else scale
