"""The drop-in ``nn.Module`` of each operation."""

from fastperc.modules.conv3x3 import Conv3x3
from fastperc.modules.conv_bn_relu import ConvBNReLU
from fastperc.modules.gram_loss import GramLoss
from fastperc.modules.residual_block import ResidualBlock
from fastperc.modules.rgb_conv import RGBConv
from fastperc.modules.subpixel_conv_bn_relu import SubpixelConvBNReLU
from fastperc.modules.tv_loss import TVLoss

__all__ = ["Conv3x3", "ConvBNReLU", "GramLoss", "RGBConv", "ResidualBlock", "SubpixelConvBNReLU", "TVLoss"]
