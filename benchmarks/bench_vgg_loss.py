"""The whole loss network: VGG-16 of output and content, content, style and variation terms, gradient of the output."""

from __future__ import annotations

from harness import DEVICE, Case, runs
from networks import image, loss, perceptual_loss, style_costs

# (deepest layer, batch, side)
SHAPES = {"cpu": [("relu2_2", 4, 256), ("relu3_3", 1, 128)], "cuda": [("relu4_3", 4, 256)]}
DTYPE = {"cpu": "fp32", "cuda": "amp"}[DEVICE]

CASES = [
    Case(
        "vgg_loss",
        "forward+backward",
        f"{n}x3x{side}x{side} to {deepest}",
        DTYPE,
        module=lambda deepest=deepest, side=side: perceptual_loss(deepest, side),
        inputs=lambda n=n, side=side: (image(n, side, side, requires_grad=True), image(n, side, side)),
        reference=loss,
        fused=loss,
        channels_last=True,
        track_memory=True,
        costs=lambda deepest=deepest, n=n, side=side: style_costs(deepest, n, side, DTYPE),
        tolerance={"fp32": (1e-5, 1e-3), "amp": (1e-2, 0.3)}[DTYPE],  # ReLUs that rounding switches
    )
    for deepest, n, side in SHAPES[DEVICE]
]


@runs(CASES)
def test_vgg_loss(measure, case, provider):
    measure(case, provider)
