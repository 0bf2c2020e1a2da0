"""Training a style (paper, section 4.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from fastperc.errors import InputError
from fastperc.files import PathLike
from fastperc.images import read_image
from fastperc.losses import PerceptualLoss
from fastperc.models import TransformNet, VGG16Features
from fastperc.presets import MINIMUM_SIDE
from fastperc.training import Recipe, Task


@dataclass(frozen=True, kw_only=True)
class StyleRecipe(Recipe):
    """All that decides the training of a style."""

    style: str
    network: dict[str, Any] = field(default_factory=lambda: {"preset": "paper"})  # arguments of TransformNet
    style_layers: tuple[str, ...] = ("relu1_2", "relu2_2", "relu3_3", "relu4_3")
    content_layer: str = "relu2_2"
    convention: str = "relative"
    content_weight: float | None = None  # None: the convention's own
    style_weight: float | None = None
    tv_weight: float | None = None
    style_size: int | None = None  # the painting's shorter side in pixels; None: as `size`

    def task(self) -> Task:
        if self.size < MINIMUM_SIDE:
            raise InputError(f"training crops need a side of at least {MINIMUM_SIDE} pixels, not {self.size}")
        net = TransformNet(**self.network)
        loss = build_loss(
            self.style,
            self.style_size or self.size,
            self.vgg,
            self.style_layers,
            self.content_layer,
            self.convention,
            content_weight=self.content_weight,
            style_weight=self.style_weight,
            tv_weight=self.tv_weight,
        )
        return Task(f"{Path(self.style).name} · {self.network['preset']} network", net, loss)


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
