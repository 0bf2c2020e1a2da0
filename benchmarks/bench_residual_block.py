"""The residual block of the paper's Figure 1."""

from __future__ import annotations

from harness import DEVICE, runs
from networks import features, layer_cases

from fastperc import ResidualBlock

# (batch, channels, side)
SHAPES = {"cpu": [(1, 128, 64)], "cuda": [(4, 128, 64), (1, 128, 270)]}

CASES = [
    case
    for n, c, side in SHAPES[DEVICE]
    for case in layer_cases(
        "residual_block",
        f"{n}x{c}x{side}x{side}",
        module=lambda c=c: ResidualBlock(c),
        inputs=lambda n=n, c=c, side=side: (features(n, c, side, side, requires_grad=True),),
    )
]


@runs(CASES)
def test_residual_block(measure, case, provider):
    measure(case, provider)
