"""The residual block of the paper's Figure 1."""

from __future__ import annotations

from harness import DEVICE, runs
from networks import BOTH, INFERENCE, features, layer_cases, trained

from fastperc import ResidualBlock

# (batch, channels, height, width, directions): in inference those of images of 512² and 1080p
SHAPES = {
    "cpu": [(1, 128, 64, 64, BOTH)],
    "cuda": [
        (4, 128, 64, 64, BOTH),
        (1, 128, 270, 270, BOTH),
        (1, 128, 128, 128, INFERENCE),
        (1, 128, 270, 480, INFERENCE),
    ],
}

CASES = [
    case
    for n, c, h, w, directions in SHAPES[DEVICE]
    for case in layer_cases(
        "residual_block",
        f"{n}x{c}x{h}x{w}",
        module=lambda c=c: trained(ResidualBlock(c)),
        inputs=lambda n=n, c=c, h=h, w=w: (features(n, c, h, w, requires_grad=True),),
        directions=directions,
        trains=True,
    )
]


@runs(CASES)
def test_residual_block(measure, case, provider):
    measure(case, provider)
