"""State_dicts of three PyTorch repositories: PyTorch's fast_neural_style example, gordicaleksa's and rrmina's.

    repository                        upsampling   images that the network takes and gives
    pytorch/examples                  nearest      RGB, 0…255
    gordicaleksa's johnson            nearest      RGB in 0–1 less ImageNet's mean, over its deviation
    rrmina/fast-neural-style-pytorch  transposed   BGR, 0…255

All pad by reflection before each convolution, so that a change of colours can be folded into the first and the last.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fastperc import checkpoints
from fastperc.checkpoints import EXAMPLE_LAYERS
from fastperc.conversion.common import Converted, transform_net
from fastperc.errors import InputError
from fastperc.models.common import WRAPPER_NAMES

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of RGB in 0–1
GORDICALEKSA_LAYERS = {
    **{name: layer for name, layer in EXAMPLE_LAYERS.items() if not name.startswith("deconv")},
    **{f"up{i + 1}.conv2d.conv2d": f"up.{i}.conv" for i in range(2)},
    **{"up3.conv2d": "head"},
}
RRMINA_LAYERS = {
    **{f"ConvBlock.{2 * i}": layer for i, layer in enumerate(("stem", "down.0", "down.1"))},
    **{f"DeconvBlock.{2 * i}": f"up.{i}" for i in range(2)},
}
RRMINA_RESIDUAL = re.compile(r"ResidualBlock\.(\d)\.conv([12])\.(conv|norm)_layer")
FIRST = {  # the first tensor of each, which says how wide the network is
    "example": "deconv1.conv2d.weight",
    "gordicaleksa": "up1.conv2d.conv2d.weight",
    "rrmina": "ConvBlock.0.conv_layer.weight",
}
OTHER_EPSILON = (
    "of 2017, whose instance norms add an epsilon of 1e-9 to the variance; fastperc's add 1e-5, which shows in areas "
    "without any texture at most"
)
CANNOT_TELL = (
    "taken as TransformerNetwork: a file of TransformerNetworkTanh holds the same names, and its picture would be wrong"
)


def convert(path: Path, tensors: Mapping[str, Tensor]) -> Converted:
    """The network of a state_dict.

    Raises:
        InputError: another network's, or values that are not finite.
    """
    tensors = {WRAPPER_NAMES.sub("", name): tensor for name, tensor in tensors.items()}
    first = next((tensor for tensor in tensors.values() if tensor.is_floating_point()), torch.empty(0))
    if FIRST["gordicaleksa"] in tensors:
        return _gordicaleksa(path, tensors, first.dtype)
    if FIRST["rrmina"] in tensors:
        return _rrmina(path, tensors, first.dtype)
    if "stem.conv.weight" in tensors or "conv1.conv2d.weight" in tensors:
        note = OTHER_EPSILON if "in1.scale" in tensors else ""
        return Converted("PyTorch's fast_neural_style example", checkpoints.load(path), first.dtype, note)
    raise InputError(
        f"{path}: a state_dict of none of the networks that fastperc converts: PyTorch's fast_neural_style example, "
        f"gordicaleksa's, rrmina's (its first tensor is {next(iter(tensors), 'missing')})"
    )


def _gordicaleksa(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Converted:
    renamed = {}
    for name, tensor in tensors.items():
        layer, _, kind = name.rpartition(".")
        renamed[f"{GORDICALEKSA_LAYERS.get(layer, layer)}.{kind}"] = tensor
    net = transform_net(path, renamed, preset="examples", width=_width(path, renamed))
    with torch.no_grad():
        mean, deviation = (torch.tensor(values, dtype=torch.float64) for values in (MEAN, DEVIATION))
        conv, head = net.stem.conv, net.head
        assert conv.bias is not None and head.bias is not None
        weight, bias = conv.weight.double(), conv.bias.double()
        conv.weight.copy_(weight / (255 * deviation).view(3, 1, 1))
        conv.bias.copy_(bias - (weight * (mean / deviation).view(3, 1, 1)).sum((1, 2, 3)))
        head.weight.copy_(head.weight.double() * (255 * deviation).view(3, 1, 1, 1))
        head.bias.copy_((head.bias.double() * deviation + mean) * 255)
    return Converted("gordicaleksa's network, ImageNet's mean and deviation folded in", net, dtype)


def _rrmina(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Converted:
    renamed, batch = {}, any(name.endswith("running_var") for name in tensors)
    for name, tensor in tensors.items():
        layer, _, kind = name.rpartition(".")
        block, _, part = layer.rpartition(".")
        if match := RRMINA_RESIDUAL.fullmatch(layer):
            layer = f"blocks.{match[1]}.{match[3]}{match[2]}"
        elif layer == "DeconvBlock.4.conv_layer":
            layer = "head"
        elif block in RRMINA_LAYERS:
            layer = f"{RRMINA_LAYERS[block]}.{'norm' if part == 'norm_layer' else 'conv'}"
        renamed[f"{layer}.{kind}"] = tensor
    config = dict(preset="examples", upsample="transposed", norm="batch" if batch else "instance")
    net = transform_net(path, renamed, width=_width(path, renamed), **config)
    with torch.no_grad():
        net.stem.conv.weight.copy_(net.stem.conv.weight.flip(1))
        net.head.weight.copy_(net.head.weight.flip(0))
        assert net.head.bias is not None
        net.head.bias.copy_(net.head.bias.flip(0))
    return Converted("rrmina's TransformerNetwork, BGR turned into RGB", net, dtype, CANNOT_TELL)


def _width(path: Path, tensors: Mapping[str, Tensor]) -> int:
    first = tensors.get("stem.conv.weight")
    if first is None or first.dim() != 4 or not len(first):
        raise InputError(f"{path}: lacks the first convolution")
    return len(first)
