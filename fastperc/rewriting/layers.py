"""A group of calls as one layer of a frozen network: weights folded, run by this library's operations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastperc import ops, reference
from fastperc.ops.common import empty_like, in_dtype
from fastperc.rewriting.fuse import Group, folded
from fastperc.types import Activation, Epilogue, Geometry, InstanceNorm, Padding, Window

STEMS = (9,)  # the kernels that have a way of their own from RGB
HEADS = (3, 7, 9)  # and to RGB
UNSCALED = (1.0, 0.0)


class FrozenLayer:
    """The convolution of a group with its prologue and its epilogue."""

    def __init__(self, group: Group, device: torch.device, dtype: torch.dtype) -> None:
        """The weights are in ``dtype``, on ``device``."""
        conv = group.conv
        weight, bias = folded(group)
        self.name, self.channels, self.shuffle = group.name, conv.channels, group.shuffle
        self.weight, self.bias = weight.to(device, dtype), bias.to(device, dtype)
        self.norm = _instance_norm(group, device, dtype)
        self.activation = _moved(group.activation, device, dtype)
        self.upsample, self.conv = group.upsample, conv
        self.geometry = Geometry(conv.stride[0], conv.padding, conv.dilation[0], conv.groups)  # if is_plain
        kernel = tuple(weight.shape[2:])
        self.is_square = len({kernel[0], kernel[1]}) == len({*conv.stride}) == len({*conv.dilation}) == 1
        self.is_plain = self.is_square and conv.stride[0] <= 2 and not conv.transposed
        ungrouped = conv.groups == 1 and conv.dilation == (1, 1)
        ordinary = self.is_plain and ungrouped and conv.stride == (1, 1)
        zeros_or_reflect = conv.padding.mode != "replicate"
        self.is_stem = ordinary and zeros_or_reflect and kernel[0] in STEMS and weight.shape[1] == 3
        self.is_head = (
            ordinary and zeros_or_reflect and kernel[0] in HEADS and weight.shape[0] == 3 and self.norm is None
        )
        doubling = kernel == (3, 3) and conv.stride == (2, 2) and conv.padding.sides == (1,) * 4
        self.doubles = conv.transposed and doubling and ungrouped and conv.output_padding == (1, 1)

    @property
    def writes_to_places(self) -> bool:
        """Whether ``out`` saves a copy."""
        return self.is_plain and self.shuffle == 1 and not (self.upsample or self.is_head or self.is_stem)

    def __call__(self, x: Tensor, skip: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """activation(norm(conv(``x``)) + ``skip``), in ``out`` where that is given."""
        epilogue = Epilogue(self.norm, self.activation, skip, out if self.shuffle == 1 else None)
        if self.upsample or self.doubles or self.is_head or not self.is_plain:
            y = self._with_skip(x, epilogue)
        elif self.is_stem and skip is None:
            window = Window(0, 0, *x.shape[2:])
            epilogue = epilogue._replace(out=None)
            y = ops.rgb_conv_stem(x, self.weight, self.bias, window, UNSCALED, self.conv.padding, epilogue, x.dtype)
        elif skip is not None and skip.shape != self.geometry.output_shape(x, self.weight):
            y = self._convolved(x, Epilogue(self.norm, None)) + skip
            y = reference.activate(y, self.activation)
        else:
            y = self._convolved(x, epilogue)
        if self.shuffle != 1:
            y = F.pixel_shuffle(y, self.shuffle)
        return y if out is None or y is out else out.copy_(y)

    def _convolved(self, x: Tensor, epilogue: Epilogue) -> Tensor:
        return ops.conv_bn_relu(x, self.weight, self.bias, self.geometry, epilogue)

    def _with_skip(self, x: Tensor, epilogue: Epilogue) -> Tensor:
        """The layer by an operation that takes no skip: it is added afterwards."""
        if epilogue.skip is None:
            return self._without_skip(x, epilogue._replace(out=None))
        y = self._without_skip(x, Epilogue(epilogue.norm, None)) + epilogue.skip
        return reference.activate(y, epilogue.activation)

    def _without_skip(self, x: Tensor, epilogue: Epilogue) -> Tensor:
        if self.upsample or self.doubles:
            way = "nearest" if self.upsample else "transposed"
            padding = self.conv.padding if self.upsample else Padding((1,) * 4)
            return ops.subpixel_conv_bn_relu(x, self.weight, self.bias, way, padding, epilogue)
        if self.is_head:
            picture = empty_like(x, self.geometry.output_shape(x, self.weight))
            ops.rgb_conv_head(x, self.weight, self.bias, self.conv.padding, "plain", picture)
            return reference.activate(picture, epilogue.activation)
        weight, bias, conv = in_dtype(self.weight, x.dtype), self.bias.to(x.dtype), self.conv
        if conv.transposed:
            zeros = (conv.padding.sides[2], conv.padding.sides[0])
            y = F.conv_transpose2d(x, weight, bias, conv.stride, zeros, conv.output_padding, conv.groups, conv.dilation)
        else:
            y = F.conv2d(reference.pad(x, conv.padding), weight, bias, conv.stride, 0, conv.dilation, conv.groups)
        return reference.finish(y, epilogue)


def _instance_norm(group: Group, device: torch.device, dtype: torch.dtype) -> InstanceNorm | None:
    norm = group.norm
    if norm is None or norm.mean is not None:
        return None
    ones = torch.ones(group.conv.channels)
    weight = ones if norm.weight is None else norm.weight.detach()
    bias = torch.zeros_like(ones) if norm.bias is None else norm.bias.detach()
    weight, bias = ((group.factor * one.double()).to(device, dtype) for one in (weight, bias))
    return InstanceNorm(weight, bias, norm.eps)


def _moved(activation: Activation | None, device: torch.device, dtype: torch.dtype) -> Activation | None:
    if activation is None or activation.slopes is None:
        return activation
    return activation._replace(slopes=activation.slopes.detach().to(device, dtype))
