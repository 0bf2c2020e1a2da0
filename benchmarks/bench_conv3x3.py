"""A 3×3 convolution of stride 1, in training: the trunk's, and a loss network's, whose weights want no gradient."""

from __future__ import annotations

from harness import DEVICE, runs
from networks import features, layer_cases
from torch import nn

from fastperc.modules import Conv3x3

# (batch, in, out, height, width), and whether the weights are frozen
SHAPES = [
    (1, 128, 128, 32, 32, False),
    (4, 128, 128, 64, 64, False),
    (1, 64, 64, 72, 72, False),
    (1, 64, 64, 256, 256, True),
    (1, 512, 512, 32, 32, True),
]


def convolution(i: int, o: int, frozen: bool) -> nn.Module:
    return Conv3x3(i, o, padding=1).requires_grad_(not frozen)


CASES = [
    case
    for n, i, o, h, w, frozen in SHAPES
    for case in layer_cases(
        "conv3x3",
        f"{i} to {o}{', frozen' * frozen}, {n}x{h}x{w}",
        module=lambda i=i, o=o, frozen=frozen: convolution(i, o, frozen),
        inputs=lambda n=n, i=i, h=h, w=w: (features(n, i, h, w, requires_grad=True),),
        directions=["forward+backward"],
        trains=DEVICE == "cpu",
    )
]


@runs(CASES)
def test_conv3x3(measure, case, provider):
    measure(case, provider)
