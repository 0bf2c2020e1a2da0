"""The images that an engine takes, as [N, 3, H, W], and back."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

import fastperc
from fastperc.models.image_range import check_values
from fastperc.presets import MINIMUM_SIDE

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
EIGHT_BIT_MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "LAB", "HSV")


class Given(NamedTuple):
    """What a caller gives, as a tensor, and how its picture becomes the like."""

    tensor: Tensor
    like: Callable[[Tensor], Any]


def given(images: Any) -> Given:
    """``images`` as a tensor: a tensor itself, a NumPy array, a PIL image, or the path of an image file.

    The like of a path is a PIL image.

    Raises:
        ValueError: something else, or a PIL image of more than eight bits.
        InputError: a file that cannot be read.
    """
    if isinstance(images, Tensor):
        return Given(images, lambda picture: picture)
    if isinstance(images, np.ndarray):
        try:
            # A copy where PyTorch cannot share the memory: it is read-only, or its strides are negative.
            tensor = torch.from_numpy(np.require(images, requirements=["C", "W"]))
        except TypeError:
            raise ValueError(f"expected uint8 levels [H, W, 3] or floating-point numbers, got {images.dtype}") from None
        return Given(tensor, lambda picture: picture.cpu().numpy())
    if isinstance(images, (str, os.PathLike)):
        images = fastperc.read_image(images)
    if isinstance(images, Image.Image):
        return _given_pil(images)
    raise ValueError(f"expected a tensor, a NumPy array, a PIL image or a path, got {type(images).__name__}")


def _given_pil(image: Image.Image) -> Given:
    if image.mode not in EIGHT_BIT_MODES:
        raise ValueError(f"a PIL image of mode {image.mode} has no known range; convert it to RGB, or give its path")
    profile = image.info.get("icc_profile") or b""
    image = ImageOps.exif_transpose(image)
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None

    def like(picture: Tensor) -> Image.Image:
        painted = Image.fromarray(picture.cpu().numpy())
        if profile[16:20] == b"RGB ":
            painted.info["icc_profile"] = profile  # which Pillow writes to the file
        if alpha is not None:
            same = alpha.size == painted.size
            painted.putalpha(alpha if same else alpha.resize(painted.size, Image.Resampling.BICUBIC))
        return painted

    rgb = image.convert("RGBA").convert("RGB") if alpha is not None else image.convert("RGB")
    return Given(torch.from_numpy(np.array(rgb)), like)


def as_nchw(images: Tensor) -> Tensor:
    """``images`` as [N, 3, H, W].

    Raises:
        ValueError: another shape or dtype, or on the CPU pixels that are not finite or far from 0–1.
    """
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
    if image.is_floating_point() and image.device.type == "cpu" and image.numel() > 0:
        low, high = torch.stack(image.detach().aminmax()).tolist()
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError("the image has pixels that are NaN or infinite")
        check_values("the image", low, high)
    return image


def as_given(picture: Tensor, images: Tensor) -> Tensor:
    """``picture`` [N, 3, H, W] with the axes in the order that ``images`` has them."""
    if images.dtype != torch.uint8 or images.shape[-1] != 3:
        return picture
    picture = picture.permute(0, 2, 3, 1)
    return picture[0] if images.dim() == 3 else picture
