"""Training a style network (paper, section 4.1)."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from fastperc.errors import InputError
from fastperc.models import TransformNet
from fastperc.presets import MINIMUM_SIDE
from fastperc.training.objective import build_loss
from fastperc.training.perturb import StabilityLoss, add_noise
from fastperc.training.recipe import Recipe, Task


@dataclass(frozen=True, kw_only=True)
class StyleRecipe(Recipe):
    """Everything that decides the training of a style network."""

    style: str
    network: dict[str, Any] = field(default_factory=lambda: {"preset": "paper"})  # arguments of TransformNet
    style_layers: tuple[str, ...] = ("relu1_2", "relu2_2", "relu3_3", "relu4_3")
    content_layer: str = "relu2_2"
    convention: str = "relative"
    content_weight: float | None = None  # None: the convention's own
    style_weight: float | None = None
    tv_weight: float | None = None
    style_size: int | None = None  # the painting's shorter side in pixels; None: as `size`
    noise: float = 0.0  # standard deviation of the noise on what the network sees, in RGB 0–1
    stability: float = 0.0  # weight of the stability term; 0: none

    def task(self) -> Task:
        if self.size < MINIMUM_SIDE:
            raise InputError(f"training crops need a side of at least {MINIMUM_SIDE} pixels, not {self.size}")
        if isinstance(self.resize, tuple) and self.resize[0] < self.size:
            raise InputError(f"--resize {self.resize[0]} is too small for crops of {self.size} pixels")
        try:
            net = TransformNet(**self.network)
        except (TypeError, ValueError) as error:  # of a damaged checkpoint
            raise InputError(f"no network can be made of {self.network} ({error})") from None
        loss = build_loss(
            self.style,
            self.style_size or self.size,
            self.vgg,
            self.style_layers,
            self.content_layer,
            self.convention,
            self.vgg_preprocessing,
            content_weight=self.content_weight,
            style_weight=self.style_weight,
            tv_weight=self.tv_weight,
        )
        title = f"{Path(self.style).name} · {self.network['preset']} network"
        if self.stability:
            stable = StabilityLoss(loss, self.stability, self.noise)
            return Task(title, net, stable, perturb=stable.perturb)
        return Task(title, net, loss, perturb=partial(add_noise, deviation=self.noise) if self.noise else None)
