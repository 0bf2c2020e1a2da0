"""Convolutions in a row, in training, each with its norm, activation and skip.

    forward    each convolution stores its raw output and that output's statistics by tiles; one pass normalises it
    saved      the raw outputs, and a few numbers a channel; the normalised activations are computed again
    backward   each convolution's gradient passes the ReLU of the layer before and is summed for its norm; one pass
               gives the gradient before the norm

``fastperc.kernels.deferred`` draws it; ``ops/fused_chain.py`` runs it, with the kernels of each kind of layer in
``ops/kinds.py``. Layers that Triton's kernels cannot serve run one by one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastperc import backends, reference
from fastperc.backends import Implementation, Operation, TuningCases, register
from fastperc.ops.common import channels_last, compute_dtype, storage_dtype, why_not_here
from fastperc.ops.conv3x3 import CONV3X3
from fastperc.ops.conv_bn_relu import CONV_BN_RELU
from fastperc.ops.fused_chain import cropped, fused_chain
from fastperc.ops.kinds import CONV, Layer, why_not_layer
from fastperc.ops.norm_relu import FEWEST_VALUES, NORM_RELU, norm_relu
from fastperc.ops.rgb_conv import RGB_CONV
from fastperc.ops.subpixel_conv_bn_relu import SUBPIXEL_CONV_BN_RELU
from fastperc.types import RELU, same_sides

CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)
MOST_FILTERS = 3  # of a convolution to an image, for which ``ops.rgb_conv`` was measured faster
FEWEST_CHANNELS = 16  # that it reads
FEWEST_PRODUCT_CHANNELS = 16  # of input and output of a 1×1 convolution that runs as a matrix product


def conv_chain(x: Tensor, layers: Sequence[Layer]) -> Tensor:
    """``layers`` one after the other; updates running statistics as the norms do themselves.

    Args:
        x: [N, C, H, W].
        layers: each takes the output of the one before; one without a norm may come last.

    Returns:
        [N, C', H', W'], channels-last where kernels ran.
    """
    return CONV_CHAIN(x, layers)


# What the kernels can take


def why_not_triton(x: Tensor, layers: Sequence[Layer]) -> str | None:
    """Why Triton's kernels cannot run ``layers`` as one chain, or ``None``."""
    return _why_not_call(x, layers) or next((reason for _, reason in _blocks(x, layers) if reason), None)


def _why_not_call(x: Tensor, layers: Sequence[Layer]) -> str | None:
    """Why Triton's kernels cannot run any of the layers, or ``None``."""
    if reason := why_not_here():
        return reason
    dtype = compute_dtype(x)
    if reason := backends.why_not_triton_product(torch.empty(0, dtype=dtype, device=x.device)):
        return reason
    parameters = [parameter for layer in layers for parameter in layer.parameters if parameter is not None]
    if not torch.is_grad_enabled() or not any(t.requires_grad for t in (x, *parameters)):
        return "no gradient is wanted; fastperc.freeze makes an engine for that"
    if x.dim() != 4 or x.numel() == 0:
        return "the input is no batch of images"
    if any(p.dtype not in (torch.float32, dtype) or p.device != x.device for p in parameters):
        return "the parameters have another dtype or device"
    return None


def _blocks(x: Tensor, layers: Sequence[Layer]) -> Iterator[tuple[list[Layer], str | None]]:
    """The smallest pieces of ``layers`` that can run by themselves, one layer or the two that a skip spans, up to the
    first that no kernel can take; each with the reason, or ``None``."""
    channels, *size = x.shape[1:]
    block: list[Layer] = []
    for i, layer in enumerate(layers):
        reason = why_not_layer(layer, channels, i == 0, i == len(layers) - 1)
        if reason is None and layer.skip and [one.kind for one in block] + [layer.kind] != [CONV, CONV]:
            reason = "a skip spans two convolutions"
        if reason is None and layer.reflect and min(size) <= layer.padding:
            reason = "a reflected border is as wide as the image"
        block.append(layer)
        if reason is None:
            size = [layer.kind.output_size(layer, pixels) for pixels in size]
            values = math.prod(size) * (len(x) if layer.batch else 1)
            if layer.norm is not None and values < FEWEST_VALUES:
                reason = f"with fewer than {FEWEST_VALUES} values a channel, gradients cancel"
        if reason is not None:
            yield [*block, *_with_skip(layers[i + 1 : i + 2])], reason
            return
        channels = layer.conv.out_channels
        if not _with_skip(layers[i + 1 : i + 2]):
            yield block, None
            block = []


def _with_skip(layers: Sequence[Layer]) -> list[Layer]:
    return [layer for layer in layers if layer.skip]


# Layer by layer


def one_by_one(x: Tensor, layers: Sequence[Layer]) -> Tensor:
    """``layers`` as convolution modules and ``ops.norm_relu``, each of which chooses for itself."""
    if layers and layers[0].from_picture is not None:
        x = reference.to_network_range(x, layers[0].from_picture)
    layer_input = x
    for layer in layers:
        wide = F.interpolate(x, scale_factor=2, mode="nearest") if layer.upsample == "nearest" else x
        y = convolved(layer.conv, wide)
        skip = cropped(layer_input, y) if layer.skip else None
        layer_input = x
        x = norm_relu(y, layer.norm, layer.activation, skip)
    return reference.to_image_range(x, layer.to_picture) if layers and layer.to_picture is not None else x


def convolved(conv: Any, x: Tensor) -> Tensor:
    """``conv(x)`` in training, by the fastest operation, and in channels-last memory on a CPU.

    Half precision that the processor is slow in is only how input and output are stored: the convolution runs in
    float32.

    Args:
        conv: ``nn.Conv2d`` or ``nn.ConvTranspose2d``, or any other module or function, which is called as it is.
        x: [N, C, H, W].
    """
    here = why_not_here() is None
    x = channels_last(x) if here and x.device.type == "cpu" and x.dim() == 4 and type(conv) in CONVOLUTIONS else x
    dtype, wide = storage_dtype(x), compute_dtype(x)
    if wide == dtype or torch.compiler.is_compiling() or not isinstance(conv, nn.Module):
        return _of_its_kind(conv, x) if here else conv(x)
    tensors = [*conv.named_parameters(), *((name, t) for name, t in vars(conv).items() if isinstance(t, Tensor))]
    parameters = {name: tensor.to(wide) for name, tensor in tensors}
    with torch.autocast(x.device.type, enabled=False):
        return torch.func.functional_call(conv, parameters, (x.to(wide),)).to(dtype)


def _of_its_kind(conv: Any, x: Tensor) -> Tensor:
    """``conv(x)`` by the operation for its kernel and stride."""
    if type(conv) is not nn.Conv2d or x.dim() != 4 or x.device.type != "cpu" or isinstance(conv.padding, str):
        return conv(x)
    (rows, columns), (top, left) = conv.kernel_size, conv.padding
    if _is_a_product(conv, x):
        y = F.linear(x.permute(0, 2, 3, 1), conv.weight.flatten(1), conv.bias)  # [N, H, W, C], all of them contiguous
        return y.permute(0, 3, 1, 2)
    plain = conv.stride == (1, 1) and conv.dilation == (1, 1) and conv.groups == 1 and conv.in_channels == x.shape[1]
    if plain and rows == columns and rows % 2 == 1 and rows >= 3 and top == left:
        few = conv.out_channels <= MOST_FILTERS and conv.in_channels >= FEWEST_CHANNELS and conv.bias is not None
        if few and conv.padding_mode in ("zeros", "reflect"):
            return RGB_CONV(x, conv.weight, conv.bias, same_sides(top, conv.padding_mode))
        if rows == 3 and conv.padding_mode == "zeros":
            return CONV3X3(x, conv.weight, conv.bias, top)
        if rows == 3:
            padded = F.pad(x, conv._reversed_padding_repeated_twice, mode=conv.padding_mode)
            return CONV3X3(channels_last(padded), conv.weight, conv.bias, 0)
    # Copied once; the library would copy it to channels-last memory both forward and backward.
    return conv._conv_forward(x, channels_last(conv.weight), conv.bias)


def _is_a_product(conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether a 1×1 convolution of an ``x`` in NHWC runs as one matrix product, which is a single call of MKL.

    oneDNN's convolutions copy the gradient of the weights to the layout of the weights, which takes longer.
    """
    pointwise = (conv.kernel_size, conv.stride, conv.padding, conv.groups) == ((1, 1), (1, 1), (0, 0), 1)
    if not pointwise or x.shape[1] != conv.in_channels or not torch.backends.mkl.is_available():
        return False
    if torch.is_autocast_enabled("cpu") or {x.dtype, conv.weight.dtype} != {torch.float32}:
        return False
    return backends.forced() != "reference" and min(conv.weight.shape[:2]) >= FEWEST_PRODUCT_CHANNELS


def _composed(x: Tensor, layers: Sequence[Layer]) -> Tensor:
    """``layers`` one by one, or as chains of those that the kernels can take between those that they cannot."""
    if backends.forced() is not None or _why_not_call(x, layers):
        return one_by_one(x, layers)
    rest = list(layers)
    while rest:
        blocks = list(_blocks(x, rest))
        chain = [layer for block, reason in blocks if reason is None for layer in block]
        if len(chain) == len(layers):  # a chain of them all was measured slower
            return one_by_one(x, layers)
        x = fused_chain(x, chain) if chain else one_by_one(x, blocks[0][0])
        rest = rest[len(chain or blocks[0][0]) :]
    return x


# The operation


def _tuned_shapes(batch: int, size: int) -> list[tuple[tuple[int, ...], ...]]:
    """Input and weights of a style network's blocks: one layer, or the two of a residual block."""
    half, quarter = size // 2, size // 4
    return [
        ((batch, 3, size, size), (32, 3, 9, 9)),
        ((batch, 32, size, size), (64, 32, 3, 3)),
        ((batch, 64, half, half), (64, 32, 3, 3)),
        ((batch, 128, quarter, quarter), (128, 128, 3, 3), (128, 128, 3, 3)),
    ]


def _tuned_call(x: Tensor, *weights: Tensor) -> tuple[Any, ...]:
    """The block of the style network with these weights: of 64 input channels the ½-stride convolution, of 32 the one
    of stride 2, of 128 a residual block."""

    def layer(weight: Tensor, skip: bool = False) -> Layer:
        channels, kernel = x.shape[1], weight.shape[2]
        stride = 2 if channels in (32, 64) else 1
        if channels == 64:
            conv: Any = nn.ConvTranspose2d(64, 32, 3, 2, 1, 1)
        else:
            conv = nn.Conv2d(channels, weight.shape[0], kernel, stride, kernel // 2)
        norm = nn.BatchNorm2d(conv.out_channels)
        for module in (conv, norm):
            module.to(x.device, x.dtype)
        del conv.weight
        conv.weight = weight  # itself, for its gradient
        return Layer(conv, norm, None if skip else RELU, "transposed" if channels == 64 else None, skip)

    return x, [layer(weight, skip=i == 1) for i, weight in enumerate(weights)]


def _measured_by(x: Tensor, layers: Sequence[Layer]) -> tuple[Tensor, ...]:
    """Input and weights of a block. Longer chains are not measured: their input says too little about them."""
    block = len(layers) == 1 or (len(layers) == 2 and layers[1].skip)
    return (x, *(layer.conv.weight for layer in layers)) if block else ()


CONV_CHAIN = register(
    Operation(
        "conv_chain",
        "Layers in a chain",
        (
            Implementation("triton", fused_chain, why_not_triton),
            Implementation(None, _composed),
        ),
        TuningCases(_tuned_shapes, _tuned_call),
        (
            *dict.fromkeys(
                (*CONV3X3.sources, *NORM_RELU.sources, *CONV_BN_RELU.sources, *SUBPIXEL_CONV_BN_RELU.sources)
            ),
            "fastperc/ops/conv_chain.py",
            "fastperc/ops/fused_chain.py",
            "fastperc/ops/kinds.py",
            "fastperc/ops/rgb_pictures.py",
            "fastperc/ops/weight_forms.py",
            "kernels/deferred.py",
            "kernels/fold_gradient.py",
            "kernels/chain_passes.py",
            "kernels/norm_coefficients.py",
            "kernels/pack_weights.py",
            "kernels/residual_inputs.py",
            "kernels/sum_parts.py",
            "kernels/weight_gradient.py",
            "kernels/rgb_weight_gradient.py",
            "kernels/rgb_conv_stem.py",
            "kernels/rgb_conv_head.py",
        ),
        _measured_by,
    )
)
