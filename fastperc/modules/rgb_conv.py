"""A convolution to an image."""

from __future__ import annotations

from torch import Tensor, nn

from fastperc import ops
from fastperc.modules.norms import PaddingMode


class RGBConv(nn.Conv2d):
    """A network's last convolution, to three channels; [N, in, H, W] → [N, 3, H', W'].

    Equivalent to ``nn.Conv2d(in_channels, 3, kernel_size, padding=padding, padding_mode=padding_mode)``, with its keys.
    """

    def __init__(
        self, in_channels: int, kernel_size: int, padding: int = 0, *, padding_mode: PaddingMode = "zeros"
    ) -> None:
        super().__init__(in_channels, 3, kernel_size, padding=padding, padding_mode=padding_mode)

    def layers(self) -> tuple[ops.Layer, ...]:
        """For :func:`fastperc.ops.conv_chain`."""
        return (ops.Layer(self, None, activation=None),)

    def forward(self, x: Tensor) -> Tensor:
        assert self.bias is not None and isinstance(self.padding, tuple)
        return ops.rgb_conv(x, self.weight, self.bias, self.padding[0], self.padding_mode)
