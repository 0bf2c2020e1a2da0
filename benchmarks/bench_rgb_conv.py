"""The 9×9 convolutions at the two ends of the style network: from an image, which needs no gradient, and to an image.

Two cases work on levels (uint8), with the conversions of a network's ends; the others on plain tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from harness import DEVICE, Case, Measure, runs
from networks import BOTH, INFERENCE, Directions, FromLevels, ToLevels, features, image, layer_cases, levels, trained
from providers import Provider
from torch import Tensor, nn

from fastperc import ConvBNReLU
from fastperc.modules import RGBConv

Size = tuple[int, int, int]  # batch, height, width

SIZES: list[Size] = {
    "cpu": [(1, 128, 128)],
    "cuda": [(4, 256, 256), (1, 1024, 1024), (1, 512, 512), (1, 1080, 1920)],
}[DEVICE]
TRAINED = SIZES[:2]  # the sizes that are measured in training too


def stem() -> nn.Module:
    """The first layer."""
    return trained(ConvBNReLU(3, 32, 9, padding=4))


def head() -> nn.Module:
    """The last layer."""
    return RGBConv(32, 9, padding=4)


def head_features(n: int, height: int, width: int) -> Tensor:
    """Features for :func:`head`."""
    return features(n, 32, height, width, requires_grad=True)


class End(NamedTuple):
    """A convolution at an end of the network."""

    name: str
    module: Callable[[], nn.Module]
    make_input: Callable[[int, int, int], Tensor]
    directions: Directions


ENDS = [
    End("stem, 3 to 32", stem, image, BOTH),
    End("stem from levels, 3 to 32", lambda: FromLevels(stem()), levels, INFERENCE),
    End("head, 32 to 3", head, head_features, BOTH),
    End("head to levels, 32 to 3", lambda: ToLevels(head()), head_features, INFERENCE),
]


def make_cases(end: End, size: Size) -> list[Case]:
    """``end`` on an input of ``size``."""
    return layer_cases(
        "rgb_conv",
        f"{end.name}, {'x'.join(map(str, size))}",
        module=end.module,
        inputs=lambda: (end.make_input(*size),),
        directions=end.directions if size in TRAINED else INFERENCE,
        rounding=1e-3 if end.name.startswith("head to levels") else 0.0,
        trains=DEVICE == "cpu" and end.name.startswith("head"),
    )


CASES = [case for size in SIZES for end in ENDS for case in make_cases(end, size)]


@runs(CASES)
def test_rgb_conv(measure: Measure, case: Case, provider: Provider) -> None:
    measure(case, provider)
