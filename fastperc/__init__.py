"""Perceptual-loss networks (Johnson, Alahi and Fei-Fei, 2016) as drop-in PyTorch modules.

Public names are imported when they are first used: ``import fastperc`` and ``fastperc --help`` need no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fastperc import ops, reference
    from fastperc.backends import use_backend
    from fastperc.checkpoints import load, save
    from fastperc.engine import freeze
    from fastperc.errors import InputError
    from fastperc.losses import FeatureLoss, PerceptualLoss, PixelLoss
    from fastperc.models import SRCNN, SuperResolutionNet, TransformNet, VGG16Features
    from fastperc.modules import ConvBNReLU, GramLoss, ResidualBlock, SubpixelConvBNReLU, TVLoss
    from fastperc.reference import gram_matrix

_HOMES = {
    "fastperc": ("ops", "reference"),
    "fastperc.backends": ("use_backend",),
    "fastperc.checkpoints": ("load", "save"),
    "fastperc.engine": ("freeze",),
    "fastperc.errors": ("InputError",),
    "fastperc.losses": ("FeatureLoss", "PerceptualLoss", "PixelLoss"),
    "fastperc.models": ("SRCNN", "SuperResolutionNet", "TransformNet", "VGG16Features"),
    "fastperc.modules": ("ConvBNReLU", "GramLoss", "ResidualBlock", "SubpixelConvBNReLU", "TVLoss"),
    "fastperc.reference": ("gram_matrix",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "SRCNN",
    "ConvBNReLU",
    "FeatureLoss",
    "GramLoss",
    "InputError",
    "PerceptualLoss",
    "PixelLoss",
    "ResidualBlock",
    "SubpixelConvBNReLU",
    "SuperResolutionNet",
    "TVLoss",
    "TransformNet",
    "VGG16Features",
    "freeze",
    "gram_matrix",
    "load",
    "ops",
    "reference",
    "save",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'fastperc' has no attribute {name!r}")
    value = import_module(f"fastperc.{name}") if home == "fastperc" else getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
