"""A training step: network, loss network, backward and Adam, as `fastperc train` runs it."""

from __future__ import annotations

from harness import DEVICE, Case, runs
from networks import forward, image, perceptual_loss, style_costs
from torch import Tensor, nn

from fastperc import PixelLoss, SuperResolutionNet, TransformNet

# (preset, deepest layer, batch, side)
STYLES = {"cpu": [("paper", "relu2_2", 1, 128)], "cuda": [("paper", "relu4_3", 4, 256)]}
# (scale, batch, side of the photos)
SUPER_RESOLUTION = {"cpu": [(4, 1, 288)], "cuda": [(4, 4, 288)]}


class Objective(nn.Module):
    """The loss of a style network on a batch of photos [N, 3, H, W]."""

    def __init__(self, preset: str, deepest: str, side: int) -> None:
        super().__init__()
        self.net = TransformNet(preset)
        self.loss = perceptual_loss(deepest, side)

    def forward(self, photos: Tensor) -> Tensor:
        return self.loss(self.net(photos), photos).total


class Restoration(nn.Module):
    """The loss of a super-resolution network on small photos [N, 3, H, W] and what they were."""

    def __init__(self, scale: int) -> None:
        super().__init__()
        self.net = SuperResolutionNet(scale)
        self.loss = PixelLoss()

    def forward(self, small: Tensor, photos: Tensor) -> Tensor:
        return self.loss(self.net(small), photos)


DTYPE = {"cpu": "fp32", "cuda": "amp"}[DEVICE]
TOLERANCE = {"fp32": (1e-5, 1e-2), "amp": (2e-2, 0.5)}[DTYPE]  # ReLUs that rounding switches

CASES = [
    Case(
        "training",
        "training step",
        f"{preset} {n}x3x{side}x{side} to {deepest}",
        DTYPE,
        module=lambda preset=preset, deepest=deepest, side=side: Objective(preset, deepest, side),
        inputs=lambda n=n, side=side: (image(n, side, side),),
        reference=forward,
        fused=forward,
        channels_last=True,
        costs=lambda deepest=deepest, n=n, side=side: style_costs(deepest, n, side, DTYPE),
        tolerance=TOLERANCE,
    )
    for preset, deepest, n, side in STYLES[DEVICE]
]
CASES += [
    Case(
        "training",
        "training step",
        f"x{scale} {n}x3x{side // scale}x{side // scale}, pixel loss",
        DTYPE,
        module=lambda scale=scale: Restoration(scale),
        inputs=lambda scale=scale, n=n, side=side: (image(n, side // scale, side // scale), image(n, side, side)),
        reference=forward,
        fused=forward,
        channels_last=True,
        tolerance=TOLERANCE,
    )
    for scale, n, side in SUPER_RESOLUTION[DEVICE]
]


@runs(CASES)
def test_training(measure, case, provider):
    measure(case, provider)
