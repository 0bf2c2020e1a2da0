"""A 3×3 convolution of stride 1."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from fastperc import ops

if TYPE_CHECKING:
    from fastperc.modules.norms import PaddingMode


class Conv3x3(nn.Conv2d):
    """A 3×3 convolution of stride 1; [N, in, H, W] → [N, out, H', W'].

    Equivalent to ``nn.Conv2d(in_channels, out_channels, 3, padding=padding, padding_mode=padding_mode)``, with its
    keys.
    """

    def __init__(
        self, in_channels: int, out_channels: int, padding: int = 0, *, padding_mode: PaddingMode = "zeros"
    ) -> None:
        super().__init__(in_channels, out_channels, 3, padding=padding, padding_mode=padding_mode)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        assert isinstance(self.padding, tuple)
        if self.padding_mode == "zeros":
            return ops.conv3x3(input, weight, bias, self.padding[0])
        padded = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
        return ops.conv3x3(padded, weight, bias, 0)
