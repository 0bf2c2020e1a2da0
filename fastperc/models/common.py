"""What the networks share: checks and scaling of images, running layers in a row, the authors' initialisation."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastperc import ops, reference
from fastperc.models.image_range import check_range
from fastperc.modules import ConvBNReLU, ResidualBlock, RGBConv, SubpixelConvBNReLU
from fastperc.modules.chain import chain, exporting
from fastperc.presets import MINIMUM_SIDE

CHAINED_OUTPUTS = ("tanh", "linear")  # that a chain's kernels have
CHAINED = (ConvBNReLU, ResidualBlock, RGBConv, SubpixelConvBNReLU)  # exactly: a subclass may do something else


def check_image(x: Tensor) -> None:
    """Raises a ``ValueError`` unless ``x`` is RGB in 0–1 [N, 3, H, W] with both sides of at least 16 pixels."""
    if torch.jit.is_tracing():  # which records no checks, and warns of them
        return
    if x.dim() != 4 or x.shape[1] != 3 or min(x.shape[-2:]) < MINIMUM_SIDE:
        raise ValueError(
            f"expected RGB images [N, 3, H, W] with H and W of at least {MINIMUM_SIDE}, got shape {list(x.shape)}"
        )
    check_range("the network's input", x)


class Network(nn.Module):
    """Base of the networks."""

    def __prepare_scriptable__(self) -> None:
        raise RuntimeError(
            "torch.jit.script cannot compile fastperc's networks; use torch.export, torch.onnx or compile"
        )


WRAPPERS = ("_orig_mod", "module")  # where torch.compile, DataParallel and AveragedModel keep what they wrap
WRAPPER_NAMES = re.compile(r"(?<![^.])(?:_orig_mod|module)\.")  # the same in the names of a state_dict


def unwrapped(net: Any) -> Any:
    """What torch.compile, DataParallel, DistributedDataParallel and AveragedModel wrap; anything else as it is."""
    while isinstance(net, nn.Module):
        wrapped = next((child for name, child in net.named_children() if name in WRAPPERS), None)
        if wrapped is None:
            break
        net = wrapped
    return net


def reflect_pad_to_multiple(x: Tensor, multiple: int, border: int = 0) -> Tensor:
    """``x`` with ``border`` reflected pixels on each side, and more at the right and bottom up to the next multiple."""
    height, width = x.shape[-2:]
    if _sizes_vary(x):
        rows, columns = (_reflected(size, multiple, border, x.device) for size in (height, width))
        return x.index_select(-2, rows).index_select(-1, columns)
    right, bottom = _missing(width, multiple), _missing(height, multiple)
    return reference.reflect_pad(x, border, border + right, border, border + bottom)


def _sizes_vary(x: Tensor) -> bool:
    """Whether a graph is recorded that serves other sizes than that of ``x`` too."""
    if exporting() or not torch.compiler.is_compiling():
        return exporting()
    from torch.fx.experimental.symbolic_shapes import has_static_value  # takes long to import

    return not all(has_static_value(size) for size in x.shape[-2:])


def cropped(x: Tensor, height: int, width: int) -> Tensor:
    """The first ``height`` rows and ``width`` columns of ``x``."""
    if _sizes_vary(x):  # a slice that may be the whole is recorded as the one or the other
        rows, columns = (torch.arange(size, device=x.device) for size in (height, width))
        return x.index_select(-2, rows).index_select(-1, columns)
    return x[..., :height, :width]


def _missing(size: int, multiple: int) -> int:
    """What ``size`` lacks to the next multiple. Not ``-size % multiple``, which torch.compile takes for no integer."""
    return (multiple - size % multiple) % multiple


def _reflected(size: int, multiple: int, border: int, device: torch.device) -> Tensor:
    """The indices of a row of ``size`` pixels, at least ``MINIMUM_SIDE``, that make the padded row."""
    last, padded = size - 1, (size + multiple - 1) // multiple * multiple + 2 * border
    positions = torch.arange(padded, device=device) - border
    for _ in range(math.ceil((border + multiple) / (MINIMUM_SIDE - 1))):  # reflections at both ends
        positions = last - (last - positions.abs()).abs()
    return positions


def in_a_row(x: Tensor, modules: Sequence[nn.Module]) -> Tensor:
    """``modules`` one after the other: as one chain of layers if all are this library's and none has a hook."""
    if layers := _layers(modules):
        return chain(x, layers)
    for module in modules:
        x = module(x)
    return x


def pictures_in_a_row(x: Tensor, modules: Sequence[nn.Module], output: str) -> Tensor:
    """The pictures that ``modules`` make of the pictures ``x``, both in 0–1, as :func:`in_a_row` runs them.

    ``output`` is that of :func:`fastperc.reference.to_network_range`.
    """
    layers = _layers(modules)
    if layers and output in CHAINED_OUTPUTS:
        layers[0], layers[-1] = layers[0]._replace(from_picture=output), layers[-1]._replace(to_picture=output)
        return chain(x, layers)
    return reference.to_image_range(in_a_row(reference.to_network_range(x, output), modules), output)


def _layers(modules: Sequence[nn.Module]) -> list[ops.Layer]:
    """The layers of ``modules``; none if one of them is not this library's or has a hook."""
    known = all(type(module) in CHAINED for module in modules)
    if not known or any(ops.has_hooks(part) for module in modules for part in module.modules()):
        return []
    return [layer for module in modules for layer in module.layers()]  # type: ignore[operator]


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
