"""A network as a list of steps, its convolutions; and which part of each map a part of the picture depends on.

    picture ← head ← up ← … ← stem ← frame: the image with the reflected border that the network needs

A map lies between two steps: map 0 is the frame, map i + 1 the output of step i.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from fastperc import backends, ops, reference
from fastperc.devices import computes_in
from fastperc.models import SuperResolutionNet, TransformNet
from fastperc.models.common import unwrapped
from fastperc.modules import ConvBNReLU, ResidualBlock, SubpixelConvBNReLU
from fastperc.types import RELU, Activation, Epilogue, Geometry, InstanceNorm, Padding, Sides, Window

PADDING_MODES = ("zeros", "reflect")
OWN = (TransformNet, SuperResolutionNet)  # the networks that have a plan
LAYERS = ("stem", "down", "blocks", "up", "head")  # of a network, in this order


class Step(NamedTuple):
    """A convolution with its epilogue, batch norm folded in."""

    name: str  # of the convolution in the state_dict
    weight: Tensor
    bias: Tensor
    stride: int = 1
    padding: int = 0
    padding_mode: str = "zeros"
    upsample: str | None = None  # "transposed" or "nearest": doubles the size
    norm: InstanceNorm | None = None
    activation: Activation | None = RELU
    skip: bool = False  # whether the input of the step before is added
    end: str | None = None  # "first" or "last" of the network

    @property
    def kernel(self) -> int:
        return self.weight.shape[2]

    @property
    def channels(self) -> int:
        return len(self.bias)

    def output_size(self, size: int) -> int:
        """The pixels in a row or column of the output, from those of the input."""
        return 2 * size if self.upsample else (size + 2 * self.padding - self.kernel) // self.stride + 1

    def source(self, start: int, stop: int, size: int) -> tuple[int, int, int, int]:
        """Along one axis, what of the input, of ``size`` pixels, pixels ``start`` to ``stop`` of the output depend on:
        first, end, and the pixels of padding before and after."""
        if self.upsample:
            first, end = start // 2 - 1, (stop + 1) // 2 + 1
        else:
            first = start * self.stride - self.padding
            end = (stop - 1) * self.stride - self.padding + self.kernel
        return max(first, 0), min(end, size), max(-first, 0), max(end - size, 0)

    def added(self, region: Window) -> Window:
        """The part of the skip, the input of the step before, that is added to a ``region`` of the output: two
        convolutions without padding have trimmed the rest."""
        trimmed = 2 * (self.kernel // 2 - self.padding)
        return region._replace(top=region.top + trimmed, left=region.left + trimmed)

    def to(self, device: torch.device, dtype: torch.dtype) -> Step:
        """The step with its tensors on ``device`` and in ``dtype``."""

        def moved(x: Tensor) -> Tensor:
            return x.to(dtype).to(device)  # in this order: not every device can hold the float64 it comes from

        norm = self.norm and InstanceNorm(moved(self.norm.weight), moved(self.norm.bias), self.norm.eps)
        return self._replace(weight=moved(self.weight), bias=moved(self.bias), norm=norm)

    def with_statistics(self, mean: Tensor, variance: Tensor) -> Step:
        """The step with its instance norm folded in, for an image with these statistics [C], float64 on the CPU."""
        assert self.norm is not None
        device, dtype = self.weight.device, self.weight.dtype
        scale = self.norm.weight.cpu().double() / (variance + self.norm.eps).sqrt()
        weight, bias = scaled(self.weight.cpu(), self.bias.cpu(), scale, self.upsample == "transposed")
        bias = bias + (self.norm.bias.cpu() - mean * scale).to(bias.dtype)
        return self._replace(weight=weight, bias=bias, norm=None).to(device, dtype)


class Part(NamedTuple):
    """What a step computes for a part of its output."""

    region: Window  # of the output
    source: Window  # of the input
    padding: Sides  # pixels of padding beyond the source


class Plan(NamedTuple):
    """A frozen network."""

    steps: tuple[Step, ...]  # the first reads the frame, the last makes the picture
    scale: int  # pixels of the picture for one of the image
    border: int  # reflected pixels on each side of the image
    multiple: int  # of which the frame's sides are multiples
    output: str  # "tanh", "linear" or "caffe": see fastperc.TransformNet
    dtype: torch.dtype  # of the computation
    asked_for: torch.dtype | None = None  # another dtype, which is slow on this device

    @property
    def input_range(self) -> tuple[float, float]:
        """The factor and the offset that RGB in 0–1 gets before the first convolution."""
        return (2.0, -1.0) if self.output == "tanh" else (255.0, 0.0)

    def sizes(self, height: int, width: int) -> list[tuple[int, int]]:
        """Height and width of each map, for an image of this size."""
        sizes = [(height + 2 * self.border + -height % self.multiple, width + 2 * self.border + -width % self.multiple)]
        for step in self.steps:
            sizes.append((step.output_size(sizes[-1][0]), step.output_size(sizes[-1][1])))
        return sizes

    @property
    def bytes_per_pixel(self) -> float:
        """The most memory that a pass holds at once, for each pixel of the frame: two neighbouring maps and a skip."""
        amounts, pixels = [3.0], 1.0
        for step in self.steps:
            pixels *= 4 if step.upsample else 1 / step.stride**2
            amounts.append(step.channels * pixels)
        held = [a + b for a, b in pairwise(amounts)]
        held += [sum(amounts[i - 1 : i + 2]) for i, step in enumerate(self.steps) if step.skip]
        return max(held) * self.dtype.itemsize


def plan_of(net: nn.Module, dtype: torch.dtype, device: torch.device) -> Plan:
    """``net`` in eval mode, with batch norms folded in float64 and weights in float32 (for float64, in that).

    Where ``dtype`` is slow on ``device`` the plan computes in float32.

    Raises:
        TypeError: not a network of this library that is a chain of its layers.
        ValueError: weights or running statistics that are not finite.
    """
    net = unwrapped(net)
    if isinstance(net, TransformNet) and _computes_as(net, TransformNet):
        scale, border, multiple, output = 1, net.border, 4, net.output
    elif isinstance(net, SuperResolutionNet) and _computes_as(net, SuperResolutionNet):
        scale, border, multiple, output = net.config["scale"], 0, 1, "tanh"
    else:
        raise TypeError(f"freeze takes a TransformNet or a SuperResolutionNet, got {type(net).__name__}")
    wide = torch.promote_types(dtype, torch.float32)
    if any(tensor.is_meta for tensor in net.state_dict().values()):
        raise ValueError("the network is on the meta device, which holds no weights; load them before freezing")
    layers = [(name, layer) for name, layer in net.named_children() if name in LAYERS]
    steps = [step.to(device, wide) for name, layer in layers for step in steps_of(layer, name)]
    if (steps[0].name, steps[-1].name) != ("stem.conv", "head"):
        raise TypeError("freeze takes no network without its first or last convolution, stem and head")
    for step in steps:
        tensors = (step.weight, step.bias, *(step.norm[:2] if step.norm else ()))
        if not all(tensor.isfinite().all() for tensor in tensors):
            raise ValueError(f"the network's {step.name} has weights or statistics that are not finite")
    steps[0], steps[-1] = steps[0]._replace(end="first"), steps[-1]._replace(end="last")
    if computes_in(dtype, device):
        return Plan(tuple(steps), scale, border, multiple, output, dtype)
    return Plan(tuple(steps), scale, border, multiple, output, torch.float32, asked_for=dtype)


def _computes_as(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether ``module``, a ``kind`` or a subclass of it, has its forward."""
    return type(module).forward is kind.forward


def steps_of(layer: nn.Module, name: str = "") -> Iterator[Step]:
    """The convolutions of a layer, or of several in a row, called ``name``, with copies of the weights in float64, on
    the CPU.

    Raises:
        TypeError: a layer that is none of this library's, or computes something else.
        ValueError: a padding that a frozen convolution does not have.
    """
    layer = unwrapped(layer)
    if isinstance(layer, nn.Sequential):
        for child, module in layer.named_children():
            yield from steps_of(module, f"{name}.{child}")
    elif isinstance(layer, nn.Identity):
        return
    elif isinstance(layer, ConvBNReLU) and _computes_as(layer, ConvBNReLU):
        yield step_of(layer.conv, layer.norm, f"{name}.conv", activation=RELU if layer.relu else None)
    elif isinstance(layer, SubpixelConvBNReLU) and _computes_as(layer, SubpixelConvBNReLU):
        yield step_of(layer.conv, layer.norm, f"{name}.conv", stride=1, padding=1, upsample=layer.upsample)
    elif isinstance(layer, ResidualBlock) and _computes_as(layer, ResidualBlock):
        yield step_of(layer.conv1, layer.norm1, f"{name}.conv1")
        after = dict(activation=None if layer.residual is True else RELU, skip=bool(layer.residual))
        yield step_of(layer.conv2, layer.norm2, f"{name}.conv2", **after)
    else:
        yield step_of(layer, None, name, activation=None)


def step_of(conv: Any, norm: Any, name: str, **changes: Any) -> Step:
    """The step of a convolution and its norm; ``name`` is the convolution's in the state_dict.

    Raises:
        TypeError, ValueError: as :func:`steps_of`.
    """
    conv, norm = unwrapped(conv), unwrapped(norm)
    plain = isinstance(conv, (nn.Conv2d, nn.ConvTranspose2d)) and conv.groups == 1 and conv.dilation == (1, 1)
    if not plain or not isinstance(conv.padding, tuple) or conv.kernel_size[0] != conv.kernel_size[1]:
        raise TypeError(f"freeze takes square convolutions without groups or dilation, not {conv} at {name}")
    if conv.padding_mode not in PADDING_MODES:
        raise ValueError(f"{name}: a frozen convolution cannot pad by {conv.padding_mode!r}")
    channels = conv.out_channels
    weight, bias = _wide(conv.weight, torch.empty(0)), _wide(conv.bias, torch.zeros(channels))
    instance = None
    if norm is not None and not isinstance(norm, nn.Identity):
        measured = isinstance(norm, _NormBase) and norm.running_mean is not None
        if not measured and not isinstance(norm, nn.InstanceNorm2d):
            raise TypeError(
                f"freeze takes instance norms, and batch norms with running statistics, not {norm} at {name}"
            )
        norm_weight, norm_bias = _wide(norm.weight, torch.ones(channels)), _wide(norm.bias, torch.zeros(channels))
        if measured:
            mean, variance = _wide(norm.running_mean, bias), _wide(norm.running_var, bias)
            factor = norm_weight / (variance + norm.eps).sqrt()
            weight, bias = scaled(weight, bias - mean, factor, isinstance(conv, nn.ConvTranspose2d))
            bias = bias + norm_bias
        else:
            instance = InstanceNorm(norm_weight, norm_bias, norm.eps)
    step = Step(name, weight, bias, conv.stride[0], conv.padding[0], conv.padding_mode, norm=instance)
    return step._replace(**changes)


def _wide(x: Tensor | None, default: Tensor) -> Tensor:
    """A copy of ``x``, or ``default`` where there is none, in float64, on the CPU."""
    return (default if x is None else x.detach()).to("cpu", torch.float64, copy=True)


def scaled(weight: Tensor, bias: Tensor, factor: Tensor, transposed: bool) -> tuple[Tensor, Tensor]:
    """A convolution's ``weight`` and ``bias``, each filter multiplied by its ``factor``, in the same dtypes."""
    shape = (1, -1, 1, 1) if transposed else (-1, 1, 1, 1)
    return (weight * factor.view(shape)).to(weight.dtype), (bias * factor).to(bias.dtype)


def parts(steps: Sequence[Step], sizes: Sequence[tuple[int, int]], region: Window) -> list[Part]:
    """What each of ``steps`` computes for ``region`` of the last one's output; ``sizes`` are those of the maps from the
    first step's input on."""
    chain = []
    for step, (height, width) in reversed([*zip(steps, sizes)]):
        top, bottom, above, below = step.source(region.top, region.top + region.height, height)
        left, right, before, after = step.source(region.left, region.left + region.width, width)
        source = Window(top, left, bottom - top, right - left)
        chain.append(Part(region, source, (before, after, above, below)))
        region = source
    return chain[::-1]


def forward(plan: Plan, steps: Sequence[Step], doing: Sequence[Part], x: Tensor, picture: Tensor | None) -> Tensor:
    """The output of the last of ``steps``, each computing its part.

    Args:
        plan: the steps' own.
        steps: consecutive ones.
        doing: their parts.
        x: the first step's source; for the network's first step the image, [N, 3, H, W].
        picture: filled by the network's last step, [N, 3, H', W'], of any dtype and strides.

    The computation is in the plan's dtype, also under autocast.
    """
    with torch.autocast(x.device.type, enabled=False):
        return _forward(plan, steps, doing, x, picture)


def _forward(plan: Plan, steps: Sequence[Step], doing: Sequence[Part], x: Tensor, picture: Tensor | None) -> Tensor:
    skipped = None  # the input of the step before, and its place in the map, if this step adds it
    for step, part, after in zip(steps, doing, (*steps[1:], None)):
        backends.at_layer(step.name)
        if step.end == "last":
            assert picture is not None
            make_picture(plan, step, part, x, picture)
            return picture
        if step.end == "first":
            source = part.source
            window = source._replace(top=source.top - plan.border, left=source.left - plan.border)
            y = read_image(plan, step, part, x, window)
        else:
            skip = None
            if step.skip:
                assert skipped is not None
                skip = cut(*skipped, step.added(part.region))
            y = inner(step, part, x, skip)
        skipped = (x, part.source) if after is not None and after.skip else None
        x = y
    return x


def read_image(plan: Plan, step: Step, part: Part, image: Tensor, window: Window) -> Tensor:
    """The first step, of a ``window`` of the image, whose border may lie outside."""
    padding, epilogue = Padding(part.padding, step.padding_mode), Epilogue(step.norm, step.activation)
    if plan.output != "caffe":
        return ops.rgb_conv_stem(image, step.weight, step.bias, window, plan.input_range, padding, epilogue, plan.dtype)
    x = ops.image_io(image, window, plan.input_range, plan.dtype)  # another offset for each channel
    x = x - reference.caffe_mean(x)
    return ops.conv_bn_relu(x, step.weight, step.bias, Geometry(step.stride, padding), epilogue)


def make_picture(plan: Plan, step: Step, part: Part, x: Tensor, picture: Tensor) -> None:
    """The last step: fills ``picture``."""
    padding = Padding(part.padding, step.padding_mode)
    if plan.output != "caffe":
        ops.rgb_conv_head(x, step.weight, step.bias, padding, plan.output, picture)
        return
    y = torch.empty(picture.shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    ops.rgb_conv_head(x, step.weight, step.bias, padding, "plain", y)
    y = reference.to_image_range(y, plan.output)
    picture.copy_(reference.to_levels(y) if picture.dtype == torch.uint8 else y)


def inner(step: Step, part: Part, x: Tensor, skip: Tensor | None) -> Tensor:
    """A step that is neither the first nor the last."""
    padding, epilogue = Padding(part.padding, step.padding_mode), Epilogue(step.norm, step.activation, skip)
    if step.upsample is None:
        return ops.conv_bn_relu(x, step.weight, step.bias, Geometry(step.stride, padding), epilogue)
    y = ops.subpixel_conv_bn_relu(x, step.weight, step.bias, step.upsample, padding, epilogue)
    top, left, height, width = part.region  # y begins at an even row and column
    return y[:, :, top % 2 : top % 2 + height, left % 2 : left % 2 + width]


def cut(x: Tensor, source: Window, wanted: Window) -> Tensor:
    """The part ``wanted`` of a map whose part ``source`` is ``x``."""
    top, left = wanted.top - source.top, wanted.left - source.left
    return x[:, :, top : top + wanted.height, left : left + wanted.width]
