"""The residual block of the paper's Figure 1, and the two blocks it is compared with."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from fastperc import ops
from fastperc.modules.chain import chain
from fastperc.modules.conv3x3 import Conv3x3
from fastperc.modules.norms import PaddingMode, WideStatistics, make_norm
from fastperc.types import RELU


class ResidualBlock(WideStatistics):
    """Two 3×3 convolutions of ``channels`` filters; [N, C, H, W] → [N, C, H', W'], H' = H when ``padding`` is 1.

    Args:
        channels: filters of both convolutions.
        padding: 1 keeps the size; 0 trims 2 pixels a side, and the skip is cropped to match (``eccv16``).
        padding_mode: as ``nn.Conv2d``'s.
        norm: ``"batch"`` or ``"instance"``.
        residual: ``True`` is the paper's block (Gross & Wilber): conv–norm–ReLU–conv–norm plus the input, and no ReLU
            after the addition. ``"he"`` adds that ReLU (He et al.). ``False`` is the equivalent plain block,
            conv–norm–ReLU–conv–norm–ReLU.
    """

    def __init__(
        self,
        channels: int,
        padding: int = 1,
        *,
        padding_mode: PaddingMode = "zeros",
        norm: str = "batch",
        residual: bool | Literal["he"] = True,
    ) -> None:
        super().__init__()
        if residual not in (True, False, "he"):
            raise ValueError(f"residual must be True, False or 'he', got {residual!r}")
        self.conv1 = Conv3x3(channels, channels, padding, padding_mode=padding_mode)
        self.norm1 = make_norm(norm, channels)
        self.conv2 = Conv3x3(channels, channels, padding, padding_mode=padding_mode)
        self.norm2 = make_norm(norm, channels)
        self.residual = residual

    def layers(self) -> tuple[ops.Layer, ...]:
        """For :func:`fastperc.ops.conv_chain`."""
        activation = None if self.residual is True else RELU
        last = ops.Layer(self.conv2, self.norm2, activation, skip=bool(self.residual))
        return ops.Layer(self.conv1, self.norm1), last

    def forward(self, x: Tensor) -> Tensor:
        return chain(x, self.layers())
