"""The super-resolution network of the paper's Table 2, and the SRCNN it is compared with."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from fastperc import reference
from fastperc.models.common import Network, check_image, initialise_as_authors, pictures_in_a_row
from fastperc.modules import ConvBNReLU, ResidualBlock, RGBConv, SubpixelConvBNReLU


class SuperResolutionNet(Network):
    """Johnson et al.'s super-resolution network: RGB in 0–1 [N, 3, H, W] → RGB [N, 3, scale·H, scale·W].

    9×9 conv, four residual blocks of ``width`` filters, log2(scale) ½-stride convs, 9×9 conv; zero padding, batch
    norm, scaled tanh. The output is not clamped.

    Args:
        scale: 4 or 8 in the paper; any power of two from 2 up.
        width: filters of every layer but the last; 64 in the paper.
        upsample: ``"transposed"``, the paper's ½-stride convs, or ``"nearest"``: each is a 3×3 conv after
            nearest-neighbour upsampling ×2.

    Raises:
        ValueError: a scale that is no power of two; another ``upsample``; on forward, a shape that is not
            [N, 3, H ≥ 16, W ≥ 16].
    """

    def __init__(self, scale: int = 4, width: int = 64, upsample: str = "transposed") -> None:
        super().__init__()
        if scale < 2 or scale & (scale - 1):
            raise ValueError(f"scale must be a power of two, at least 2, got {scale}")
        self.config: dict[str, Any] = dict(scale=scale, width=width)
        if upsample != "transposed":  # as in files that name none
            self.config["upsample"] = upsample
        self.stem = ConvBNReLU(3, width, 9, padding=4)
        self.blocks = nn.Sequential(*(ResidualBlock(width) for _ in range(4)))
        self.up = nn.Sequential(
            *(SubpixelConvBNReLU(width, width, upsample=upsample) for _ in range(scale.bit_length() - 1))
        )
        self.head = RGBConv(width, 9, padding=4)
        initialise_as_authors(self)

    def forward(self, x: Tensor) -> Tensor:
        check_image(x)
        return pictures_in_a_row(x, (self.stem, *self.blocks, *self.up, self.head), "tanh")


class SRCNN(Network):
    """Dong et al.'s network, the paper's super-resolution baseline: RGB in 0–1 [N, 3, H, W] → [N, 3, scale·H, scale·W].

    Bicubic upscaling, then three convolutions on the luma alone (1→64→32→1, ReLU between); the chroma stays bicubic.

    Args:
        scale: the upscaling factor.
        kernel_sizes: ``(9, 5, 5)`` or ``(9, 1, 5)`` in the literature; odd.

    Raises:
        ValueError: on forward, a shape that is not [N, 3, H ≥ 16, W ≥ 16].
    """

    def __init__(self, scale: int = 4, kernel_sizes: tuple[int, int, int] = (9, 5, 5)) -> None:
        super().__init__()
        self.config = dict(scale=scale, kernel_sizes=tuple(kernel_sizes))
        self.scale = scale
        k1, k2, k3 = kernel_sizes
        # How far the output depends on the input, in its pixels to each side: the cubic's two and the kernels' halves.
        self.margin = 2 + math.ceil((k1 // 2 + k2 // 2 + k3 // 2) / scale)
        self.conv1 = nn.Conv2d(1, 64, k1, padding=k1 // 2)
        self.conv2 = nn.Conv2d(64, 32, k2, padding=k2 // 2)
        self.conv3 = nn.Conv2d(32, 1, k3, padding=k3 // 2)

    def forward(self, x: Tensor) -> Tensor:
        check_image(x)
        wide = reference.bicubic(x, (self.scale * x.shape[2], self.scale * x.shape[3]))
        x = wide.to(x.dtype)
        y = reference.luma(x)
        restored = self.conv3(self.conv2(self.conv1(y).relu()).relu())
        return x + (restored - y)
