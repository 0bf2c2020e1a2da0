"""The 9×9 convolutions at the style network's two ends: from an image, which needs no gradient, and to an image.

Between levels (uint8) and features they stand with all that a network does there; else bare.
"""

from __future__ import annotations

from harness import DEVICE, runs
from networks import BOTH, INFERENCE, FromLevels, ToLevels, features, image, layer_cases, levels, trained
from torch import Tensor, nn

from fastperc import ConvBNReLU
from fastperc.modules import RGBConv

# (batch, height, width)
SHAPES = {"cpu": [(1, 128, 128)], "cuda": [(4, 256, 256), (1, 1024, 1024), (1, 512, 512), (1, 1080, 1920)]}
TRAINED = {"cpu": SHAPES["cpu"], "cuda": SHAPES["cuda"][:2]}


def stem() -> nn.Module:
    return trained(ConvBNReLU(3, 32, 9, padding=4))


def head() -> nn.Module:
    return RGBConv(32, 9, padding=4)


def maps(n: int, height: int, width: int) -> Tensor:
    return features(n, 32, height, width, requires_grad=True)


ENDS = {  # module, inputs, directions
    "stem, 3 to 32": (stem, image, BOTH),
    "stem from levels, 3 to 32": (lambda: FromLevels(stem()), levels, INFERENCE),
    "head, 32 to 3": (head, maps, BOTH),
    "head to levels, 32 to 3": (lambda: ToLevels(head()), maps, INFERENCE),
}

CASES = [
    case
    for size in SHAPES[DEVICE]
    for end, (module, inputs, directions) in ENDS.items()
    for case in layer_cases(
        "rgb_conv",
        f"{end}, {'x'.join(map(str, size))}",
        module=module,
        inputs=lambda inputs=inputs, size=size: (inputs(*size),),
        directions=directions if size in TRAINED[DEVICE] else INFERENCE,
        rounding=1e-3 if end.startswith("head to levels") else 0.0,
        trains=DEVICE == "cpu" and end.startswith("head"),
    )
]


@runs(CASES)
def test_rgb_conv(measure, case, provider):
    measure(case, provider)
