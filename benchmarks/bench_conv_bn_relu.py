"""Convolution, batch norm and ReLU: the layers of the style network that halve the size."""

from __future__ import annotations

from harness import DEVICE, Case, Measure, runs
from networks import BOTH, INFERENCE, Directions, features, layer_cases, trained
from providers import Provider

from fastperc import ConvBNReLU

# (batch, in, out, height, width, directions): stride 2, 3×3; in inference the layers of images of 512² and 1080p
SHAPES: list[tuple[int, int, int, int, int, Directions]] = {
    "cpu": [(1, 32, 64, 128, 128, BOTH)],
    "cuda": [
        (4, 32, 64, 256, 256, BOTH),
        (4, 64, 128, 128, 128, BOTH),
        (1, 32, 64, 512, 512, INFERENCE),
        (1, 64, 128, 256, 256, INFERENCE),
        (1, 32, 64, 1080, 1920, INFERENCE),
        (1, 64, 128, 540, 960, INFERENCE),
    ],
}[DEVICE]


def make_cases(n: int, c_in: int, c_out: int, height: int, width: int, directions: Directions) -> list[Case]:
    """A layer on ``n`` feature maps of this size."""
    return layer_cases(
        "conv_bn_relu",
        f"{n}x{c_in}x{height}x{width} to {c_out}, stride 2",
        module=lambda: trained(ConvBNReLU(c_in, c_out, 3, stride=2, padding=1)),
        inputs=lambda: (features(n, c_in, height, width, requires_grad=True),),
        directions=directions,
        trains=DEVICE == "cuda",
    )


CASES = [case for shape in SHAPES for case in make_cases(*shape)]


@runs(CASES)
def test_conv_bn_relu(measure: Measure, case: Case, provider: Provider) -> None:
    measure(case, provider)
