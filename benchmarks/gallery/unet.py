"""U-Net with batch norms, for inputs of any size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class DoubleConv(nn.Module):
    """Convolution, batch norm and ReLU, twice, in the functional style."""

    def __init__(self, c_in: int, c_out: int, c_between: int | None = None) -> None:
        super().__init__()
        c_between = c_between or c_out
        self.conv1 = nn.Conv2d(c_in, c_between, kernel_size=3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_between)
        self.conv2 = nn.Conv2d(c_between, c_out, kernel_size=3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)), inplace=True)


class Down(nn.Module):
    """Max pooling and a double convolution."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.pool = nn.MaxPool2d(2)
        self.conv = DoubleConv(c_in, c_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.pool(x))


class Up(nn.Module):
    """Upsampling, concatenation with the map of the way down, and a double convolution."""

    def __init__(self, c_in: int, c_out: int, bilinear: bool) -> None:
        super().__init__()
        self.up: nn.Module
        if bilinear:
            self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
            self.conv = DoubleConv(c_in, c_out, c_in // 2)
        else:
            self.up = nn.ConvTranspose2d(c_in, c_in // 2, kernel_size=2, stride=2)
            self.conv = DoubleConv(c_in, c_out)

    def forward(self, x: Tensor, skipped: Tensor) -> Tensor:
        x = self.up(x)
        height = skipped.size(2) - x.size(2)
        width = skipped.size(3) - x.size(3)
        x = F.pad(x, [width // 2, width - width // 2, height // 2, height - height // 2])
        return self.conv(torch.cat([skipped, x], dim=1))


class UNet(nn.Module):
    """U-Net of four levels: [N, 3, H, W] to logits [N, ``classes``, H, W], H and W at least 16.

    Args:
        width: channels of the first level.
        bilinear: upsample bilinearly instead of by transposed convolutions.
        classes: channels of the result.
    """

    def __init__(self, width: int = 64, bilinear: bool = False, classes: int = 3) -> None:
        super().__init__()
        narrower = 2 if bilinear else 1
        self.inc = DoubleConv(3, width)
        self.down1 = Down(width, 2 * width)
        self.down2 = Down(2 * width, 4 * width)
        self.down3 = Down(4 * width, 8 * width)
        self.down4 = Down(8 * width, 16 * width // narrower)
        self.up1 = Up(16 * width, 8 * width // narrower, bilinear)
        self.up2 = Up(8 * width, 4 * width // narrower, bilinear)
        self.up3 = Up(4 * width, 2 * width // narrower, bilinear)
        self.up4 = Up(2 * width, width, bilinear)
        self.outc = nn.Conv2d(width, classes, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.inc(x)
        x2 = self.down1(x1)
        x3 = self.down2(x2)
        x4 = self.down3(x3)
        x5 = self.down4(x4)
        x = self.up1(x5, x4)
        x = self.up2(x, x3)
        x = self.up3(x, x2)
        x = self.up4(x, x1)
        return self.outc(x)
