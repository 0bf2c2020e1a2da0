"""Networks that fastperc did not define, as people write them: what ``freeze`` and ``accelerate`` are for.

Each is written from its published description, in the style of its best-known code: with modules or functions, in
place or not, with one module called several times. The names of the parameters are those of that code where weights
are passed around under them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from gallery.classification import BasicBlock, Bottleneck, MobileNetV2, ResNet
from gallery.style import ResnetGenerator, TransformerNet
from gallery.super_resolution import EDSR, RRDBNet, SRResNet
from gallery.unet import UNet


class Sizes(NamedTuple):
    """Heights and widths of a network's input."""

    small: tuple[int, int]  # for tests; odd
    benchmark: tuple[int, int]


SIZES = {
    "transformer_net": Sizes((29, 35), (256, 256)),
    "cyclegan": Sizes((29, 35), (256, 256)),
    "unet": Sizes((35, 49), (256, 256)),
    "unet_bilinear": Sizes((35, 49), (256, 256)),
    "edsr": Sizes((13, 19), (128, 128)),
    "srresnet": Sizes((13, 19), (128, 128)),
    "rrdb": Sizes((13, 19), (128, 128)),
    "resnet18": Sizes((65, 79), (224, 224)),
    "resnet50": Sizes((65, 79), (224, 224)),
    "mobilenet_v2": Sizes((65, 79), (224, 224)),
}
CLASSIFIERS = ("resnet18", "resnet50", "mobilenet_v2")  # the others map an image to an image


def networks(width: float = 1.0) -> dict[str, Callable[[], nn.Module]]:
    """The networks by name: a function for each that makes it, with the same weights every time, in train mode.

    Args:
        width: a factor on the numbers of channels. 0.25 makes tests fast.
    """

    def channels(published: int) -> int:
        return max(4, int(published * width))

    classes = max(10, int(1000 * width))
    makers: dict[str, Callable[[], nn.Module]] = {
        "transformer_net": partial(TransformerNet, channels(32)),
        "cyclegan": partial(ResnetGenerator, channels(64)),
        "unet": partial(UNet, channels(64)),
        "unet_bilinear": partial(UNet, channels(64), bilinear=True),
        "edsr": partial(EDSR, channels(64)),
        "srresnet": partial(SRResNet, channels(64)),
        "rrdb": partial(RRDBNet, channels(64), num_grow_ch=channels(32)),
        "resnet18": partial(ResNet, BasicBlock, (2, 2, 2, 2), channels(64), classes),
        "resnet50": partial(ResNet, Bottleneck, (3, 4, 6, 3), channels(64), classes),
        "mobilenet_v2": partial(MobileNetV2, width, classes),
    }
    return {name: partial(as_if_trained, maker, SIZES[name].small) for name, maker in makers.items()}


def as_if_trained(maker: Callable[[], nn.Module], size: tuple[int, int]) -> nn.Module:
    """A network with weights, slopes and running statistics such as training leaves them.

    Batch norms take their statistics from a random image of ``size``, so that the maps of deep networks keep their
    scale in eval mode. The statistics then move a little away from it. The state of torch's generator is kept.
    """
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        network = maker()
        norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
        for module in network.modules():
            if isinstance(module, (nn.BatchNorm2d, nn.InstanceNorm2d)) and module.affine:
                nn.init.uniform_(module.weight, 0.7, 1.3)
                nn.init.normal_(module.bias, std=0.1)
            elif isinstance(module, nn.PReLU):
                nn.init.uniform_(module.weight, 0.05, 0.4)
            elif isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                bias = module.bias
                if bias is not None and bias.requires_grad:
                    nn.init.normal_(bias, std=0.05)
        if norms:
            momenta = [norm.momentum for norm in norms]
            for norm in norms:
                norm.momentum = None  # the statistics of this one image
            with torch.no_grad():
                network(torch.rand(2, 3, *size))
            for norm, momentum in zip(norms, momenta):
                norm.momentum = momentum
                assert norm.running_mean is not None and norm.running_var is not None
                spread = norm.running_var.sqrt()
                norm.running_mean += 0.1 * spread * torch.randn_like(spread)
                norm.running_var *= torch.empty_like(spread).uniform_(0.8, 1.25)
    return network
