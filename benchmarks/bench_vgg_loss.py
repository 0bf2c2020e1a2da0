"""The loss network: its terms of output and content, and the output's gradient.

VGG-16 with content, style and variation terms, as style transfer trains; VGG-19 with the L1 distance before the ReLU,
as restoration networks train (BasicSR, Real-ESRGAN).
"""

from __future__ import annotations

from harness import DEVICE, Case, Measure, runs
from networks import image, layer_loss, loss, perceptual_loss, style_costs
from providers import Provider

# (deepest layer, batch, side)
SHAPES = {"cpu": [("relu2_2", 4, 256), ("relu3_3", 1, 128)], "cuda": [("relu4_3", 4, 256)]}
RESTORATION = {"cpu": [("conv5_4", 1, 256), ("conv5_4", 4, 256)], "cuda": [("conv5_4", 8, 512)]}
DTYPE = {"cpu": "fp32", "cuda": "amp"}[DEVICE]
TOLERANCE = {"fp32": (1e-5, 1e-3), "amp": (1e-2, 0.3)}[DTYPE]  # rounding switches some ReLUs
RESTORATION_TOLERANCE = {"fp32": (1e-5, 1e-2), "amp": (1e-2, 0.6)}[DTYPE]  # and signs of L1 distances


def make_case(deepest: str, n: int, side: int) -> Case:
    """Loss and gradient of ``n`` images of ``side``², with VGG-16 down to ``deepest``."""
    return Case(
        "vgg_loss",
        "forward+backward",
        f"{n}x3x{side}x{side} to {deepest}",
        DTYPE,
        module=lambda: perceptual_loss(deepest, side),
        inputs=lambda: (image(n, side, side, requires_grad=True), image(n, side, side)),
        reference=loss,
        fused=loss,
        channels_last=True,
        track_memory=True,
        costs=lambda: style_costs(deepest, n, side, DTYPE),
        tolerance=TOLERANCE,
    )


def restoration_case(layer: str, n: int, side: int) -> Case:
    """Loss and gradient of ``n`` images of ``side``² by VGG-19's ``layer``."""
    return Case(
        "vgg_loss",
        "forward+backward",
        f"{n}x3x{side}x{side}, VGG-19 {layer} L1",
        DTYPE,
        module=lambda: layer_loss(layer),
        inputs=lambda: (image(n, side, side, requires_grad=True), image(n, side, side)),
        reference=loss,
        fused=loss,
        channels_last=True,
        track_memory=True,
        tolerance=RESTORATION_TOLERANCE,
    )


CASES = [
    *(make_case(*shape) for shape in SHAPES[DEVICE]),
    *(restoration_case(*shape) for shape in RESTORATION[DEVICE]),
]


@runs(CASES)
def test_vgg_loss(measure: Measure, case: Case, provider: Provider) -> None:
    measure(case, provider)
