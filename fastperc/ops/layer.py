"""A layer as ``fastperc.ops.conv_chain`` has it: a convolution with what follows it; and whether kernels take it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastperc import backends
from fastperc.ops.frozen import compute_dtype, transformed
from fastperc.ops.norm_relu import BATCH_NORMS, FEWEST_VALUES, NORMS, has_hooks

WIDE = 5  # taps in a row from which on a convolution of, or to, three channels has a kernel of its own


class Layer(NamedTuple):
    """A convolution with what follows it."""

    conv: Any  # nn.Conv2d or nn.ConvTranspose2d
    norm: Any  # nn.Module, or None
    relu: bool = True
    upsample: str | None = None  # "transposed" or "nearest": doubles the size
    skip: bool = False  # whether the input of the layer before is added, cropped to fit, between norm and ReLU

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
    def kind(self) -> str:
        """Which kernels it has: those of ``"stem"``, ``"head"``, ``"transposed"``, ``"nearest"`` or ``"conv"``."""
        if self.upsample:
            return self.upsample
        if self.kernel >= WIDE and self.stride == 1:
            if self.conv.in_channels == 3:
                return "stem"
            if self.conv.out_channels == 3 and self.norm is None:
                return "head"
        return "conv"

    @property
    def batch(self) -> bool:
        return type(self.norm) in BATCH_NORMS

    @property
    def frozen(self) -> bool:
        """Whether the norm's statistics are constants."""
        return self.norm is not None and self.norm.track_running_stats and not self.norm.training

    def output_size(self, size: int) -> int:
        """The pixels in a row or column of its output, of those of its input."""
        return 2 * size if self.upsample else (size + 2 * self.padding - self.kernel) // self.stride + 1

    @property
    def parameters(self) -> tuple[Tensor | None, ...]:
        """The convolution's weight and bias, the norm's weight and bias."""
        norm = (None, None) if self.norm is None else (self.norm.weight, self.norm.bias)
        return self.conv.weight, self.conv.bias, *norm


def unsupported(x: Tensor, layers: Sequence[Layer]) -> str | None:
    """Why no chain of Triton kernels can take the call, or ``None`` if one can."""
    if obstacle := transformed():
        return obstacle
    dtype = compute_dtype(x)
    obstacle = backends.triton_product_unsupported(torch.empty(0, dtype=dtype, device=x.device))
    if obstacle is not None:
        return obstacle
    parameters = [parameter for layer in layers for parameter in layer.parameters if parameter is not None]
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in (x, *parameters)):
        return "no gradient is wanted: fastperc.freeze makes a network for that"
    if x.dim() != 4 or x.numel() == 0:
        return "these are no images"
    if any(p.dtype not in (torch.float32, dtype) or p.device != x.device for p in parameters):
        return "the parameters are of another dtype, or elsewhere"
    channels, size = x.shape[1], (x.shape[2], x.shape[3])
    for i, layer in enumerate(layers):
        if obstacle := _layer_unsupported(layer, channels, i == len(layers) - 1):
            return obstacle
        if layer.skip and (i == 0 or layer.kind != "conv" or layers[i - 1].kind != "conv" or layers[i - 1].skip):
            return "a skip goes around two convolutions"
        if layer.reflect and min(size) <= layer.padding:
            return "a mirrored border is as wide as the image"
        size = layer.output_size(size[0]), layer.output_size(size[1])
        channels = layer.conv.out_channels
        if layer.norm is not None and size[0] * size[1] * (len(x) if layer.batch else 1) < FEWEST_VALUES:
            return "of so few values the gradients cancel, and plain PyTorch may compute them in float64"
    return None


def _layer_unsupported(layer: Layer, channels: int, last: bool) -> str | None:
    conv, norm = layer.conv, layer.norm
    plain = isinstance(conv, nn.ConvTranspose2d if layer.upsample == "transposed" else nn.Conv2d)
    if not plain or has_hooks(conv) or conv.bias is None or torch.nn.utils.parametrize.is_parametrized(conv):
        return "the convolution is no plain one with a bias"
    if conv.in_channels != channels or conv.groups != 1 or conv.dilation != (1, 1):
        return "the convolution takes other channels, groups of them or taps apart"
    if len({*conv.kernel_size}) > 1 or len({*conv.stride}) > 1 or len({*conv.padding}) > 1:
        return "the convolution differs in height and width"
    if conv.padding_mode not in ("zeros", "reflect"):
        return f"borders of {conv.padding_mode!r} have no kernel"
    geometry = layer.kernel, layer.stride, layer.padding
    if layer.upsample == "transposed":
        known = geometry == (3, 2, 1) and conv.output_padding == (1, 1)
    elif layer.upsample == "nearest":
        known = geometry == (3, 1, 1)
    else:
        known = geometry == (3, 2, 1) or (
            layer.stride == 1 and layer.kernel % 2 == 1 and 0 <= layer.padding < layer.kernel
        )
    if not known:
        return "no kernel for its size, stride and padding"
    if norm is None:
        return None if layer.kind == "head" and last and not layer.relu else "a layer without a norm comes last, to RGB"
    if type(norm) not in NORMS or norm.weight is None or has_hooks(norm):
        return "the norm is no plain one with scale and shift"
    if norm.track_running_stats and not layer.batch:
        return "running statistics of an instance norm are applied by plain PyTorch"
    return "no gradient of a ReLU after a skip" if layer.relu and layer.skip else None
