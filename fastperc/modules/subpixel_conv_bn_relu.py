"""The paper's ½-stride convolution, normalisation and ReLU as one module.

It trains as a layer of ``ops.conv_chain``; in a frozen network it is ``ops.subpixel_conv_bn_relu``.
"""

from __future__ import annotations

from torch import Tensor, nn

from fastperc import ops
from fastperc.modules.chain import chain
from fastperc.modules.conv3x3 import Conv3x3
from fastperc.modules.norms import PaddingMode, WideStatistics, make_norm


class SubpixelConvBNReLU(WideStatistics):
    """×2 upsampling convolution → norm → ReLU; [N, in, H, W] → [N, out, 2H, 2W].

    Args:
        in_channels, out_channels: as ``nn.Conv2d``'s; the kernel is 3×3.
        upsample: ``"transposed"`` is the paper's ½-stride convolution, ``nn.ConvTranspose2d(in, out, 3, stride=2,
            padding=1, output_padding=1)``. ``"nearest"`` repeats each pixel and convolves: no checkerboard.
        padding_mode: of the ``"nearest"`` convolution, as ``nn.Conv2d``'s; a transposed one pads with zeros.
        norm: ``"batch"`` or ``"instance"``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        upsample: str = "transposed",
        padding_mode: PaddingMode = "zeros",
        norm: str = "batch",
    ) -> None:
        super().__init__()
        if upsample == "transposed":
            self.conv: nn.Module = nn.ConvTranspose2d(
                in_channels, out_channels, 3, stride=2, padding=1, output_padding=1
            )
        elif upsample == "nearest":
            self.conv = Conv3x3(in_channels, out_channels, 1, padding_mode=padding_mode)
        else:
            raise ValueError(f"upsample must be 'transposed' or 'nearest', got {upsample!r}")
        self.norm = make_norm(norm, out_channels)
        self.upsample = upsample

    def layers(self) -> tuple[ops.Layer, ...]:
        """For :func:`fastperc.ops.conv_chain`."""
        return (ops.Layer(self.conv, self.norm, upsample=self.upsample),)

    def forward(self, x: Tensor) -> Tensor:
        return chain(x, self.layers())
