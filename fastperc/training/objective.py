"""The losses that training minimises, built from files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from fastperc.errors import InputError
from fastperc.files import PathLike
from fastperc.losses import PerceptualLoss, PixelLoss
from fastperc.models import VGG16Features
from fastperc.photos.photo import read_first_frame
from fastperc.presets import MINIMUM_SIDE

FEATURE_LAYER = "relu2_2"  # of VGG-16: what super-resolution compares


def build_loss(
    style: PathLike,
    style_size: int,
    vgg: PathLike | None,
    style_layers: Sequence[str],
    content_layer: str,
    convention: str = "relative",
    vgg_preprocessing: str | None = None,
    **weights: Any,
) -> PerceptualLoss:
    """The loss that trains a network to paint in the style of an image.

    Args:
        style: the image file of the painting.
        style_size: to how many pixels its shorter side is resized.
        vgg: the file of VGG-16's weights. Default: torchvision's, which are downloaded once.
        style_layers, content_layer: names of VGG-16's layers, such as ``"relu2_2"``.
        convention: what the weights multiply, see :class:`fastperc.losses.PerceptualLoss`.
        vgg_preprocessing: what VGG-16's weights expect, see :class:`fastperc.models.VGG16Features`.
        weights: ``content_weight``, ``style_weight`` and ``tv_weight``; ``None``: the convention's.

    Raises:
        InputError: a file cannot be read, the weights do not reach a layer, or there is no layer of that name.
    """
    painting = read_style(style, style_size)
    try:
        layers = dict.fromkeys((*style_layers, content_layer))
        features = VGG16Features(vgg, layers, preprocessing=vgg_preprocessing)
        return PerceptualLoss(
            features, painting, content_layer=content_layer, style_layers=style_layers, convention=convention, **weights
        )
    except InputError:
        raise
    except ValueError as error:  # the name of a layer
        raise InputError(str(error)) from None


def read_style(path: PathLike, short_side: int) -> Tensor:
    """A painting, RGB in 0–1 [1, 3, H, W], resized to ``short_side`` pixels on its shorter side.

    Of several frames it is the first, and a line says so.

    Raises:
        InputError: it cannot be read, or would be too small or too large.
    """
    if short_side < MINIMUM_SIDE:
        raise InputError(f"the painting's shorter side must have at least {MINIMUM_SIDE} pixels, not {short_side}")
    photo = read_first_frame(path)
    width, height = photo.rgb.size
    try:
        return photo.resized(round(short_side * max(width, height) / min(width, height))).tensor()
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


class Terms(NamedTuple):
    """The single term of a :class:`ReconstructionLoss`, a scalar."""

    total: Tensor


class ReconstructionLoss(nn.Module):
    """How far pictures are from the photos they should be, both [N, 3, H, W] in 0–1.

    Args:
        kind: ``"pixel"`` compares pixels, ``"feature"`` VGG-16's features at ``FEATURE_LAYER``.
        vgg: the file of VGG-16's weights. Default: torchvision's.
        vgg_preprocessing: what these weights expect, see :class:`fastperc.models.VGG16Features`.

    Raises:
        InputError: the file of the weights cannot be read.
    """

    def __init__(self, kind: str, vgg: str | None, vgg_preprocessing: str | None = None) -> None:
        super().__init__()
        self.distance: nn.Module = PixelLoss()
        if kind == "feature":
            features = VGG16Features(vgg, (FEATURE_LAYER,), preprocessing=vgg_preprocessing)
            self.distance = PerceptualLoss(features, convention="paper")

    def forward(self, output: Tensor, photos: Tensor) -> Terms:
        distance = self.distance(output, photos)
        return Terms(distance.content if isinstance(self.distance, PerceptualLoss) else distance)
