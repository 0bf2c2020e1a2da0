"""The 9×9 convolutions at the style network's two ends: from an image, which needs no gradient, and to an image."""

from __future__ import annotations

from harness import DEVICE, runs
from networks import features, image, layer_cases
from torch import nn

from fastperc import ConvBNReLU

# (batch, side)
SHAPES = {"cpu": [(1, 128)], "cuda": [(4, 256), (1, 1024)]}
ENDS = {
    "stem, 3 to 32": (
        lambda: ConvBNReLU(3, 32, 9, padding=4),
        lambda n, side: (image(n, side, side),),
    ),
    "head, 32 to 3": (
        lambda: nn.Conv2d(32, 3, 9, padding=4),
        lambda n, side: (features(n, 32, side, side, requires_grad=True),),
    ),
}

CASES = [
    case
    for n, side in SHAPES[DEVICE]
    for end, (module, inputs) in ENDS.items()
    for case in layer_cases(
        "rgb_conv",
        f"{end}, {n}x{side}x{side}",
        module=module,
        inputs=lambda inputs=inputs, n=n, side=side: inputs(n, side),
    )
]


@runs(CASES)
def test_rgb_conv(measure, case, provider):
    measure(case, provider)
