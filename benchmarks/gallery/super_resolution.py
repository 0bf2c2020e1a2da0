"""EDSR-baseline, SRResNet and RRDBNet (ESRGAN's generator), all for four times the size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MEANS = (0.4488, 0.4371, 0.4040)  # of DIV2K, RGB in 0–1


class MeanShift(nn.Conv2d):
    """Adds ``sign`` times DIV2K's mean colour, as a fixed 1×1 convolution."""

    def __init__(self, sign: int) -> None:
        super().__init__(3, 3, kernel_size=1)
        self.weight.data = torch.eye(3).view(3, 3, 1, 1)
        self.bias = nn.Parameter(sign * torch.tensor(MEANS))
        for parameter in self.parameters():
            parameter.requires_grad = False


class ResBlock(nn.Module):
    """EDSR's block: two convolutions and no norm; ``res_scale`` times their result is added to the input."""

    def __init__(self, channels: int, res_scale: float) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(True), nn.Conv2d(channels, channels, 3, padding=1)
        )
        self.res_scale = res_scale

    def forward(self, x: Tensor) -> Tensor:
        res = self.body(x).mul(self.res_scale)
        res += x
        return res


class EDSR(nn.Module):
    """EDSR-baseline ×4: [N, 3, H, W], RGB in 0–1, to [N, 3, 4H, 4W]."""

    def __init__(self, width: int = 64, blocks: int = 16, res_scale: float = 1.0) -> None:
        super().__init__()
        self.sub_mean = MeanShift(-1)
        self.add_mean = MeanShift(1)
        self.head = nn.Sequential(nn.Conv2d(3, width, 3, padding=1))
        self.body = nn.Sequential(
            *(ResBlock(width, res_scale) for _ in range(blocks)), nn.Conv2d(width, width, 3, padding=1)
        )
        doubled = [[nn.Conv2d(width, 4 * width, 3, padding=1), nn.PixelShuffle(2)] for _ in range(2)]
        self.tail = nn.Sequential(nn.Sequential(*doubled[0], *doubled[1]), nn.Conv2d(width, 3, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.sub_mean(x)
        x = self.head(x)
        res = self.body(x)
        res += x
        x = self.tail(res)
        x = self.add_mean(x)
        return x


class SRResBlock(nn.Module):
    """SRResNet's block, with a PReLU of a slope for each channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.prelu = nn.PReLU(channels)
        self.conv2 = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        residual = self.prelu(self.bn1(self.conv1(x)))
        residual = self.bn2(self.conv2(residual))
        return x + residual


class UpsampleBlock(nn.Module):
    """A convolution to four times the channels, PixelShuffle, and a PReLU of one slope."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 4 * channels, kernel_size=3, padding=1)
        self.pixel_shuffle = nn.PixelShuffle(2)
        self.prelu = nn.PReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.prelu(self.pixel_shuffle(self.conv(x)))


class SRResNet(nn.Module):
    """SRResNet ×4: [N, 3, H, W] to [N, 3, 4H, 4W]."""

    def __init__(self, width: int = 64, blocks: int = 16) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Conv2d(3, width, kernel_size=9, padding=4), nn.PReLU())
        self.blocks = nn.Sequential(*(SRResBlock(width) for _ in range(blocks)))
        self.body = nn.Sequential(nn.Conv2d(width, width, kernel_size=3, padding=1), nn.BatchNorm2d(width))
        self.upsample = nn.Sequential(UpsampleBlock(width), UpsampleBlock(width))
        self.tail = nn.Conv2d(width, 3, kernel_size=9, padding=4)

    def forward(self, x: Tensor) -> Tensor:
        first = self.head(x)
        y = self.blocks(first)
        y = self.body(y)
        y = self.upsample(first + y)
        return self.tail(y)


class ResidualDenseBlock(nn.Module):
    """Five convolutions, each of all maps before it; one LeakyReLU module is called four times."""

    def __init__(self, num_feat: int, num_grow_ch: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(num_feat, num_grow_ch, 3, 1, 1)
        self.conv2 = nn.Conv2d(num_feat + num_grow_ch, num_grow_ch, 3, 1, 1)
        self.conv3 = nn.Conv2d(num_feat + 2 * num_grow_ch, num_grow_ch, 3, 1, 1)
        self.conv4 = nn.Conv2d(num_feat + 3 * num_grow_ch, num_grow_ch, 3, 1, 1)
        self.conv5 = nn.Conv2d(num_feat + 4 * num_grow_ch, num_feat, 3, 1, 1)
        self.lrelu = nn.LeakyReLU(negative_slope=0.2, inplace=True)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # a tenth of Kaiming's, so that deep networks start near the identity
                nn.init.kaiming_normal_(module.weight)
                module.weight.data *= 0.1

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.lrelu(self.conv1(x))
        x2 = self.lrelu(self.conv2(torch.cat((x, x1), 1)))
        x3 = self.lrelu(self.conv3(torch.cat((x, x1, x2), 1)))
        x4 = self.lrelu(self.conv4(torch.cat((x, x1, x2, x3), 1)))
        x5 = self.conv5(torch.cat((x, x1, x2, x3, x4), 1))
        return x5 * 0.2 + x


class RRDB(nn.Module):
    """Three dense blocks in a residual block."""

    def __init__(self, num_feat: int, num_grow_ch: int) -> None:
        super().__init__()
        self.rdb1 = ResidualDenseBlock(num_feat, num_grow_ch)
        self.rdb2 = ResidualDenseBlock(num_feat, num_grow_ch)
        self.rdb3 = ResidualDenseBlock(num_feat, num_grow_ch)

    def forward(self, x: Tensor) -> Tensor:
        out = self.rdb1(x)
        out = self.rdb2(out)
        out = self.rdb3(out)
        return out * 0.2 + x


class RRDBNet(nn.Module):
    """ESRGAN's generator ×4: [N, 3, H, W] to [N, 3, 4H, 4W]. The published one has 23 blocks."""

    def __init__(self, num_feat: int = 64, num_block: int = 3, num_grow_ch: int = 32) -> None:
        super().__init__()
        self.conv_first = nn.Conv2d(3, num_feat, 3, 1, 1)
        self.body = nn.Sequential(*(RRDB(num_feat, num_grow_ch) for _ in range(num_block)))
        self.conv_body = nn.Conv2d(num_feat, num_feat, 3, 1, 1)
        self.conv_up1 = nn.Conv2d(num_feat, num_feat, 3, 1, 1)
        self.conv_up2 = nn.Conv2d(num_feat, num_feat, 3, 1, 1)
        self.conv_hr = nn.Conv2d(num_feat, num_feat, 3, 1, 1)
        self.conv_last = nn.Conv2d(num_feat, 3, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        feat = self.conv_first(x)
        body_feat = self.conv_body(self.body(feat))
        feat = feat + body_feat
        feat = F.leaky_relu(self.conv_up1(F.interpolate(feat, scale_factor=2, mode="nearest")), 0.2, inplace=True)
        feat = F.leaky_relu(self.conv_up2(F.interpolate(feat, scale_factor=2, mode="nearest")), 0.2, inplace=True)
        return self.conv_last(F.leaky_relu(self.conv_hr(feat), 0.2, inplace=True))
