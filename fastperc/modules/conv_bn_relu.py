"""Convolution, normalisation and ReLU as one module.

It trains as a layer of ``ops.conv_chain``; in a frozen network it is ``ops.conv_bn_relu``.
"""

from __future__ import annotations

from torch import Tensor, nn

from fastperc import ops
from fastperc.modules.chain import chain
from fastperc.modules.conv3x3 import Conv3x3
from fastperc.modules.norms import PaddingMode, WideStatistics, make_norm
from fastperc.types import RELU


class ConvBNReLU(WideStatistics):
    """``Conv2d`` → norm → ReLU; [N, in, H, W] → [N, out, H', W'].

    Equivalent to ``nn.Sequential(nn.Conv2d(…), nn.BatchNorm2d(out_channels), nn.ReLU())``, with the keys ``conv.*``
    and ``norm.*``. The convolution keeps its bias, as the paper's does.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, padding_mode: as ``nn.Conv2d``'s.
        norm: ``"batch"`` or ``"instance"`` (with scale and shift).
        relu: whether a ReLU follows the norm.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        *,
        padding_mode: PaddingMode = "zeros",
        norm: str = "batch",
        relu: bool = True,
    ) -> None:
        super().__init__()
        if (kernel_size, stride) == (3, 1):
            self.conv: nn.Conv2d = Conv3x3(in_channels, out_channels, padding, padding_mode=padding_mode)
        else:
            self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, padding_mode=padding_mode)
        self.norm = make_norm(norm, out_channels)
        self.relu = relu

    def layers(self) -> tuple[ops.Layer, ...]:
        """For :func:`fastperc.ops.conv_chain`."""
        return (ops.Layer(self.conv, self.norm, RELU if self.relu else None),)

    def forward(self, x: Tensor) -> Tensor:
        return chain(x, self.layers())
