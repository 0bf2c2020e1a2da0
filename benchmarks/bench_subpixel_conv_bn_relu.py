"""The ½-stride convolution, batch norm and ReLU: the layers of the style network that double the size."""

from __future__ import annotations

from harness import DEVICE, runs
from networks import features, layer_cases

from fastperc import SubpixelConvBNReLU

# (batch, in, out, side of the input)
SHAPES = {"cpu": [(1, 64, 32, 64)], "cuda": [(4, 128, 64, 64), (4, 64, 32, 128)]}

CASES = [
    case
    for n, c_in, c_out, side in SHAPES[DEVICE]
    for case in layer_cases(
        "subpixel_conv_bn_relu",
        f"{n}x{c_in}x{side}x{side} to {c_out}",
        module=lambda c_in=c_in, c_out=c_out: SubpixelConvBNReLU(c_in, c_out),
        inputs=lambda n=n, c=c_in, side=side: (features(n, c, side, side, requires_grad=True),),
    )
]


@runs(CASES)
def test_subpixel_conv_bn_relu(measure, case, provider):
    measure(case, provider)
