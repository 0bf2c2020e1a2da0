"""VGG's frozen convolutions, each followed by ReLU, forward and backward: what the backward keeps, and how it runs.

The weights want no gradients, so the backward needs little: whether each activation was positive (a bit), which pixel a
pooling took (a byte a window), and what the taps, the places whose maps are wanted, keep for themselves. Autograd would
keep every activation, and eight bytes for each pooled one.

    forward    x ─ conv ─ ReLU ─ conv ─ ReLU ─ pool ─ conv ─ ReLU ─ …
                          bits          winners              bits
    taps            │       │      │      │      │      │      │
    backward   the same chain from its end; a gradient passes a layer as a convolution with turned weights
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fastperc import backends, kernels
from fastperc.backends import Implementation, Operation, TuningCases, first_two_arguments, register
from fastperc.ops import cudnn
from fastperc.ops.common import channels_last, empty_like, packed
from fastperc.ops.conv3x3 import CONV3X3, why_not_winograd, why_slow_winograd, winograd
from fastperc.types import RELU, Epilogue, FrozenConv, Tap, Window, same_sides


class PackedConv(NamedTuple):
    """A frozen convolution ready to run, forward and backward."""

    weight: Tensor  # [O, I, 3, 3], channels-last
    bias: Tensor  # [O]
    turned: Tensor  # [I, O, 3, 3]: rotated by 180°, in and out exchanged; what carries gradients to the input
    pooled: bool  # whether a 2×2 pooling precedes it
    averages: bool  # whether the network's poolings take averages


def pack(conv: FrozenConv, dtype: torch.dtype) -> PackedConv:
    """``conv`` in ``dtype``."""

    def make() -> PackedConv:
        weight = conv.weight.detach().to(dtype, memory_format=torch.channels_last)
        turned = channels_last(weight.flip(2, 3).transpose(0, 1))
        return PackedConv(weight, conv.bias.detach().to(dtype), turned, conv.pooled, conv.averages)

    return packed(("vgg", dtype, conv.pooled, conv.averages), make, conv.weight, conv.bias)


def convolve_relu(x: Tensor, conv: PackedConv) -> Tensor:
    """Convolution, bias and ReLU. ``x`` is channels-last."""
    return VGG_CONV(x, conv.weight, conv.bias, True)


def convolve_turned(grad: Tensor, conv: PackedConv) -> Tensor:
    """The gradient to the convolution's input, from that to its output."""
    return VGG_CONV(grad, conv.turned, None, False)


class Pictures(NamedTuple):
    """Pictures that Triton's kernel of the first convolution normalises as it loads them."""

    output: Tensor  # RGB [N, 3, H, W], any strides
    target: Tensor | None  # as many, which follow in the batch; None: no such
    mean: Tensor  # 3 numbers float32
    std: Tensor  # the same; what the network sees is (picture − mean) / std
    dtype: torch.dtype  # of the maps

    def convolved(self, conv: PackedConv, relu: bool) -> Tensor:
        """The maps of ``conv`` [N or 2N, C, H, W], channels-last, and their ReLU if ``relu``."""
        stem, (images, _, height, width) = kernels.rgb_conv_stem, self.output.shape
        out = torch.empty(
            images if self.target is None else 2 * images,
            *(len(conv.weight), height, width),
            dtype=self.dtype,
            device=self.output.device,
            memory_format=torch.channels_last,
        )
        loaded = kernels.loss_terms.normalise_pictures(self.output, self.target, self.mean, self.std, self.dtype)
        weight = packed("stem", lambda: stem.pack(conv.weight), conv.weight)
        bias = packed("float32", conv.bias.float, conv.bias)
        stem.rgb_conv_stem_fwd(loaded, weight, bias, out, RELU if relu else None)
        return out


class SavedLayer(NamedTuple):
    """What the backward needs of one convolution's output, channels-last [n, C, H, W], besides what its taps keep."""

    shape: torch.Size
    bits: Tensor | None = None  # whether each element is positive; winners tell that too, and so does what a tap keeps
    winners: Tensor | None = None  # [n, C, H/2, W/2] uint8, where a max pooling follows
    averages: bool = False  # whether an average pooling follows
    relu: bool = True  # whether its ReLU is part of the chain


class Taps(NamedTuple):
    """The taps of a forward."""

    visit: Callable[[Tap, Tensor], Tensor]
    """Takes the maps of all images at a tap; returns those of the images that go on."""
    places: Collection[Tap]
    kept: Collection[Tap] = ()
    """The taps whose maps ``visit`` keeps for the backward, or gives to the caller: nothing may change them."""
    late: bool = False
    """Whether ``visit`` comes to a tap after a ReLU when the bits are taken and the pooling is done, if there is one.
    Then it may overwrite the maps, unless a convolution reads them next, and its gradient enters the backward before
    the ReLU, at the tap of the convolution."""


class Passes(Protocol):
    """The elementwise passes between the convolutions: ``fastperc._native`` and ``fastperc.kernels.vgg_loss``."""

    def relu_mask_fwd(self, x: Tensor, bits: Tensor) -> None: ...
    def relu_mask_bwd(self, grad: Tensor, bits: Tensor) -> None: ...
    def relu_pool_fwd(self, x: Tensor, pooled: Tensor, winners: Tensor) -> None: ...
    def relu_pool_bwd(self, grad_pooled: Tensor, winners: Tensor, grad: Tensor) -> None: ...


def forward_chain(
    batch: Tensor | Pictures, images: int, convs: Sequence[PackedConv], taps: Taps, passes: Passes
) -> list[SavedLayer]:
    """Runs ``convs`` on ``batch`` down to the deepest tap, and returns what the backward of the first ``images``
    needs."""
    layers = []
    waits, waiting = hasattr(passes, "relu_masks_fwd"), Waiting()
    last, deepest = (max(values) for values in zip(*((tap.conv, tap.place) for tap in taps.places)))
    x: Any = batch if isinstance(batch, Pictures) else channels_last(batch)
    for i, conv in enumerate(convs[: 1 + last]):
        before_relu, after_relu, after_pool = (Tap(i, kind) for kind in ("conv", "relu", "pool"))
        if before_relu in taps.places:
            x = taps.visit(before_relu, _convolved(x, conv, False))
            if before_relu.place == deepest:
                layers.append(SavedLayer(x[:images].shape, relu=False))
                break
            x = x.relu() if before_relu in taps.kept else x.relu_()
        else:
            x = _convolved(x, conv, True)
        is_tap = after_relu in taps.places
        is_late = is_tap and taps.late
        if is_tap and not is_late:
            x = taps.visit(after_relu, x)
        pooled = after_pool in taps.places or (i < last and convs[i + 1].pooled)
        winners_mask = pooled and not conv.averages and (is_late or not is_tap)
        nothing_to_mask = is_late and after_relu.place == deepest
        is_masked = after_relu in taps.kept or winners_mask or nothing_to_mask
        bits = None if is_masked or images == 0 else _empty_bits(x[:images])
        if bits is not None:
            waiting.append((x[:images], bits))
            if is_tap or not waits:  # ``visit`` may overwrite the maps of a tap
                _fill_bits(waiting, passes)
        shape, winners, before_pool = x[:images].shape, None, x
        if pooled:
            x, winners = _pool(x, images, conv.averages, passes, waiting)
        if is_late:
            taps.visit(after_relu, before_pool)
        del before_pool
        if after_pool in taps.places:
            x = taps.visit(after_pool, x)
        layers.append(SavedLayer(shape, bits, winners, pooled and conv.averages))
    _fill_bits(waiting, passes)
    return layers


def _convolved(x: Tensor | Pictures, conv: PackedConv, relu: bool) -> Tensor:
    """Convolution and bias, and ReLU if ``relu``. A tensor ``x`` is channels-last."""
    return x.convolved(conv, relu) if isinstance(x, Pictures) else VGG_CONV(x, conv.weight, conv.bias, relu)


def chunks(x: Tensor, images_on_cpu: int) -> list[slice]:
    """The images that go through the chain together: on a GPU all of them, on a CPU ``images_on_cpu``."""
    step = len(x) if x.device.type == "cuda" else images_on_cpu
    return [slice(i, i + step) for i in range(0, len(x), step)]


Waiting = list[tuple[Tensor, Tensor]]
"""Outputs of ReLUs and the memory for their bits, which kernels of Triton fill in the launch of the next pooling."""


def _empty_bits(x: Tensor) -> Tensor:
    """Memory for a bit for each element of ``x``, the output of a ReLU: whether it is positive."""
    return x.new_empty((x.numel() + 7) // 8, dtype=torch.uint8)


def _fill_bits(waiting: Waiting, passes: Passes) -> None:
    """Fills the bits that wait."""
    if len(waiting) > 1:
        passes.relu_masks_fwd(waiting)  # type: ignore[attr-defined]
    elif waiting:
        passes.relu_mask_fwd(*waiting[0])
    waiting.clear()


def _pool(x: Tensor, images: int, averages: bool, passes: Passes, waiting: Waiting) -> tuple[Tensor, Tensor | None]:
    """``x`` pooled, and where the maxima of the first ``images`` are; fills the bits that wait."""
    if averages:
        _fill_bits(waiting, passes)
        return channels_last(F.avg_pool2d(x, 2)), None
    n, c, h, w = x.shape
    pooled = empty_like(x, (n, c, h // 2, w // 2))
    winners = torch.empty_like(pooled[:images], dtype=torch.uint8)
    if waiting:
        passes.relu_pool_masks_fwd(x, pooled, winners, waiting)  # type: ignore[attr-defined]
        waiting.clear()
    else:
        passes.relu_pool_fwd(x, pooled, winners)
    return pooled, winners


def backward_chain(
    layers: list[SavedLayer],
    convs: Sequence[PackedConv],
    tap_gradients: Mapping[Tap, Callable[[SavedLayer, Tensor | None], Tensor | None]],
    passes: Passes,
) -> Tensor | None:
    """The gradient of the chain's input, freeing ``layers`` on the way; ``None`` if no tap has one.

    ``tap_gradients`` has a function for each tap: ``(layer, above)`` → the gradient there and, for a tap after a ReLU,
    before that ReLU. ``above`` is the gradient from the layers above, which it may overwrite (for a tap after a ReLU
    with a pooling above it, from after that pooling), and ``None`` where no tap above has a gradient.
    """
    grad: Tensor | None = None
    while layers:
        layer, i = layers.pop(), len(layers)
        if (at_tap := tap_gradients.get(Tap(i, "pool"))) is not None:
            grad = at_tap(layer, grad)
        if (at_tap := tap_gradients.get(Tap(i, "relu"))) is not None:
            grad = at_tap(layer, grad)
        elif grad is not None and layer.relu:
            is_masked = layer.winners is not None
            grad = unpool(grad, layer, passes)
            if not is_masked:
                mask(grad, layer, passes)
        if (at_tap := tap_gradients.get(Tap(i, "conv"))) is not None:
            grad = at_tap(layer, grad)
        del layer
        if grad is not None:
            grad = convolve_turned(channels_last(grad), convs[i])
    return grad


def unpool(grad: Tensor, layer: SavedLayer, passes: Passes) -> Tensor:
    """The gradient before a layer's pooling and, for a max pooling, before its ReLU; ``grad`` itself without one."""
    if layer.winners is not None:
        before = empty_like(grad, layer.shape)
        passes.relu_pool_bwd(channels_last(grad), layer.winners, before)
        return before
    if not layer.averages:
        return grad
    before = empty_like(grad, layer.shape)
    height, width = (2 * size for size in grad.shape[2:])
    before[:, :, height:], before[:, :, :, width:] = 0, 0  # an odd last row or column, which no window covers
    quarter = grad / 4
    for row in (0, 1):
        for column in (0, 1):
            before[:, :, row:height:2, column:width:2] = quarter
    return before


def mask(grad: Tensor, layer: SavedLayer, passes: Passes) -> None:
    """Sets ``grad``, the gradient after a layer's ReLU, to zero where the ReLU's output is zero."""
    assert layer.bits is not None
    passes.relu_mask_bwd(grad, layer.bits)


# The convolution with its bias, and its ReLU if asked for; without a bias, alone.


def _why_not_triton(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool = True) -> str | None:
    if not x.is_contiguous(memory_format=torch.channels_last):
        return "the activations are not in NHWC"
    return backends.why_not_triton_product(x) or ("the tensor is empty" if x.numel() == 0 else None)


def _why_slow_triton(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool = True) -> str | None:
    return None if weight.shape[0 if bias is None else 1] == 3 else "between many channels cuDNN is faster"


def _triton(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool = True) -> Tensor:
    """The kernels of a network's two ends where there are three channels, else that of its convolutions between."""
    out = empty_like(x, (len(x), len(weight), *x.shape[2:]))
    bias = None if bias is None else packed("float32", bias.float, bias)
    border, last = same_sides(1), RELU if relu and bias is not None else None
    with backends.on_device(x):
        if x.shape[1] == 3 and bias is not None:
            stem = kernels.rgb_conv_stem
            picture = stem.rgb_prepare(x, Window(0, 0, *x.shape[2:]), border, (1.0, 0.0), x.dtype)
            stem.rgb_conv_stem_fwd(picture, packed("stem", lambda: stem.pack(weight), weight), bias, out, last)
        elif len(weight) == 3 and bias is None:
            head = kernels.rgb_conv_head
            head.rgb_conv_head_fwd(x, packed("head", lambda: head.pack(weight), weight), bias, out, border, None)
        else:
            epilogue = Epilogue(activation=last)
            kernels.conv_bn_relu.conv_bn_relu_fwd(x, weight, bias, out, 1, border, epilogue)
    return out


def _why_not_winograd(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool = True) -> str | None:
    if not x.is_contiguous(memory_format=torch.channels_last):
        return "the activations are not in NHWC"
    return why_not_winograd(x, weight, bias) or ("the tensor is empty" if x.numel() == 0 else None)


def _why_slow_winograd(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool = True) -> str | None:
    return why_slow_winograd(len(x) * x.shape[2] * x.shape[3])


def _winograd(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool = True) -> Tensor:
    return winograd(x, weight, bias, 1, relu=relu and bias is not None)


def _why_not_cudnn(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool = True) -> str | None:
    return cudnn.why_not(x, weight) if relu and bias is not None else "there is no ReLU to fuse"


def _cudnn(x: Tensor, weight: Tensor, bias: Tensor, relu: bool = True) -> Tensor:
    return cudnn.convolution_relu(x, weight, bias, padding=(1, 1))


def _library(x: Tensor, weight: Tensor, bias: Tensor | None, relu: bool = True) -> Tensor:
    """PyTorch's own two calls. oneDNN fuses them, but its ReLU turns NaN into 0."""
    y = F.conv2d(x, weight, bias, padding=1)
    return y.relu_() if relu and bias is not None else y


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
