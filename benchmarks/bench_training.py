"""A training step: network, loss network, backward and Adam, as `fastperc train` runs it."""

from __future__ import annotations

from harness import DEVICE, Case, runs
from networks import forward, image, perceptual_loss, style_costs
from torch import Tensor, nn

from fastperc import TransformNet

# (preset, deepest layer, batch, side)
SHAPES = {"cpu": [("paper", "relu2_2", 1, 128)], "cuda": [("paper", "relu4_3", 4, 256)]}


class Objective(nn.Module):
    """The loss of a style network on a batch of photos [N, 3, H, W]."""

    def __init__(self, preset: str, deepest: str, side: int) -> None:
        super().__init__()
        self.net = TransformNet(preset)
        self.loss = perceptual_loss(deepest, side)

    def forward(self, photos: Tensor) -> Tensor:
        return self.loss(self.net(photos), photos).total


DTYPE = {"cpu": "fp32", "cuda": "amp"}[DEVICE]

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
        tolerance={"fp32": (1e-5, 1e-2), "amp": (2e-2, 0.5)}[DTYPE],  # ReLUs that rounding switches
    )
    for preset, deepest, n, side in SHAPES[DEVICE]
]


@runs(CASES)
def test_training(measure, case, provider):
    measure(case, provider)
