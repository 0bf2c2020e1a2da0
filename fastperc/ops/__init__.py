"""The operations as functions; those of losses are also PyTorch operators in ``torch.ops.fastperc``.

``OPERATIONS`` has the record of each: its implementations, how it is tuned, and the files that it runs on.

Frozen networks use ``conv_bn_relu``, ``subpixel_conv_bn_relu``, ``rgb_conv_stem``, ``rgb_conv_head``, ``instance_norm``
and ``image_io``: where a gradient is wanted, and inside ``torch.compile``, these run plain PyTorch. Training uses
``conv_chain`` (on a GPU with kernels of its own), ``norm_relu`` and, on a CPU, ``conv3x3`` and ``rgb_conv``.
"""

from fastperc.backends import OPERATIONS
from fastperc.ops.conv3x3 import conv3x3
from fastperc.ops.conv_bn_relu import conv_bn_relu
from fastperc.ops.conv_chain import conv_chain, convolved
from fastperc.ops.gram_loss import gram_loss
from fastperc.ops.gram_matrix import gram_matrix
from fastperc.ops.image_io import image_io
from fastperc.ops.instance_norm import instance_norm, instance_statistics
from fastperc.ops.kinds import Layer
from fastperc.ops.loss_terms import LossTerms, loss_terms, why_not_loss_terms
from fastperc.ops.lpips_distance import lpips_distance
from fastperc.ops.norm_relu import has_hooks, norm_relu
from fastperc.ops.rgb_conv import rgb_conv
from fastperc.ops.rgb_conv_head import rgb_conv_head
from fastperc.ops.rgb_conv_stem import rgb_conv_stem
from fastperc.ops.subpixel_conv_bn_relu import subpixel_conv_bn_relu
from fastperc.ops.tv_loss import tv_loss
from fastperc.ops.vgg_features import vgg_features
from fastperc.ops.vgg_loss import vgg_loss
from fastperc.ops.vgg_lpips import vgg_lpips

__all__ = [
    "OPERATIONS",
    "Layer",
    "LossTerms",
    "conv3x3",
    "conv_bn_relu",
    "conv_chain",
    "convolved",
    "gram_loss",
    "gram_matrix",
    "has_hooks",
    "image_io",
    "instance_norm",
    "instance_statistics",
    "loss_terms",
    "lpips_distance",
    "norm_relu",
    "rgb_conv",
    "rgb_conv_head",
    "rgb_conv_stem",
    "subpixel_conv_bn_relu",
    "tv_loss",
    "vgg_features",
    "vgg_loss",
    "vgg_lpips",
    "why_not_loss_terms",
]
