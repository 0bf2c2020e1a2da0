"""A 3×3 convolution of stride 1, in training: a network's, and a loss network's, whose weights need no gradient."""

from __future__ import annotations

from harness import DEVICE, Case, Measure, runs
from networks import features, layer_cases
from providers import Provider
from torch import nn

from fastperc.modules import Conv3x3

# (batch, in, out, height, width, whether the weights are frozen)
SHAPES = [
    (1, 128, 128, 32, 32, False),
    (4, 128, 128, 64, 64, False),
    (1, 64, 64, 72, 72, False),
    (1, 64, 64, 256, 256, True),
    (1, 512, 512, 32, 32, True),
]


def make_cases(n: int, c_in: int, c_out: int, height: int, width: int, frozen: bool) -> list[Case]:
    """Training on ``n`` feature maps of this size."""

    def module() -> nn.Module:
        return Conv3x3(c_in, c_out, padding=1).requires_grad_(not frozen)

    return layer_cases(
        "conv3x3",
        f"{c_in} to {c_out}{', frozen' * frozen}, {n}x{height}x{width}",
        module=module,
        inputs=lambda: (features(n, c_in, height, width, requires_grad=True),),
        directions=["forward+backward"],
        trains=DEVICE == "cpu",
    )


CASES = [case for shape in SHAPES for case in make_cases(*shape)]


@runs(CASES)
def test_conv3x3(measure: Measure, case: Case, provider: Provider) -> None:
    measure(case, provider)
