"""A frozen network's convolutions, each followed by ReLU, forward and back: what the backward keeps, and how it runs.

The weights want no gradients, so the backward needs little: where an activation was positive (a bit), which pixel a
pooling took (a byte a window), and the features that somebody asked for. Nothing else is kept, where autograd keeps
every activation and eight bytes a pooled one.

    forward    x ─ conv, ReLU ─ conv, ReLU ─┬─ pool ─ conv, ReLU ─ …
                        bits     features ──┘winners        bits
    backward   the same chain from its end; a gradient passes a layer as a convolution with its weights turned round
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastperc import _native
from fastperc.ops.conv3x3 import slower, unsupported, winograd
from fastperc.ops.frozen import empty_like
from fastperc.ops.packing import packed
from fastperc.types import FrozenConv


class Packed(NamedTuple):
    """A frozen convolution ready to run, forward and back."""

    weight: Tensor  # [O, I, 3, 3], channels-last
    bias: Tensor  # [O]
    mirrored: Tensor  # [I, O, 3, 3]: turned by 180°, in and out exchanged; what carries gradients to the input
    pooled: bool


def pack(conv: FrozenConv, dtype: torch.dtype) -> Packed:
    """``conv`` in ``dtype``."""

    def make() -> Packed:
        weight = conv.weight.detach().to(dtype, memory_format=torch.channels_last)
        mirrored = weight.flip(2, 3).transpose(0, 1).contiguous(memory_format=torch.channels_last)
        return Packed(weight, conv.bias.detach().to(dtype), mirrored, conv.pooled)

    return packed(("chain", dtype, conv.pooled), make, conv.weight, conv.bias)


def convolve_relu(x: Tensor, conv: Packed) -> Tensor:
    """Convolution, bias and ReLU; in one pass where there is one. (oneDNN has one too: it turns NaN into 0.)"""
    if unsupported(x, conv.weight, conv.bias) is None and not slower(x):
        return winograd(x, conv.weight, conv.bias, 1, relu=True)
    if x.device.type == "cuda" and torch.backends.cudnn.is_available():
        return torch.cudnn_convolution_relu(x, conv.weight, conv.bias, [1, 1], [1, 1], [1, 1], 1)
    return F.conv2d(x, conv.weight, conv.bias, padding=1).relu_()


def convolve_back(grad: Tensor, conv: Packed) -> Tensor:
    """The gradient to the convolution's input, from that to its output."""
    if unsupported(grad, conv.mirrored) is None and not slower(grad):
        return winograd(grad, conv.mirrored, None, 1, relu=False)
    return F.conv2d(grad, conv.mirrored, padding=1)


class Layer(NamedTuple):
    """What the backward needs of one convolution's output, channels-last [n, C, H, W]."""

    features: Tensor | None  # itself, where somebody asked for it
    bits: Tensor | None  # whether each element is positive; features tell that too, and so do winners
    winners: Tensor | None  # [n, C, H/2, W/2] uint8, where a pooling follows
    shape: torch.Size


def kernels_of(backend: str) -> Any:
    """Where ``relu_mask_fwd`` and its like are."""
    if backend == "native":
        return _native
    from fastperc.kernels import vgg_loss

    return vgg_loss


def forward_chain(
    x: Tensor, images: int, convs: Sequence[Packed], taps: Collection[int], rest_until: int, kernels: Any
) -> tuple[list[Layer], Tensor]:
    """Runs ``convs`` on ``x``, keeping what the backward of its first ``images`` needs and their features at ``taps``.

    The rest of the images goes along up to layer ``rest_until``. Returns the layers, and the rest's activations there.
    """
    layers, rest = [], x
    x = x.contiguous(memory_format=torch.channels_last)
    for i, conv in enumerate(convs):
        x = convolve_relu(x, conv)
        mine = x[:images]
        if i == rest_until:
            rest, x = x[images:], mine
        features = bits = winners = None
        if i in taps:
            alone = len(x) == images
            features = mine if alone else mine.clone(memory_format=torch.channels_last)  # or the rest would stay too
        if i + 1 < len(convs) and convs[i + 1].pooled:
            n, c, h, w = x.shape
            pooled = empty_like(x, torch.Size((n, c, h // 2, w // 2)))
            winners = torch.empty_like(pooled[:images], dtype=torch.uint8)
            kernels.relu_pool_fwd(x, pooled, winners)
            x = pooled
        elif features is None:
            bits = mine.new_empty((mine.numel() + 7) // 8, dtype=torch.uint8)
            kernels.relu_mask_fwd(mine, bits)
        layers.append(Layer(features, bits, winners, mine.shape))
        del mine  # the next convolution does not need it
    return layers, rest


def backward_chain(
    layers: list[Layer],
    convs: Sequence[Packed],
    tap_grad: Callable[[int, Tensor, Layer, Tensor | None], Tensor],
    kernels: Any,
) -> Tensor:
    """The gradient of the chain's input, freeing ``layers`` as it goes.

    ``tap_grad(i, features, layer, above)`` gives the gradient before the ReLU of a layer whose features are kept, from
    that of the layers above, which it may overwrite: after the pooling if one follows, ``None`` at the end.
    """
    grad: Tensor | None = None
    while layers:
        layer, i = layers.pop(), len(layers)
        if layer.features is not None:
            grad = tap_grad(i, layer.features, layer, grad)
        else:
            assert grad is not None, "the chain ends where somebody asked for features"
            if layer.winners is not None:
                grad = unpool(grad, layer, kernels)
            else:
                kernels.relu_mask_bwd(grad, layer.bits)
        del layer
        grad = convolve_back(grad, convs[i])
    assert grad is not None
    return grad


def unpool(grad_pooled: Tensor, layer: Layer, kernels: Any) -> Tensor:
    """The gradient before a layer's pooling and ReLU."""
    grad = empty_like(grad_pooled, layer.shape)
    kernels.relu_pool_bwd(grad_pooled.contiguous(memory_format=torch.channels_last), layer.winners, grad)
    return grad
