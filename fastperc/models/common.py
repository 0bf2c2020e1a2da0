"""What the networks share: checks and scaling of images, running layers in a row, the authors' initialisation."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from fastperc import ops, reference
from fastperc.modules import ConvBNReLU, ResidualBlock, RGBConv, SubpixelConvBNReLU
from fastperc.presets import MINIMUM_SIDE

CHAINED = (ConvBNReLU, ResidualBlock, RGBConv, SubpixelConvBNReLU)  # exactly: a subclass may do something else


def check_image(x: Tensor) -> None:
    """Raises a ``ValueError`` unless ``x`` is [N, 3, H, W] with both sides of at least 16 pixels."""
    if x.dim() != 4 or x.shape[1] != 3 or min(x.shape[-2:]) < MINIMUM_SIDE:
        raise ValueError(
            f"expected RGB images [N, 3, H, W] with H and W of at least {MINIMUM_SIDE}, got shape {list(x.shape)}"
        )


def to_network_range(x: Tensor, output: str) -> Tensor:
    """0–1 to what the first convolution sees: -1…1 before a network that ends in tanh, 0…255 before a linear one."""
    return 2 * x - 1 if output == "tanh" else 255 * x


def reflect_pad_to_multiple(x: Tensor, multiple: int, border: int = 0) -> Tensor:
    """``x`` with ``border`` reflected pixels on each side, and more at the right and bottom up to the next multiple."""
    height, width = x.shape[-2:]
    return reference.reflect_pad(x, border, border + -width % multiple, border, border + -height % multiple)


def in_a_row(x: Tensor, modules: Sequence[nn.Module]) -> Tensor:
    """``modules`` one after the other: as one chain of layers if all are this library's and none has a hook."""
    known = all(type(module) in CHAINED for module in modules)
    if known and not any(ops.has_hooks(part) for module in modules for part in module.modules()):
        layers = [layer for module in modules for layer in module.layers()]  # type: ignore[operator]
        return ops.conv_chain(x, layers)
    for module in modules:
        x = module(x)
    return x


def initialise_as_authors(net: nn.Module) -> None:
    """The authors' framework's initialisation: U(±1/√(kH·kW·in)) for convolutions, U(0, 1) for norm weights."""
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            bound = 1 / math.sqrt(math.prod(module.kernel_size) * module.in_channels)
            nn.init.uniform_(module.weight, -bound, bound)
            assert module.bias is not None
            nn.init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, (nn.BatchNorm2d, nn.InstanceNorm2d)):
            nn.init.uniform_(module.weight)
