"""Training a super-resolution network (paper, section 4.2)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import nn

from fastperc.errors import InputError
from fastperc.models import SRCNN, SuperResolutionNet
from fastperc.presets import ARCHITECTURES, MINIMUM_SIDE
from fastperc.reference import degrade
from fastperc.training.objective import ReconstructionLoss
from fastperc.training.recipe import Recipe, Task

NETWORKS: dict[str, Callable[..., nn.Module]] = dict(
    zip(ARCHITECTURES, (SuperResolutionNet, SRCNN, partial(SRCNN, kernel_sizes=(9, 1, 5))))
)


@dataclass(frozen=True, kw_only=True)
class SuperResolutionRecipe(Recipe):
    """Everything that decides the training of a super-resolution network."""

    scale: int = 4
    loss: str = "pixel"  # or "feature": VGG-16's relu2_2
    arch: str = "paper"
    upsample: str | None = None  # of the paper's network: "transposed", as in the paper, or "nearest"
    blur: float = 1.0  # σ, in pixels of the photos, of the Gaussian applied before they are downscaled
    iterations: int = 200_000
    size: int = 288
    resize: bool = False

    def task(self) -> Task:
        if self.size % self.scale or self.size < self.scale * MINIMUM_SIDE:
            raise InputError(
                f"training crops need a side that is a multiple of {self.scale}, {self.scale * MINIMUM_SIDE} pixels "
                f"or more, not {self.size}"
            )
        if self.upsample and self.arch != "paper":
            raise InputError(f"--upsample is for the paper's network, not for {self.arch}")
        options = dict(upsample=self.upsample) if self.upsample else {}
        return Task(
            f"×{self.scale} · {self.arch} network · {self.loss} loss",
            NETWORKS[self.arch](self.scale, **options),
            ReconstructionLoss(self.loss, self.vgg, self.vgg_preprocessing),
            partial(degrade, scale=self.scale, blur=self.blur),
        )
