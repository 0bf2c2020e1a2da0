"""The authors' networks, jcjohnson/fast-neural-style: Torch7 files (``.t7``) of a table with ``model`` and ``opt``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastperc.conversion import torch7
from fastperc.conversion.common import Colors, Converted, Multiplied, PictureNet, Refused, Residual, filled, shown
from fastperc.conversion.torch7 import Module
from fastperc.models import TransformNet
from fastperc.models.transform_net import BORDER

CAFFE_MEAN = (103.939, 116.779, 123.68)  # of BGR in 0–255
COLORS = {  # by the option preprocessing
    "vgg": Colors((255.0,) * 3, [-mean for mean in CAFFE_MEAN], bgr=True),
    "resnet": Colors([1 / s for s in (0.229, 0.224, 0.225)], (-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225)),
}
OTHER_COLORS = "takes images as ResNet does, and fastperc's networks do not"
OTHER_LAYERS = "has other layers or another padding than TransformNet's presets paper, eccv16 and instance"
NEAR = 1e-3  # between pictures of the same network by other layers
MAX_MODULES = 1000


def convert(path: Path) -> Converted:
    """The network of a ``.t7`` file.

    Raises:
        Refused: another file, or a network with other layers than these repositories build.
    """
    content = torch7.read(path)
    options: Any = {}
    if isinstance(content, dict):
        options, content = content.get("opt") or {}, content.get("model")
    if not isinstance(content, Module):
        raise Refused("holds no network: neither an nn module nor a table with one as 'model'")
    preprocessing = str(options.get("preprocessing", "vgg")) if isinstance(options, dict) else "vgg"
    if preprocessing not in COLORS:
        raise Refused(f"was trained with the preprocessing {shown(preprocessing)!r}, which is not known")
    walk = Walk()
    modules = walk.flat(content)
    border = _border(modules[0]) if modules else 0
    layers = walk.layers(modules[1 if border else 0 :])
    if not layers:
        raise Refused("holds a network without layers")
    net = PictureNet(nn.Sequential(*layers), COLORS[preprocessing], walk.multiple, border, walk.scale).eval()
    weights = [module.fields["weight"] for module in modules if isinstance(module.fields.get("weight"), torch.Tensor)]
    dtype = weights[0].dtype if weights else torch.float32
    kind, own = "jcjohnson's fast-neural-style network", _transform_net(net) if preprocessing == "vgg" else None
    if own is not None:
        return Converted(f"{kind}, BGR turned into RGB", own, dtype)
    return Converted(kind, net, dtype, "", OTHER_LAYERS if preprocessing == "vgg" else OTHER_COLORS)


CONVOLUTIONS, NORMS = (nn.Conv2d, nn.ConvTranspose2d), (nn.BatchNorm2d, nn.InstanceNorm2d)


def _parts(net: nn.Module) -> list[Any]:
    """The convolutions and norms of a network in order."""
    return [module for module in net.modules() if isinstance(module, (*CONVOLUTIONS, *NORMS))]


def _transform_net(net: PictureNet) -> TransformNet | None:
    """The ``TransformNet`` that paints the same pictures, if there is one.

    Convolutions and norms must be the same one by one. What stands between them, such as skips and activations, is the
    same if two random pictures are.
    """
    parts = _parts(net)
    if len(parts) < 2 or not isinstance(parts[0], nn.Conv2d) or net.border not in (0, BORDER):
        return None
    norm = "batch" if isinstance(parts[1], nn.BatchNorm2d) else "instance"
    padding = "reflect40" if net.border else "zero"
    with torch.device("meta"):
        own_parts = _parts(TransformNet("paper", width=parts[0].out_channels, norm=norm, padding=padding))
    if [*map(_geometry_of, parts)] != [*map(_geometry_of, own_parts)]:
        return None
    own = TransformNet("paper", width=parts[0].out_channels, norm=norm, padding=padding, output="caffe").eval()
    for part, own_part in zip(parts, _parts(own)):
        own_part.load_state_dict(part.state_dict())
    with torch.no_grad():
        assert own.head.bias is not None
        own.stem.conv.weight.copy_(own.stem.conv.weight.flip(1))
        own.head.weight.copy_(own.head.weight.flip(0))
        own.head.bias.copy_(own.head.bias.flip(0))
        for height, width in ((48, 64), (36, 52)):
            x = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(width))
            try:
                y = net(x)
            except RuntimeError:  # layers that do not fit together
                return None
            if y.shape != x.shape or not (own(x) - y).abs().max() < NEAR:
                return None
    return own


def _geometry_of(part: Any) -> tuple[Any, ...]:
    if isinstance(part, NORMS):
        return isinstance(part, nn.BatchNorm2d), part.num_features, part.eps
    channels = part.in_channels, part.out_channels
    return isinstance(part, nn.Conv2d), *channels, part.kernel_size, part.stride, part.padding, part.output_padding


def _border(module: Module) -> int:
    """The pixels that the first module reflects on each side, if it does the same on all four; else 0."""
    if not module.name.endswith(".SpatialReflectionPadding"):
        return 0
    sides = {module.integer(field) for field in ("pad_l", "pad_r", "pad_t", "pad_b")}
    return sides.pop() if len(sides) == 1 else 0


class Walk:
    """Turns Torch's modules into PyTorch's, and keeps what their strides come to."""

    def __init__(self) -> None:
        self.down = self.up = self.deepest = self.count = 1

    @property
    def multiple(self) -> int:
        """Of which the network needs the sides of images to be."""
        return self.deepest

    @property
    def scale(self) -> int:
        """Pixels of the picture for one of the image.

        Raises:
            Refused: it is no whole number.
        """
        if self.up % self.down:
            raise Refused("gives pictures that are smaller than the photo")
        return self.up // self.down

    def flat(self, module: Module) -> list[Module]:
        """The modules of a Sequential, those of Sequentials in it included."""
        self.count += 1
        if self.count > MAX_MODULES:
            raise Refused("has too many modules")
        if not module.name.endswith(".Sequential"):
            return [module]
        parts = module.list("modules")
        if not all(isinstance(part, Module) for part in parts):
            raise Refused("has a Sequential with something else than modules")
        return [inner for part in parts for inner in self.flat(part)]

    def layers(self, modules: Sequence[Module]) -> list[nn.Module]:
        """PyTorch's modules for a row of Torch's."""
        layers: list[nn.Module] = []
        for module, after in zip(modules, [*modules[1:], None]):
            kind = module.name.partition(".")[2]
            if kind == "ConcatTable" and after is not None and after.name.endswith(".CAddTable"):
                layers.append(self._residual(module))
            elif kind in LAYERS:
                layers.append(LAYERS[kind](module))
                self._measure(layers[-1])
            elif kind != "CAddTable":
                raise Refused(f"has a layer {module.name}, which fastperc does not convert")
        return layers

    def _residual(self, concat: Module) -> nn.Module:
        branches = concat.list("modules")
        if len(branches) != 2 or not all(isinstance(branch, Module) for branch in branches):
            raise Refused("has a ConcatTable that is no residual block")
        branch, skip = branches
        kind = skip.name.partition(".")[2]
        if kind not in ("ShaveImage", "Identity"):
            raise Refused(f"has a residual block with {skip.name}, which fastperc does not convert")
        trimmed = skip.integer("size") if kind == "ShaveImage" else 0
        return Residual(nn.Sequential(*self.layers(self.flat(branch))), trimmed)

    def _measure(self, layer: nn.Module) -> None:
        if isinstance(layer, nn.Conv2d):
            self.down *= layer.stride[0]
        elif isinstance(layer, nn.ConvTranspose2d):
            self.up *= layer.stride[0]
        elif isinstance(layer, nn.Upsample):
            self.up *= int(layer.scale_factor)  # type: ignore[arg-type]
        common = math.gcd(self.up, self.down)
        self.deepest = math.lcm(self.deepest, self.down // common)
        if self.deepest > 64 or self.up > 1 << 16:
            raise Refused("has larger strides than fastperc converts")


def _convolution(module: Module) -> nn.Module:
    inputs, outputs, kernel, stride, padding = _geometry(module)
    layer = nn.Conv2d(inputs, outputs, kernel, stride, padding)
    weight = module.tensor("weight")
    return filled(layer, weight=weight.reshape(_shape(weight, layer)), bias=module.tensor("bias"))


def _full_convolution(module: Module) -> nn.Module:
    inputs, outputs, kernel, stride, padding = _geometry(module)
    added = module.integer("adjH", 0), module.integer("adjW", 0)
    layer = nn.ConvTranspose2d(inputs, outputs, kernel, stride, padding, added)
    return filled(layer, weight=module.tensor("weight"), bias=module.tensor("bias"))


def _geometry(module: Module) -> tuple[Any, ...]:
    """Input and output channels; kernel, stride and padding as pairs, height first."""
    channels = module.integer("nInputPlane"), module.integer("nOutputPlane")
    pairs = [(module.integer(f"{name}H", 0), module.integer(f"{name}W", 0)) for name in ("k", "d", "pad")]
    weight = module.tensor("weight")
    if min(*channels, *pairs[0], *pairs[1]) < 1 or min(pairs[2]) < 0 or pairs[1][0] != pairs[1][1]:
        raise Refused(f"has a {module.name} of a geometry that makes no sense")
    if weight.numel() != math.prod((*channels, *pairs[0])):
        raise Refused(f"has a {module.name} whose weight is not of its geometry")
    return *channels, *pairs


def _shape(weight: torch.Tensor, layer: nn.Conv2d) -> torch.Size:
    """The layer's shape where ``weight`` is a matrix of rows of filters, as old files have it; else its own."""
    return layer.weight.shape if weight.dim() == 2 else weight.shape


def _batch_norm(module: Module) -> nn.Module:
    mean = module.tensor("running_mean")
    layer = nn.BatchNorm2d(len(mean), module.number("eps", 1e-5))
    if "running_var" not in module.fields:
        raise Refused("has a batch norm without running_var, as Torch wrote them before 2015")
    affine = module.fields.get("weight") is not None
    tensors = {name: module.tensor(name) for name in ("weight", "bias")} if affine else {}
    return filled(layer, running_mean=mean, running_var=module.tensor("running_var"), **tensors)


def _instance_norm(module: Module) -> nn.Module:
    weight = module.tensor("weight")
    layer = nn.InstanceNorm2d(len(weight), module.number("eps", 1e-5), affine=True)
    return filled(layer, weight=weight, bias=module.tensor("bias"))


def _padding(kind: type[nn.Module]) -> Callable[[Module], nn.Module]:
    def build(module: Module) -> nn.Module:
        return kind(tuple(module.integer(f"pad_{side}") for side in "lrtb"))  # type: ignore[call-arg]

    return build


LAYERS: dict[str, Callable[[Module], nn.Module]] = {
    "SpatialConvolution": _convolution,
    "SpatialConvolutionMM": _convolution,
    "SpatialFullConvolution": _full_convolution,
    "SpatialBatchNormalization": _batch_norm,
    "InstanceNormalization": _instance_norm,
    "SpatialReflectionPadding": _padding(nn.ReflectionPad2d),
    "SpatialReplicationPadding": _padding(nn.ReplicationPad2d),
    "SpatialZeroPadding": _padding(nn.ZeroPad2d),
    "SpatialUpSamplingNearest": lambda module: nn.Upsample(scale_factor=module.integer("scale_factor")),
    "ReLU": lambda module: nn.ReLU(),
    "Tanh": lambda module: nn.Tanh(),
    "MulConstant": lambda module: Multiplied(module.number("constant_scalar")),
    "Identity": lambda module: nn.Identity(),
    "TotalVariation": lambda module: nn.Identity(),  # a loss: it passes pictures on
}
