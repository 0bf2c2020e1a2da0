"""Convolution, batch norm and ReLU: the layers of the style network that halve the size."""

from __future__ import annotations

from harness import DEVICE, runs
from networks import features, layer_cases

from fastperc import ConvBNReLU

# (batch, in, out, side): stride 2, 3×3
SHAPES = {"cpu": [(1, 32, 64, 128)], "cuda": [(4, 32, 64, 256), (4, 64, 128, 128)]}

CASES = [
    case
    for n, c_in, c_out, side in SHAPES[DEVICE]
    for case in layer_cases(
        "conv_bn_relu",
        f"{n}x{c_in}x{side}x{side} to {c_out}, stride 2",
        module=lambda c_in=c_in, c_out=c_out: ConvBNReLU(c_in, c_out, 3, stride=2, padding=1),
        inputs=lambda n=n, c=c_in, side=side: (features(n, c, side, side, requires_grad=True),),
    )
]


@runs(CASES)
def test_conv_bn_relu(measure, case, provider):
    measure(case, provider)
