"""Pictures and their gradients on the way into the wide kernels of a chain's first and last convolution."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastperc import kernels
from fastperc.ops.common import channels_last
from fastperc.types import Padding, Window

if TYPE_CHECKING:
    from fastperc.kernels.sum_parts import SumOf


class Rgb(NamedTuple):
    """An image or a gradient that the wide kernels load."""

    x: Tensor  # [N, 3, H, W]
    padding: Padding
    scaling: tuple[float, float] = (1.0, 0.0)  # what multiplies it, and what is added

    def prepared(self, dtype: torch.dtype, runs: Any = None) -> Tensor:
        """As the kernels load it, in ``dtype``."""
        window = Window(0, 0, *self.x.shape[2:])
        return kernels.rgb_conv_stem.rgb_prepare(self.x, window, self.padding, self.scaling, dtype, runs)


SCALINGS = {None: (1.0, 0.0), "tanh": (2.0, -1.0), "linear": (255.0, 0.0)}  # of reference.to_network_range


def gradient_of_raw(grad: Tensor, raw: Tensor, output: str) -> Tensor:
    """The gradient of the convolution's own values ``raw`` [N, 3, H, W], from that of the picture that ``output`` makes
    of them: channels-last, in their dtype."""
    module, (n, _, height, width) = kernels.rgb_conv_stem, grad.shape
    scaling, runs = (150 / 255 if output == "tanh" else 1 / 255, 0.0), module.Runs(width, 3, 3)
    grad = grad if grad.stride() == raw.stride() else channels_last(grad)
    window = Window(0, 0, height, width)
    rows = module.rgb_prepare(grad, window, Padding(), scaling, raw.dtype, runs, raw if output == "tanh" else None)
    return rows.view(n, height, width, 3).permute(0, 3, 1, 2)


def rgb_weight_gradient(dense: Tensor, rgb: Rgb, kernel: int, border: int, to_rgb: bool, destination: SumOf) -> None:
    """The weight's gradient from a map [N, D, H, W] with a reflected border, and the image or gradient ``rgb``."""
    module = kernels.rgb_weight_gradient
    picture = rgb.prepared(dense.dtype, module.picture_runs(dense.shape[3] + 2 * border, kernel))
    module.rgb_weight_gradient(dense, picture, kernel, border, to_rgb, destination)
