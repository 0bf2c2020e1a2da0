"""Convolution, batch norm and ReLU: the layers of the style network that halve the size."""

from __future__ import annotations

from harness import DEVICE, runs
from networks import BOTH, INFERENCE, features, layer_cases, trained

from fastperc import ConvBNReLU

# (batch, in, out, height, width, directions): stride 2, 3×3; in inference those of images of 512² and 1080p
SHAPES = {
    "cpu": [(1, 32, 64, 128, 128, BOTH)],
    "cuda": [
        (4, 32, 64, 256, 256, BOTH),
        (4, 64, 128, 128, 128, BOTH),
        (1, 32, 64, 512, 512, INFERENCE),
        (1, 64, 128, 256, 256, INFERENCE),
        (1, 32, 64, 1080, 1920, INFERENCE),
        (1, 64, 128, 540, 960, INFERENCE),
    ],
}

CASES = [
    case
    for n, c_in, c_out, h, w, directions in SHAPES[DEVICE]
    for case in layer_cases(
        "conv_bn_relu",
        f"{n}x{c_in}x{h}x{w} to {c_out}, stride 2",
        module=lambda c_in=c_in, c_out=c_out: trained(ConvBNReLU(c_in, c_out, 3, stride=2, padding=1)),
        inputs=lambda n=n, c=c_in, h=h, w=w: (features(n, c, h, w, requires_grad=True),),
        directions=directions,
        trains=DEVICE == "cuda",
    )
]


@runs(CASES)
def test_conv_bn_relu(measure, case, provider):
    measure(case, provider)
