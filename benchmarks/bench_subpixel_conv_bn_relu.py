"""The ½-stride convolution, batch norm and ReLU: the layers of the style network that double the size."""

from __future__ import annotations

from harness import DEVICE, Case, Measure, runs
from networks import BOTH, INFERENCE, Directions, features, layer_cases, trained
from providers import Provider

from fastperc import SubpixelConvBNReLU

# (batch, in, out, height and width of the input, directions): in inference the layers of images of 512² and 1080p
SHAPES: list[tuple[int, int, int, int, int, Directions]] = {
    "cpu": [(1, 64, 32, 64, 64, BOTH)],
    "cuda": [
        (4, 128, 64, 64, 64, BOTH),
        (4, 64, 32, 128, 128, BOTH),
        (1, 128, 64, 128, 128, INFERENCE),
        (1, 64, 32, 256, 256, INFERENCE),
        (1, 128, 64, 270, 480, INFERENCE),
        (1, 64, 32, 540, 960, INFERENCE),
    ],
}[DEVICE]


def make_cases(n: int, c_in: int, c_out: int, height: int, width: int, directions: Directions) -> list[Case]:
    """A layer on ``n`` feature maps of this size."""
    return layer_cases(
        "subpixel_conv_bn_relu",
        f"{n}x{c_in}x{height}x{width} to {c_out}",
        module=lambda: trained(SubpixelConvBNReLU(c_in, c_out)),
        inputs=lambda: (features(n, c_in, height, width, requires_grad=True),),
        directions=directions,
        trains=DEVICE == "cuda",
    )


CASES = [case for shape in SHAPES for case in make_cases(*shape)]


@runs(CASES)
def test_subpixel_conv_bn_relu(measure: Measure, case: Case, provider: Provider) -> None:
    measure(case, provider)
