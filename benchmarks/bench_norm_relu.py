"""A norm and the ReLU after it, in training."""

from __future__ import annotations

from harness import DEVICE, Case, Measure, runs
from networks import features, layer_cases
from providers import Provider
from torch import Tensor, nn

from fastperc import ops

# (norm, (batch, channels, height, width))
SHAPES = [("batch", (4, 32, 256, 256)), ("batch", (4, 128, 64, 64)), ("instance", (4, 32, 256, 256))]


class NormReLU(nn.Module):
    """The end of a layer."""

    def __init__(self, norm: str, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels) if norm == "batch" else nn.InstanceNorm2d(channels, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        return ops.norm_relu(x, self.norm)


def make_cases(norm: str, shape: tuple[int, int, int, int]) -> list[Case]:
    """Training on features of ``shape``."""
    return layer_cases(
        "norm_relu",
        f"{norm} norm, {'x'.join(map(str, shape))}",
        module=lambda: NormReLU(norm, channels=shape[1]),
        inputs=lambda: (features(*shape, requires_grad=True),),
        directions=["forward+backward"],
        rounding=1e-3,  # PyTorch adds up a channel of NHWC in float32
        trains=DEVICE == "cpu",
    )


CASES = [case for norm, shape in SHAPES for case in make_cases(norm, shape)]


@runs(CASES)
def test_norm_relu(measure: Measure, case: Case, provider: Provider) -> None:
    measure(case, provider)
