"""The ½-stride convolution, batch norm and ReLU: the layers of the style network that double the size."""

from __future__ import annotations

from harness import DEVICE, runs
from networks import BOTH, INFERENCE, features, layer_cases, trained

from fastperc import SubpixelConvBNReLU

# (batch, in, out, height and width of the input, directions): in inference those of images of 512² and 1080p
SHAPES = {
    "cpu": [(1, 64, 32, 64, 64, BOTH)],
    "cuda": [
        (4, 128, 64, 64, 64, BOTH),
        (4, 64, 32, 128, 128, BOTH),
        (1, 128, 64, 128, 128, INFERENCE),
        (1, 64, 32, 256, 256, INFERENCE),
        (1, 128, 64, 270, 480, INFERENCE),
        (1, 64, 32, 540, 960, INFERENCE),
    ],
}

CASES = [
    case
    for n, c_in, c_out, h, w, directions in SHAPES[DEVICE]
    for case in layer_cases(
        "subpixel_conv_bn_relu",
        f"{n}x{c_in}x{h}x{w} to {c_out}",
        module=lambda c_in=c_in, c_out=c_out: trained(SubpixelConvBNReLU(c_in, c_out)),
        inputs=lambda n=n, c=c_in, h=h, w=w: (features(n, c, h, w, requires_grad=True),),
        directions=directions,
        trains=DEVICE == "cuda",
    )
]


@runs(CASES)
def test_subpixel_conv_bn_relu(measure, case, provider):
    measure(case, provider)
