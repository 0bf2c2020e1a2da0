"""VGG's frozen convolutions, each followed by ReLU, forward and backward: what the backward keeps, and how it runs.

The weights want no gradients, so the backward needs little: whether each activation was positive (a bit), which pixel a
pooling took (a byte a window), and the features that the caller asked for. Autograd would keep every activation, and
eight bytes for each pooled one.

    forward    x ─ conv, ReLU ─ conv, ReLU ─┬─ pool ─ conv, ReLU ─ …
                        bits     features ──┘winners        bits
    backward   the same chain from its end; a gradient passes a layer as a convolution with turned weights
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fastperc import backends, kernels
from fastperc.backends import Implementation, Operation, TuningCases, first_two_arguments, register
from fastperc.ops import cudnn
from fastperc.ops.common import channels_last, empty_like, packed
from fastperc.ops.conv3x3 import CONV3X3, why_not_winograd, why_slow_winograd, winograd
from fastperc.types import RELU, Epilogue, FrozenConv, Window, same_sides


class PackedConv(NamedTuple):
    """A frozen convolution ready to run, forward and backward."""

    weight: Tensor  # [O, I, 3, 3], channels-last
    bias: Tensor  # [O]
    turned: Tensor  # [I, O, 3, 3]: rotated by 180°, in and out exchanged; what carries gradients to the input
    pooled: bool  # whether a 2×2 max pooling precedes it


def pack(conv: FrozenConv, dtype: torch.dtype) -> PackedConv:
    """``conv`` in ``dtype``."""

    def make() -> PackedConv:
        weight = conv.weight.detach().to(dtype, memory_format=torch.channels_last)
        turned = channels_last(weight.flip(2, 3).transpose(0, 1))
        return PackedConv(weight, conv.bias.detach().to(dtype), turned, conv.pooled)

    return packed(("vgg", dtype, conv.pooled), make, conv.weight, conv.bias)


def convolve_relu(x: Tensor, conv: PackedConv) -> Tensor:
    """Convolution, bias and ReLU. ``x`` is channels-last."""
    return VGG_CONV(x, conv.weight, conv.bias)


def convolve_turned(grad: Tensor, conv: PackedConv) -> Tensor:
    """The gradient to the convolution's input, from that to its output."""
    return VGG_CONV(grad, conv.turned, None)


class SavedLayer(NamedTuple):
    """What the backward needs of one convolution's output, channels-last [n, C, H, W]."""

    features: Tensor | None  # the output itself, where the caller asked for it
    bits: Tensor | None  # whether each element is positive; features tell that too, and so do winners
    winners: Tensor | None  # [n, C, H/2, W/2] uint8, where a pooling follows
    shape: torch.Size


class Passes(Protocol):
    """The elementwise passes between the convolutions: ``fastperc._native`` and ``fastperc.kernels.vgg_loss``."""

    def relu_mask_fwd(self, x: Tensor, bits: Tensor) -> None: ...
    def relu_mask_bwd(self, grad: Tensor, bits: Tensor) -> None: ...
    def relu_pool_fwd(self, x: Tensor, pooled: Tensor, winners: Tensor) -> None: ...
    def relu_pool_bwd(self, grad_pooled: Tensor, winners: Tensor, grad: Tensor) -> None: ...


def forward_chain(
    x: Tensor, images: int, convs: Sequence[PackedConv], taps: Collection[int], rest_until: int, passes: Passes
) -> tuple[list[SavedLayer], Tensor]:
    """Runs ``convs`` on ``x``, saving what the backward of its first ``images`` needs and their features at ``taps``.

    The other images go along up to layer ``rest_until``. Returns the layers, and those images' activations there.
    """
    layers, rest = [], x
    x = channels_last(x)
    for i, conv in enumerate(convs):
        x = convolve_relu(x, conv)
        own = x[:images]
        if i == rest_until:
            rest, x = x[images:], own
        features = bits = winners = None
        if i in taps:
            alone = len(x) == images
            features = own if alone else own.clone(memory_format=torch.channels_last)  # else the rest would be kept too
        if i + 1 < len(convs) and convs[i + 1].pooled:
            n, c, h, w = x.shape
            pooled = empty_like(x, torch.Size((n, c, h // 2, w // 2)))
            winners = torch.empty_like(pooled[:images], dtype=torch.uint8)
            passes.relu_pool_fwd(x, pooled, winners)
            x = pooled
        elif features is None:
            bits = own.new_empty((own.numel() + 7) // 8, dtype=torch.uint8)
            passes.relu_mask_fwd(own, bits)
        layers.append(SavedLayer(features, bits, winners, own.shape))
        del own  # the next convolution does not need it
    return layers, rest


def backward_chain(
    layers: list[SavedLayer],
    convs: Sequence[PackedConv],
    tap_gradient: Callable[[int, Tensor, SavedLayer, Tensor | None], Tensor],
    passes: Passes,
) -> Tensor:
    """The gradient of the chain's input, freeing ``layers`` on the way.

    ``tap_gradient(i, features, layer, above)`` gives the gradient before the ReLU of a layer whose features are kept.
    ``above`` is the gradient from the layers above, which it may overwrite: after the pooling if one follows, ``None``
    at the end of the chain.
    """
    grad: Tensor | None = None
    while layers:
        layer, i = layers.pop(), len(layers)
        if layer.features is not None:
            grad = tap_gradient(i, layer.features, layer, grad)
        else:
            assert grad is not None, "the chain ends at a layer whose features are kept"
            if layer.winners is not None:
                grad = unpool(grad, layer, passes)
            else:
                assert layer.bits is not None
                passes.relu_mask_bwd(grad, layer.bits)
        del layer
        grad = convolve_turned(grad, convs[i])
    assert grad is not None
    return grad


def unpool(grad_pooled: Tensor, layer: SavedLayer, passes: Passes) -> Tensor:
    """The gradient before a layer's pooling and ReLU."""
    assert layer.winners is not None
    grad = empty_like(grad_pooled, layer.shape)
    passes.relu_pool_bwd(channels_last(grad_pooled), layer.winners, grad)
    return grad


# The convolution with its bias and ReLU or, without a bias, alone.


def _why_not_triton(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    if not x.is_contiguous(memory_format=torch.channels_last):
        return "the activations are not in NHWC"
    return backends.why_not_triton_product(x) or ("the tensor is empty" if x.numel() == 0 else None)


def _why_slow_triton(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    return None if weight.shape[0 if bias is None else 1] == 3 else "between many channels cuDNN is faster"


def _triton(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The kernels of a network's two ends where there are three channels, else that of its convolutions between."""
    out = empty_like(x, (len(x), len(weight), *x.shape[2:]))
    bias = None if bias is None else packed("float32", bias.float, bias)
    border, relu = same_sides(1), bias is not None
    with backends.on_device(x):
        if x.shape[1] == 3 and bias is not None:
            stem = kernels.rgb_conv_stem
            picture = stem.rgb_prepare(x, Window(0, 0, *x.shape[2:]), border, (1.0, 0.0), x.dtype)
            stem.rgb_conv_stem_fwd(picture, packed("stem", lambda: stem.pack(weight), weight), bias, out, True)
        elif len(weight) == 3 and not relu:
            head = kernels.rgb_conv_head
            head.rgb_conv_head_fwd(x, packed("head", lambda: head.pack(weight), weight), bias, out, border, None)
        else:
            epilogue = Epilogue(activation=RELU if relu else None)
            kernels.conv_bn_relu.conv_bn_relu_fwd(x, weight, bias, out, 1, border, epilogue)
    return out


def _why_not_winograd(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    if not x.is_contiguous(memory_format=torch.channels_last):
        return "the activations are not in NHWC"
    return why_not_winograd(x, weight, bias) or ("the tensor is empty" if x.numel() == 0 else None)


def _why_slow_winograd(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    return why_slow_winograd(len(x) * x.shape[2] * x.shape[3])


def _winograd(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return winograd(x, weight, bias, 1, relu=bias is not None)


def _why_not_cudnn(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    return "there is no ReLU to fuse" if bias is None else cudnn.why_not(x, weight)


def _cudnn(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return cudnn.convolution_relu(x, weight, bias, padding=(1, 1))


def _library(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """PyTorch's own two calls. oneDNN fuses them, but its ReLU turns NaN into 0."""
    y = F.conv2d(x, weight, bias, padding=1)
    return y if bias is None else y.relu_()


VGG_CONV = register(
    Operation(
        "vgg_conv",
        "Loss network's conv, ReLU",
        (
            Implementation("triton", _triton, _why_not_triton, _why_slow_triton),
            Implementation("native", _winograd, _why_not_winograd, _why_slow_winograd, "winograd"),
            Implementation("native", _cudnn, _why_not_cudnn, label="cudnn"),
            Implementation("reference", _library, label="library"),
        ),
        TuningCases(
            lambda batch, size: [((batch, 64, size, size), (64, 64, 3, 3))],
            lambda x, weight: (x, weight, weight.new_zeros(weight.shape[0])),
        ),
        (
            *CONV3X3.sources,
            "fastperc/ops/vgg_chain.py",
            "fastperc/ops/cudnn.py",
            "kernels/configs.py",
            "kernels/conv_bn_relu.py",
            "kernels/rgb_conv_stem.py",
            "kernels/rgb_conv_head.py",
        ),
        first_two_arguments,
        frozen=True,
        forcible=False,
    )
)
