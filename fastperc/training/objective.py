"""What training descends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from fastperc.errors import InputError
from fastperc.files import PathLike
from fastperc.losses import PerceptualLoss, PixelLoss
from fastperc.models import VGG16Features
from fastperc.photos.photo import read_image
from fastperc.presets import MINIMUM_SIDE


def build_loss(
    style: PathLike,
    style_size: int,
    vgg: PathLike | None,
    style_layers: Sequence[str],
    content_layer: str,
    convention: str = "relative",
    **weights: float | None,
) -> PerceptualLoss:
    """The objective that paints like the image file ``style``, resized to ``style_size`` on its shorter side.

    Raises:
        InputError: a file that cannot be read, weights that do not reach a layer, an unknown layer.
    """
    painting = read_style(style, style_size)
    try:
        features = VGG16Features(vgg, dict.fromkeys((*style_layers, content_layer)))
        return PerceptualLoss(
            features, painting, content_layer=content_layer, style_layers=style_layers, convention=convention, **weights
        )
    except InputError:
        raise
    except ValueError as error:  # a layer's name
        raise InputError(str(error)) from None


def read_style(path: PathLike, short_side: int) -> Tensor:
    """A painting, RGB in 0–1 [1, 3, H, W], its shorter side ``short_side`` pixels long.

    Raises:
        InputError: it cannot be read, or would be too small or too large.
    """
    if short_side < MINIMUM_SIDE:
        raise InputError(f"the painting's shorter side must have at least {MINIMUM_SIDE} pixels, not {short_side}")
    photo = read_image(path)
    width, height = photo.rgb.size
    try:
        return photo.resized(round(short_side * max(width, height) / min(width, height))).tensor()
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


FEATURE_LAYER = "relu2_2"


class Terms(NamedTuple):
    """An objective of a single term; a scalar."""

    total: Tensor


class Objective(nn.Module):
    """How far pictures are from the photos they should be, [N, 3, H, W] both: by their pixels, or by VGG's features."""

    def __init__(self, loss: str, vgg: str | None) -> None:
        super().__init__()
        feature = loss == "feature"
        self.distance = PerceptualLoss(VGG16Features(vgg, (FEATURE_LAYER,))) if feature else PixelLoss()

    def forward(self, output: Tensor, photos: Tensor) -> Terms:
        terms = self.distance(output, photos)
        return Terms(terms.content if isinstance(self.distance, PerceptualLoss) else terms)
