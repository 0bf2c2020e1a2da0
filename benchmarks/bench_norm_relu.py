"""A norm and the ReLU after it, in training."""

from __future__ import annotations

from harness import DEVICE, runs
from networks import features, layer_cases
from torch import Tensor, nn

from fastperc import ops

# (norm, batch, channels, height, width)
SHAPES = [("batch", 4, 32, 256, 256), ("batch", 4, 128, 64, 64), ("instance", 4, 32, 256, 256)]
NORMS = {"batch": nn.BatchNorm2d, "instance": lambda channels: nn.InstanceNorm2d(channels, affine=True)}


class NormReLU(nn.Module):
    """The end of a layer."""

    def __init__(self, norm: str, channels: int) -> None:
        super().__init__()
        self.norm = NORMS[norm](channels)

    def forward(self, x: Tensor) -> Tensor:
        return ops.norm_relu(x, self.norm)


CASES = [
    case
    for norm, *shape in SHAPES
    for case in layer_cases(
        "norm_relu",
        f"{norm} norm, {'x'.join(map(str, shape))}",
        module=lambda norm=norm, channels=shape[1]: NormReLU(norm, channels),
        inputs=lambda shape=shape: (features(*shape, requires_grad=True),),
        directions=["forward+backward"],
        rounding=1e-3,  # PyTorch adds up a channel of NHWC in float32
        trains=DEVICE == "cpu",
    )
]


@runs(CASES)
def test_norm_relu(measure, case, provider):
    measure(case, provider)
