"""The kinds of layer that ``ops.conv_chain`` has kernels for: forward, gradients and the same in plain PyTorch.

    Stem              3 channels → C, a wide kernel
    Conv              3×3 and the like, of stride 1 or 2
    Transposed        the ½-stride convolution, ×2
    Nearest           nearest-neighbour upsampling ×2 and a 3×3 convolution
    Head              C channels → 3, a wide kernel, no norm

``fastperc.kernels.deferred`` draws how their activations and gradients flow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastperc import kernels, reference
from fastperc.ops import weight_forms
from fastperc.ops.common import empty_like, partials_of
from fastperc.ops.norm_relu import BATCH_NORMS, NORMS, has_hooks
from fastperc.ops.rgb_pictures import SCALINGS, Rgb, rgb_weight_gradient
from fastperc.ops.weight_forms import Forms, Weight
from fastperc.types import NO_EPILOGUE, RELU, Activation, Deferred, Destination, Padding, same_sides

if TYPE_CHECKING:
    from fastperc.kernels.sum_parts import SumOf

WIDE = 5  # taps in a row: from here on a convolution of 3 channels, or to 3, has a kernel of its own


class Layer(NamedTuple):
    """A convolution with what follows it."""

    conv: Any  # nn.Conv2d or nn.ConvTranspose2d
    norm: Any  # nn.Module, or None
    activation: Activation | None = RELU
    upsample: str | None = None  # "transposed" or "nearest": doubles the size
    skip: bool = False  # whether the input of the layer before is added, cropped to fit, between norm and activation
    from_picture: str | None = None  # the input is a picture in 0–1, of reference.to_network_range; or None: as it is
    to_picture: str | None = None  # the output is a picture in 0–1, of reference.to_image_range; or None: as it is

    @property
    def kernel(self) -> int:
        return self.conv.weight.shape[2]

    @property
    def stride(self) -> int:
        return self.conv.stride[0]

    @property
    def padding(self) -> int:
        return self.conv.padding[0]

    @property
    def reflect(self) -> bool:
        return self.conv.padding_mode == "reflect" and self.padding > 0

    @property
    def border(self) -> Padding:
        """The convolution's padding."""
        return same_sides(self.padding, "reflect" if self.reflect else "zeros")

    @property
    def kind(self) -> Kind:
        """The kernels it has."""
        if self.upsample:
            return TRANSPOSED if self.upsample == "transposed" else NEAREST
        if self.kernel >= WIDE and self.stride == 1:
            if self.conv.in_channels == 3:
                return STEM
            if self.conv.out_channels == 3 and self.norm is None:
                return HEAD
        return CONV

    @property
    def batch(self) -> bool:
        """Whether the norm is a batch norm."""
        return type(self.norm) in BATCH_NORMS

    @property
    def frozen(self) -> bool:
        """Whether the norm's statistics are constants."""
        return self.norm is not None and self.norm.track_running_stats and not self.norm.training

    @property
    def parameters(self) -> tuple[Tensor | None, ...]:
        """The convolution's weight and bias, the norm's weight and bias."""
        norm = (None, None) if self.norm is None else (self.norm.weight, self.norm.bias)
        return self.conv.weight, self.conv.bias, *norm


class GradientTarget(NamedTuple):
    """What a data gradient becomes part of."""

    shape: torch.Size  # of the layer's input
    saved: Deferred | None  # the activation that is the input, if the layer before it made one
    skip: Tensor | None  # the gradient that a skip adds


class Kind:
    """What kernels do for a layer."""

    def forms(self, layer: Layer) -> Forms:
        """The forms of its weight."""
        return Forms()

    def why_not_geometry(self, layer: Layer) -> str | None:
        """Why its kernels cannot take the layer's size, stride and padding, or ``None``."""
        raise NotImplementedError

    def output_size(self, layer: Layer, size: int) -> int:
        """The pixels in a row or column of the output, from those of the input."""
        return (size + 2 * layer.padding - layer.kernel) // layer.stride + 1

    def equivalent(self, layer: Layer, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """The convolution in plain PyTorch, which autograd can differentiate again."""
        return reference.convolve(x, weight, bias, layer.stride, layer.border)

    def empty_output(self, layer: Layer, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Memory for the raw output."""
        shape = len(x), layer.conv.out_channels, *(self.output_size(layer, size) for size in x.shape[2:])
        return torch.empty(shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)

    def forward(
        self, layer: Layer, x: Tensor, weight: Weight, bias: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None]:
        """The raw output, and for the norm its statistics by tiles, unless the norm is frozen or missing."""
        out = self.empty_output(layer, x, dtype)
        measured = layer.norm is not None and not layer.frozen
        partials = partials_of(out, self.tiles(layer, x, out), 3) if measured else None
        self.fill(layer, x, weight, bias, out, partials)
        return out, partials

    def tiles(self, layer: Layer, x: Tensor, out: Tensor) -> int:
        """How many tiles an image of the output has."""
        raise NotImplementedError

    def fill(self, layer: Layer, x: Tensor, weight: Weight, bias: Tensor, out: Tensor, partials: Tensor | None) -> None:
        """Fills the raw output, and its statistics by tiles."""
        raise NotImplementedError

    def data_gradient(
        self, layer: Layer, grad: Tensor, weight: Weight, target: GradientTarget
    ) -> tuple[Tensor, Tensor | None]:
        """The gradient of the layer's input, through the ReLU of ``target.saved``, and its sums by tiles.

        Where the padding is reflected, the kernel gives the gradient of the padded input, whose border is then folded
        back.
        """
        border, (n, c, height, width) = self.reflected_border(layer), target.shape
        out = empty_like(grad, (n, c, height + 2 * border, width + 2 * border))
        if not border:
            return out, self.fill_gradient(layer, grad, weight, target, out, 0)
        self.fill_gradient(layer, grad, weight, GradientTarget(target.shape, None, None), out, border)
        folded, fold = empty_like(out, target.shape), kernels.fold_gradient
        partials = None if target.saved is None else partials_of(folded, fold.fold_gradient_tiles(folded), 2)
        nearest = self is NEAREST
        fold.fold_gradient(out, target.skip, target.saved, folded, (border,) * 4, nearest, partials)
        return folded, partials

    def reflected_border(self, layer: Layer) -> int:
        """Pixels on each side of the input that are reflections of others."""
        return layer.padding if layer.reflect else 0

    def fill_gradient(
        self, layer: Layer, grad: Tensor, weight: Weight, target: GradientTarget, out: Tensor, border: int
    ) -> Tensor | None:
        """Fills ``out`` with the gradient of the input with its reflected ``border``; returns its sums by tiles."""
        raise NotImplementedError

    def weight_gradient(self, layer: Layer, x: Tensor, grad: Tensor, destination: SumOf) -> None:
        """Makes ``destination`` the gradient of the weight, NHWC."""
        raise NotImplementedError


def sums_of(out: Tensor, target: GradientTarget, tiles: Callable[[], int]) -> Tensor | None:
    """Memory for the sums that the gradient of ``target.saved``'s norm needs, if there is one."""
    return None if target.saved is None else partials_of(out, tiles(), 2)


class Stem(Kind):
    """A wide convolution of 3 channels."""

    def forms(self, layer: Layer) -> Forms:
        return Forms(weight_forms.stem_form, weight_forms.turned_head_form)

    def why_not_geometry(self, layer: Layer) -> str | None:
        return _why_not_stride_1(layer)

    def tiles(self, layer: Layer, x: Tensor, out: Tensor) -> int:
        return kernels.rgb_conv_stem.rgb_conv_stem_tiles(out)

    def fill(self, layer: Layer, x: Tensor, weight: Weight, bias: Tensor, out: Tensor, partials: Tensor | None) -> None:
        stem = kernels.rgb_conv_stem
        picture = Rgb(x, layer.border, SCALINGS[layer.from_picture]).prepared(out.dtype)
        stem.rgb_conv_stem_fwd(picture, weight.forward, bias, out, None, partials)

    def fill_gradient(
        self, layer: Layer, grad: Tensor, weight: Weight, target: GradientTarget, out: Tensor, border: int
    ) -> Tensor | None:
        head, zeros = kernels.rgb_conv_head, layer.kernel - 1 - (0 if border else layer.padding)
        head.rgb_conv_head_fwd(grad, weight.backward, None, out, same_sides(zeros), None)
        return None

    def weight_gradient(self, layer: Layer, x: Tensor, grad: Tensor, destination: SumOf) -> None:
        picture = Rgb(x, layer.border, SCALINGS[layer.from_picture])
        rgb_weight_gradient(grad, picture, layer.kernel, 0, False, destination)


class Head(Kind):
    """A wide convolution to 3 channels."""

    def forms(self, layer: Layer) -> Forms:
        return Forms(weight_forms.head_form, weight_forms.turned_stem_form)

    def why_not_geometry(self, layer: Layer) -> str | None:
        return _why_not_stride_1(layer)

    def fill(self, layer: Layer, x: Tensor, weight: Weight, bias: Tensor, out: Tensor, partials: Tensor | None) -> None:
        kernels.rgb_conv_head.rgb_conv_head_fwd(x, weight.forward, bias, out, layer.border, None)

    def painted(self, layer: Layer, x: Tensor, weight: Weight, bias: Tensor) -> tuple[Tensor, Tensor]:
        """The raw output, and the picture that ``layer.to_picture`` makes of it."""
        raw = self.empty_output(layer, x, x.dtype)
        picture, head = torch.empty_like(raw), kernels.rgb_conv_head
        head.rgb_conv_head_fwd(x, weight.forward, bias, picture, layer.border, layer.to_picture, raw)
        return raw, picture

    def fill_gradient(
        self, layer: Layer, grad: Tensor, weight: Weight, target: GradientTarget, out: Tensor, border: int
    ) -> Tensor | None:
        stem, zeros = kernels.rgb_conv_stem, layer.kernel - 1 - (0 if border else layer.padding)
        partials = sums_of(out, target, lambda: stem.rgb_conv_stem_tiles(out))
        picture = Rgb(grad, same_sides(zeros)).prepared(grad.dtype)
        stem.rgb_conv_head_bwd(picture, weight.backward, target.saved, out, partials)
        return partials

    def weight_gradient(self, layer: Layer, x: Tensor, grad: Tensor, destination: SumOf) -> None:
        border = layer.padding if layer.reflect else 0
        zeros = same_sides(layer.kernel - 1 - layer.padding + border)
        rgb_weight_gradient(x, Rgb(grad, zeros), layer.kernel, border, True, destination)


class Conv(Kind):
    """A convolution of stride 1, or a 3×3 one of stride 2."""

    def forms(self, layer: Layer) -> Forms:
        return Forms(None, weight_forms.transposed_form if layer.stride == 2 else None)

    def why_not_geometry(self, layer: Layer) -> str | None:
        if (layer.kernel, layer.stride, layer.padding) == (3, 2, 1):
            return None
        return _why_not_stride_1(layer)

    def tiles(self, layer: Layer, x: Tensor, out: Tensor) -> int:
        return kernels.conv_bn_relu.conv_bn_relu_tiles(x, out.shape)

    def fill(self, layer: Layer, x: Tensor, weight: Weight, bias: Tensor, out: Tensor, partials: Tensor | None) -> None:
        conv = kernels.conv_bn_relu
        conv.conv_bn_relu_fwd(x, weight.forward, bias, out, layer.stride, layer.border, NO_EPILOGUE, partials)

    def fill_gradient(
        self, layer: Layer, grad: Tensor, weight: Weight, target: GradientTarget, out: Tensor, border: int
    ) -> Tensor | None:
        if layer.stride == 2:
            subpixel = kernels.subpixel_conv_bn_relu
            partials = sums_of(out, target, lambda: subpixel.strided_conv_bwd_tiles(grad, out, border))
            subpixel.strided_conv_bwd(grad, weight.backward, target.saved, out, border, partials)
            return partials
        zeros = layer.kernel - 1 - (0 if border else layer.padding)
        return _conv_gradient(grad, weight.backward, target, out, 1, zeros, turned=True)

    def weight_gradient(self, layer: Layer, x: Tensor, grad: Tensor, destination: SumOf) -> None:
        _gathered_weight_gradient(layer, x, grad, False, destination)


class Transposed(Kind):
    """The ½-stride convolution: ``nn.ConvTranspose2d`` of 3×3, stride 2, padding 1, output padding 1."""

    upsample = "transposed"

    def forms(self, layer: Layer) -> Forms:
        return Forms(weight_forms.transposed_form)

    def why_not_geometry(self, layer: Layer) -> str | None:
        geometry = layer.kernel, layer.stride, layer.padding, layer.conv.output_padding
        return None if geometry == (3, 2, 1, (1, 1)) else "no kernel for its size, stride and padding"

    def output_size(self, layer: Layer, size: int) -> int:
        return 2 * size

    def equivalent(self, layer: Layer, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv_transpose2d(x, weight.to(x.dtype), bias.to(x.dtype), 2, 1, 1)

    def tiles(self, layer: Layer, x: Tensor, out: Tensor) -> int:
        return kernels.subpixel_conv_bn_relu.subpixel_conv_bn_relu_tiles(x, out, self.upsample)

    def fill(self, layer: Layer, x: Tensor, weight: Weight, bias: Tensor, out: Tensor, partials: Tensor | None) -> None:
        subpixel, mode = kernels.subpixel_conv_bn_relu, layer.border.mode
        subpixel.subpixel_conv_bn_relu_fwd(x, weight.forward, bias, out, self.upsample, mode, None, partials)

    def fill_gradient(
        self, layer: Layer, grad: Tensor, weight: Weight, target: GradientTarget, out: Tensor, border: int
    ) -> Tensor | None:
        return _conv_gradient(grad, weight.backward, target, out, 2, 1)

    def weight_gradient(self, layer: Layer, x: Tensor, grad: Tensor, destination: SumOf) -> None:
        module = kernels.weight_gradient
        geometry = module.Geometry((layer.kernel, layer.kernel), 1, 1, 2)
        module.weight_gradient(x, grad, geometry, destination)


class Nearest(Transposed):
    """Nearest-neighbour upsampling ×2 and a 3×3 convolution of padding 1."""

    upsample = "nearest"

    def forms(self, layer: Layer) -> Forms:
        return Forms(weight_forms.nearest_form, weight_forms.as_transposed_form)

    def why_not_geometry(self, layer: Layer) -> str | None:
        geometry = layer.kernel, layer.stride, layer.padding
        return None if geometry == (3, 1, 1) else "no kernel for its size, stride and padding"

    def equivalent(self, layer: Layer, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        wide = F.interpolate(x, scale_factor=2, mode="nearest")
        return reference.convolve(wide, weight, bias, 1, layer.border)

    def reflected_border(self, layer: Layer) -> int:
        return 1 if layer.reflect else 0

    def fill_gradient(
        self, layer: Layer, grad: Tensor, weight: Weight, target: GradientTarget, out: Tensor, border: int
    ) -> Tensor | None:
        return _conv_gradient(grad, weight.backward, target, out, 2, 3 if border else 1)

    def weight_gradient(self, layer: Layer, x: Tensor, grad: Tensor, destination: SumOf) -> None:
        _gathered_weight_gradient(layer, x, grad, True, destination)


STEM, CONV, TRANSPOSED, NEAREST, HEAD = Stem(), Conv(), Transposed(), Nearest(), Head()


def _why_not_stride_1(layer: Layer) -> str | None:
    fits = layer.stride == 1 and layer.kernel % 2 == 1 and 0 <= layer.padding < layer.kernel
    return None if fits else "no kernel for its size, stride and padding"


def _conv_gradient(
    grad: Tensor, weight: Tensor, target: GradientTarget, out: Tensor, stride: int, zeros: int, turned: bool = False
) -> Tensor | None:
    """Fills ``out`` with the convolution of ``grad`` with a border of ``zeros``; returns its sums by tiles.

    ``weight`` is the convolution's or, ``turned``, what that is after a rotation by 180° and the exchange of in and
    out.
    """
    conv = kernels.conv_bn_relu
    gradient = target.saved is not None
    partials = sums_of(out, target, lambda: conv.conv_bn_relu_tiles(grad, out.shape, gradient))
    destination = Destination(out, partials, target.saved)
    conv.conv_bn_relu_bwd(grad, weight, turned, target.skip, destination, stride, same_sides(zeros))
    return partials


def _gathered_weight_gradient(layer: Layer, x: Tensor, grad: Tensor, nearest: bool, destination: SumOf) -> None:
    module, taps = kernels.weight_gradient, (layer.kernel, layer.kernel)
    geometry = module.Geometry(taps, layer.padding, layer.padding, layer.stride, 2 if nearest else 1, layer.reflect)
    module.weight_gradient(grad, x, geometry, destination)


def why_not_layer(layer: Layer, channels: int, first: bool, last: bool) -> str | None:
    """Why no kernel can take a layer whose input has ``channels``, or ``None``; ``first`` and ``last`` of its chain."""
    conv, norm = layer.conv, layer.norm
    plain = isinstance(conv, nn.ConvTranspose2d if layer.upsample == "transposed" else nn.Conv2d)
    if not plain or has_hooks(conv) or conv.bias is None or torch.nn.utils.parametrize.is_parametrized(conv):
        return "the convolution is not a plain one with a bias"
    if conv.in_channels != channels or conv.groups != 1 or conv.dilation != (1, 1):
        return "the convolution has other channels, groups or a dilation"
    if len({*conv.kernel_size}) > 1 or len({*conv.stride}) > 1 or len({*conv.padding}) > 1:
        return "the convolution differs in height and width"
    if conv.padding_mode not in ("zeros", "reflect"):
        return f"no kernel pads by {conv.padding_mode!r}"
    if reason := layer.kind.why_not_geometry(layer):
        return reason
    if layer.kind is STEM and not first:
        return "a wide convolution of 3 channels reads an image only"
    if layer.activation not in (None, RELU):
        return f"no kernel for the activation {layer.activation.name}"
    if norm is None:
        ends = layer.kind is HEAD and last and layer.activation is None
        return None if ends else "only a last layer, to RGB, has no norm"
    if type(norm) not in NORMS or norm.weight is None or has_hooks(norm):
        return "the norm is not a plain one with scale and shift"
    if norm.track_running_stats and not layer.batch:
        return "plain PyTorch applies the running statistics of an instance norm"
    return "there is no gradient kernel of a ReLU after a skip" if layer.activation and layer.skip else None
