"""Perceptual-loss networks (Johnson, Alahi and Fei-Fei, 2016) as drop-in PyTorch modules.

Public names are imported when they are first used: ``import fastperc`` and ``fastperc --help`` need no torch.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastperc._checkout import use_installed

use_installed()  # before any other import from this folder

from fastperc._version import __version__ as __version__  # noqa: E402

if TYPE_CHECKING:  # for type checkers, which cannot follow the table below
    from PIL.Image import Image

    from fastperc import ops as ops
    from fastperc import reference as reference
    from fastperc.backends import use_backend as use_backend
    from fastperc.checkpoints import load as load
    from fastperc.checkpoints import save as save
    from fastperc.engine import freeze as freeze
    from fastperc.errors import InputError as InputError
    from fastperc.losses import LPIPS as LPIPS
    from fastperc.losses import FeatureLoss as FeatureLoss
    from fastperc.losses import PerceptualLoss as PerceptualLoss
    from fastperc.losses import PixelLoss as PixelLoss
    from fastperc.models import SRCNN as SRCNN
    from fastperc.models import SuperResolutionNet as SuperResolutionNet
    from fastperc.models import TransformNet as TransformNet
    from fastperc.models import VGG16Features as VGG16Features
    from fastperc.models import VGGFeatures as VGGFeatures
    from fastperc.modules import ConvBNReLU as ConvBNReLU
    from fastperc.modules import GramLoss as GramLoss
    from fastperc.modules import ResidualBlock as ResidualBlock
    from fastperc.modules import SubpixelConvBNReLU as SubpixelConvBNReLU
    from fastperc.modules import TVLoss as TVLoss
    from fastperc.ops.gram_matrix import gram_matrix as gram_matrix
    from fastperc.rewriting.accelerated import accelerate as accelerate

_HOMES = {
    "fastperc": ("ops", "reference"),
    "fastperc.backends": ("use_backend",),
    "fastperc.checkpoints": ("load", "save"),
    "fastperc.engine": ("freeze",),
    "fastperc.errors": ("InputError",),
    "fastperc.losses": ("LPIPS", "FeatureLoss", "PerceptualLoss", "PixelLoss"),
    "fastperc.models": ("SRCNN", "SuperResolutionNet", "TransformNet", "VGG16Features", "VGGFeatures"),
    "fastperc.modules": ("ConvBNReLU", "GramLoss", "ResidualBlock", "SubpixelConvBNReLU", "TVLoss"),
    "fastperc.ops": ("gram_matrix",),
    "fastperc.rewriting.accelerated": ("accelerate",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted([*_HOME_OF, "read_image"])


def read_image(path: str | os.PathLike[str]) -> Image:
    """Reads an image file in any format that Pillow decodes, as an upright 8-bit sRGB image: RGB, or RGBA if any of it
    is transparent.

    Its EXIF orientation is applied and its colour profile is converted. An engine takes the image as it is.

    Raises:
        InputError: the file is missing, unreadable, not an image or cut short.
    """
    from fastperc.photos import photo

    decoded = photo.read_image(path)
    image, profile = decoded.rgb, decoded.metadata.get("icc_profile")
    if profile:
        image = photo._to_srgb(image, profile) or image
    if decoded.alpha is not None:
        image.putalpha(decoded.alpha)
    return image


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'fastperc' has no attribute {name!r}")
    value = import_module(f"fastperc.{name}") if home == "fastperc" else getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
