"""The residual block of the paper's Figure 1."""

from __future__ import annotations

from harness import DEVICE, Case, Measure, runs
from networks import BOTH, INFERENCE, Directions, features, layer_cases, trained
from providers import Provider

from fastperc import ResidualBlock

# (batch, channels, height, width, directions): in inference the blocks of images of 512² and 1080p
SHAPES: list[tuple[int, int, int, int, Directions]] = {
    "cpu": [(1, 128, 64, 64, BOTH)],
    "cuda": [
        (4, 128, 64, 64, BOTH),
        (1, 128, 270, 270, BOTH),
        (1, 128, 128, 128, INFERENCE),
        (1, 128, 270, 480, INFERENCE),
    ],
}[DEVICE]


def make_cases(n: int, channels: int, height: int, width: int, directions: Directions) -> list[Case]:
    """A block on ``n`` feature maps of this size."""
    return layer_cases(
        "residual_block",
        f"{n}x{channels}x{height}x{width}",
        module=lambda: trained(ResidualBlock(channels)),
        inputs=lambda: (features(n, channels, height, width, requires_grad=True),),
        directions=directions,
        trains=True,
    )


CASES = [case for shape in SHAPES for case in make_cases(*shape)]


@runs(CASES)
def test_residual_block(measure: Measure, case: Case, provider: Provider) -> None:
    measure(case, provider)
