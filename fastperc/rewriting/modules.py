"""What a module of PyTorch computes, by its class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from fastperc.rewriting.known import Conv, Known, Norm, PixelShuffle, Same, Upsample, zero_padding
from fastperc.types import RELU, Activation, Padding


def of_module(module: nn.Module) -> Known | None:
    """What a module of PyTorch computes, by its class's own forward; ``None`` of others."""
    for kind, reader in MODULES.items():
        if isinstance(module, kind) and type(module).forward is kind.forward:
            return reader(module)
    return None


def _conv_module(conv: Any) -> Conv | None:
    transposed = isinstance(conv, nn.ConvTranspose2d)
    if conv.padding_mode not in ("zeros", "reflect", "replicate"):
        return None
    padding = zero_padding(conv.padding, conv.kernel_size, conv.dilation, conv.padding_mode)
    extra = conv.output_padding if transposed else (0, 0)
    return Conv(conv.weight, conv.bias, conv.stride, padding, conv.dilation, conv.groups, transposed, extra)


def _norm_module(norm: Any) -> Norm | None:
    instance = isinstance(norm, nn.InstanceNorm2d)
    measures = norm.running_mean is None or norm.training
    if instance and measures and norm.running_mean is not None:  # it also updates its running statistics
        return None
    mean, variance = (None, None) if measures else (norm.running_mean, norm.running_var)
    return Norm(norm.weight, norm.bias, mean, variance, norm.eps, measures and not instance)


def _upsample_module(upsample: Any) -> Upsample | None:
    factor = upsample.scale_factor
    twice = factor in (2, (2, 2)) and upsample.size is None
    return Upsample() if upsample.mode == "nearest" and twice else None


def _pad_module(mode: str) -> Callable[[Any], Padding | None]:
    return lambda pad: Padding(tuple(pad.padding), mode) if min(pad.padding) >= 0 else None


MODULES: dict[type[nn.Module], Callable[[Any], Known | None]] = {
    nn.Conv2d: _conv_module,
    nn.ConvTranspose2d: _conv_module,
    nn.BatchNorm2d: _norm_module,
    nn.SyncBatchNorm: _norm_module,
    nn.InstanceNorm2d: _norm_module,
    nn.ReLU: lambda m: RELU,
    nn.LeakyReLU: lambda m: Activation("leaky_relu", m.negative_slope),
    nn.PReLU: lambda m: Activation("prelu", slopes=m.weight),
    nn.ReLU6: lambda m: Activation("relu6"),
    nn.SiLU: lambda m: Activation("silu"),
    nn.Sigmoid: lambda m: Activation("sigmoid"),
    nn.Tanh: lambda m: Activation("tanh"),
    nn.ReflectionPad2d: _pad_module("reflect"),
    nn.ReplicationPad2d: _pad_module("replicate"),
    nn.ZeroPad2d: _pad_module("zeros"),
    nn.UpsamplingNearest2d: _upsample_module,
    nn.Upsample: _upsample_module,
    nn.PixelShuffle: lambda m: PixelShuffle(m.upscale_factor),
    nn.Identity: lambda m: Same(),
    nn.Dropout: lambda m: None if m.training else Same(),
    nn.Dropout2d: lambda m: None if m.training else Same(),
}
