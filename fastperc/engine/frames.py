"""The images that an engine takes, as [N, 3, H, W], and back."""

from __future__ import annotations

import torch
from torch import Tensor

from fastperc.presets import MINIMUM_SIDE

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def as_nchw(images: Tensor) -> Tensor:
    """``images`` as [N, 3, H, W].

    Raises:
        ValueError: another shape or dtype, or on the CPU pixels that are not finite.
    """
    if not isinstance(images, Tensor):
        raise ValueError(f"expected a tensor (torch.from_numpy makes one of an array), got {type(images).__name__}")
    if images.dtype != torch.uint8 and images.dtype not in DTYPES:
        raise ValueError(f"expected RGB in 0–1 as floating-point numbers, or uint8 levels, got {images.dtype}")
    image = images
    if images.dtype == torch.uint8 and images.dim() in (3, 4) and images.shape[-1] == 3:
        image = (images[None] if images.dim() == 3 else images).permute(0, 3, 1, 2)
    if image.dim() != 4 or image.shape[1] != 3 or min(image.shape[2:]) < MINIMUM_SIDE:
        raise ValueError(
            f"expected RGB images [N, 3, H, W], or uint8 [N, H, W, 3] or [H, W, 3], with H and W of at least "
            f"{MINIMUM_SIDE}, got {images.dtype} {list(images.shape)}"
        )
    checked = image.is_floating_point() and image.device.type == "cpu" and image.numel() > 0
    if checked and not torch.stack(image.aminmax()).isfinite().all():
        raise ValueError("the image has pixels that are NaN or infinite")
    return image


def as_given(picture: Tensor, images: Tensor) -> Tensor:
    """``picture`` [N, 3, H, W] with the axes in the order that ``images`` has them."""
    if images.dtype != torch.uint8 or images.shape[-1] != 3:
        return picture
    picture = picture.permute(0, 2, 3, 1)
    return picture[0] if images.dim() == 3 else picture
