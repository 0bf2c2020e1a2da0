"""The loss network: VGG-16 of output and content, content, style and variation terms, and the output's gradient."""

from __future__ import annotations

from harness import DEVICE, Case, Measure, runs
from networks import image, loss, perceptual_loss, style_costs
from providers import Provider

# (deepest layer, batch, side)
SHAPES = {"cpu": [("relu2_2", 4, 256), ("relu3_3", 1, 128)], "cuda": [("relu4_3", 4, 256)]}
DTYPE = {"cpu": "fp32", "cuda": "amp"}[DEVICE]
TOLERANCE = {"fp32": (1e-5, 1e-3), "amp": (1e-2, 0.3)}[DTYPE]  # rounding switches some ReLUs


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


CASES = [make_case(*shape) for shape in SHAPES[DEVICE]]


@runs(CASES)
def test_vgg_loss(measure: Measure, case: Case, provider: Provider) -> None:
    measure(case, provider)
