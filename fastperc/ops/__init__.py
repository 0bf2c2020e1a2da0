"""The operations as functions; a loss's are also PyTorch operators in ``torch.ops.fastperc``.

Those of a frozen network (``conv_bn_relu``, ``subpixel_conv_bn_relu``, ``rgb_conv_stem``, ``rgb_conv_head``,
``instance_norm``, ``image_io``) are for inference: where a gradient is wanted, and inside ``torch.compile``, plain
PyTorch runs. ``conv_chain`` is for training: on a GPU kernels of its own, on a CPU ``conv3x3``, ``norm_relu`` and
``rgb_conv``.
"""

from fastperc.ops.conv3x3 import conv3x3
from fastperc.ops.conv_bn_relu import conv_bn_relu
from fastperc.ops.conv_chain import conv_chain
from fastperc.ops.gram_loss import gram_loss
from fastperc.ops.image_io import image_io
from fastperc.ops.instance_norm import channel_statistics, instance_norm
from fastperc.ops.layer import Layer
from fastperc.ops.layer import unsupported as conv_chain_unsupported
from fastperc.ops.norm_relu import has_hooks, norm_relu
from fastperc.ops.rgb_conv import rgb_conv, rgb_conv_head, rgb_conv_stem
from fastperc.ops.subpixel_conv_bn_relu import subpixel_conv_bn_relu
from fastperc.ops.tv_loss import tv_loss
from fastperc.ops.vgg_loss import vgg_features, vgg_loss

__all__ = [
    "Layer",
    "channel_statistics",
    "conv3x3",
    "conv_bn_relu",
    "conv_chain",
    "conv_chain_unsupported",
    "gram_loss",
    "has_hooks",
    "image_io",
    "instance_norm",
    "norm_relu",
    "rgb_conv",
    "rgb_conv_head",
    "rgb_conv_stem",
    "subpixel_conv_bn_relu",
    "tv_loss",
    "vgg_features",
    "vgg_loss",
]
