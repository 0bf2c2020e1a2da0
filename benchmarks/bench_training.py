"""A training step: network, loss network, backward and Adam, as `fastperc train` runs it."""

from __future__ import annotations

from harness import DEVICE, Case, Measure, runs
from networks import forward, image, perceptual_loss, style_costs
from providers import Provider
from torch import Tensor, nn

from fastperc import PixelLoss, SuperResolutionNet, TransformNet

# (preset, deepest layer, batch, side)
STYLES = {"cpu": [("paper", "relu2_2", 1, 128)], "cuda": [("paper", "relu4_3", 4, 256)]}
# (scale, batch, side of the photos)
SUPER_RESOLUTION = {"cpu": [(4, 1, 288)], "cuda": [(4, 4, 288)]}
DTYPE = {"cpu": "fp32", "cuda": "amp"}[DEVICE]
TOLERANCE = {"fp32": (1e-5, 1e-2), "amp": (2e-2, 0.5)}[DTYPE]  # rounding switches some ReLUs


class StyleObjective(nn.Module):
    """The loss of a style network on a batch of photos [N, 3, H, W]."""

    def __init__(self, preset: str, deepest: str, side: int) -> None:
        super().__init__()
        self.net = TransformNet(preset)
        self.loss = perceptual_loss(deepest, side)

    def forward(self, photos: Tensor) -> Tensor:
        return self.loss(self.net(photos), photos).total


class SuperResolutionObjective(nn.Module):
    """The loss of a super-resolution network on photos [N, 3, H, W] and the small photos made of them."""

    def __init__(self, scale: int) -> None:
        super().__init__()
        self.net = SuperResolutionNet(scale)
        self.loss = PixelLoss()

    def forward(self, small: Tensor, photos: Tensor) -> Tensor:
        return self.loss(self.net(small), photos)


def style_case(preset: str, deepest: str, n: int, side: int) -> Case:
    """A step of a style network on ``n`` photos of ``side``²."""
    return Case(
        "training",
        "training step",
        f"{preset} {n}x3x{side}x{side} to {deepest}",
        DTYPE,
        module=lambda: StyleObjective(preset, deepest, side),
        inputs=lambda: (image(n, side, side),),
        reference=forward,
        fused=forward,
        channels_last=True,
        costs=lambda: style_costs(deepest, n, side, DTYPE),
        tolerance=TOLERANCE,
    )


def super_resolution_case(scale: int, n: int, side: int) -> Case:
    """A step of a super-resolution network on ``n`` photos of ``side``²."""
    small = side // scale
    return Case(
        "training",
        "training step",
        f"x{scale} {n}x3x{small}x{small}, pixel loss",
        DTYPE,
        module=lambda: SuperResolutionObjective(scale),
        inputs=lambda: (image(n, small, small), image(n, side, side)),
        reference=forward,
        fused=forward,
        channels_last=True,
        tolerance=TOLERANCE,
    )


CASES = [
    *(style_case(*style) for style in STYLES[DEVICE]),
    *(super_resolution_case(*sizes) for sizes in SUPER_RESOLUTION[DEVICE]),
]


@runs(CASES)
def test_training(measure: Measure, case: Case, provider: Provider) -> None:
    measure(case, provider)
