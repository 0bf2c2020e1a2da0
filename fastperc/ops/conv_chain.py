"""Convolutions in a row, in training, each with its norm, activation and skip. The activations between them are never
normalised in memory, neither forward nor backward.

    forward    each kernel normalises what it loads; it stores its raw output and that output's statistics by tiles
    saved      the raw outputs, and a few numbers a channel
    backward   each kernel computes the gradient before the norm from what it loads, passes its result through the
               ReLU of the layer before, and stores the sums that its norm's gradient needs

``fastperc.kernels.deferred`` draws it; ``ops/kinds.py`` has the kernels of each kind of layer. Only what a skip adds is
written out: the input of a residual block. Layers that Triton's kernels cannot serve run one by one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastperc import backends, kernels, reference
from fastperc.backends import Implementation, Operation, TuningCases, register
from fastperc.collective import gathered
from fastperc.ops.common import channels_last, compute_dtype, why_not_here
from fastperc.ops.conv3x3 import CONV3X3
from fastperc.ops.conv_bn_relu import CONV_BN_RELU
from fastperc.ops.kinds import CONV, STEM, GradientTarget, Layer, partials_of, why_not_layer
from fastperc.ops.norm_relu import FEWEST_VALUES, NORM_RELU, group_of, norm_relu
from fastperc.ops.subpixel_conv_bn_relu import SUBPIXEL_CONV_BN_RELU
from fastperc.types import RELU, Deferred


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
    layer_input = x
    for layer in layers:
        wide = F.interpolate(x, scale_factor=2, mode="nearest") if layer.upsample == "nearest" else x
        y = layer.conv(wide)
        skip = cropped(layer_input, y) if layer.skip else None
        layer_input = x
        relu = layer.norm is not None and layer.activation == RELU
        x = y if layer.norm is None else norm_relu(y, layer.norm, relu, skip)
        x = x if relu else reference.activate(x, layer.activation)
    return x


def cropped(x: Tensor, like: Tensor) -> Tensor:
    """The middle of ``x``, as large as ``like``."""
    top, left = (x.shape[2] - like.shape[2]) // 2, (x.shape[3] - like.shape[3]) // 2
    return x[:, :, top : top + like.shape[2], left : left + like.shape[3]]


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
        x = _fused(x, chain) if chain else one_by_one(x, blocks[0][0])
        rest = rest[len(chain or blocks[0][0]) :]
    return x


# As a chain of kernels


def _fused(x: Tensor, layers: Sequence[Layer]) -> Tensor:
    parameters = [parameter for layer in layers for parameter in layer.parameters]
    return _ConvChain.apply(x.to(compute_dtype(x)), tuple(layers), *parameters)


def differentiable_chain(x: Tensor, layers: Sequence[Layer], parameters: Sequence[Any]) -> Tensor:
    """The chain in plain PyTorch, for gradients of gradients; it updates no running statistics."""
    layer_input = x
    for layer, (weight, bias, norm_weight, norm_bias) in zip(layers, _by_layer(parameters)):
        y = layer.kind.equivalent(layer, x, weight, bias)
        skip, layer_input = cropped(layer_input, y) if layer.skip else None, x
        x = y
        if (norm := layer.norm) is not None:
            if layer.frozen:
                statistics = norm.running_mean, norm.running_var
                x = F.batch_norm(y, *statistics, norm_weight, norm_bias, False, 0.0, norm.eps)
            elif (group := group_of(norm)) is not None:
                x = reference.sync_norm_relu(y, norm_weight, norm_bias, norm.eps, False, group)[0]
            else:
                x = reference.norm_relu(y, norm_weight, norm_bias, norm.eps, False, layer.batch)
            x = reference.activate(x if skip is None else x + skip, layer.activation)
    return x


def _by_layer(parameters: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """The parameters of each layer, in the order of :attr:`Layer.parameters`."""
    return (parameters[i : i + 4] for i in range(0, len(parameters), 4))


Output = tuple[Tensor, Tensor | None]  # of a layer: its raw output, and the coefficients of its norm


class _ConvChain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layers: tuple[Layer, ...], *parameters: Tensor | None) -> Tensor:
        outputs: list[Output] = []
        counters = [layer.norm.num_batches_tracked for layer in layers if _updates_statistics(layer)]
        if counters:
            torch._foreach_add_(counters, 1)
        weights = list(_by_layer(parameters))

        def run(i: int, layer_input: Deferred) -> Output:
            outputs.append(_forward(layers[i], layer_input, *weights[i]))
            return outputs[-1]

        with backends.on_device(x), torch.autocast(x.device.type, enabled=False):
            *_, result = _layer_inputs(x, layers, run)
        ctx.layers = layers
        ctx.save_for_backward(x, *parameters, *(t for output in outputs for t in output))
        return result.x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        layers, count = ctx.layers, 1 + 4 * len(ctx.layers)
        saved = ctx.saved_tensors  # read once: torch.utils.checkpoint recomputes it each time
        x, *parameters = saved[:count]
        needed = [ctx.needs_input_grad[0], *ctx.needs_input_grad[2:]]
        if torch.is_grad_enabled():  # to be differentiated again
            leaves = [t for t, needs in zip((x, *parameters), needed) if needs]
            y = differentiable_chain(x, layers, parameters)
            grads = iter(torch.autograd.grad(y, leaves, grad, create_graph=True, materialize_grads=True))
            grad_x, *others = (next(grads) if needs else None for needs in needed)
            return grad_x, None, *others
        outputs = list(zip(saved[count::2], saved[count + 1 :: 2]))
        with backends.on_device(x), torch.autocast(x.device.type, enabled=False):
            grad_x, *others = _Backward(x, layers, parameters, outputs, needed).run(grad)
        return grad_x, None, *others


def _updates_statistics(layer: Layer) -> bool:
    return layer.batch and layer.norm.track_running_stats and layer.norm.training


def _layer_inputs(x: Tensor, layers: Sequence[Layer], run: Callable[[int, Deferred], Output]) -> Iterator[Deferred]:
    """What each layer loads and, last, the chain's result; ``run(i, input)`` gives layer i's output.

    Activations that a skip adds, or is added to, are written out.
    """
    activation, layer_input, skip = Deferred(x if layers[0].kind is STEM else channels_last(x)), None, None
    for i, layer in enumerate(layers):
        if skip is not None or (activation.coefficients is not None and _with_skip(layers[i + 1 : i + 2])):
            activation = Deferred(_written_out(activation, skip))
        yield activation
        y, coefficients = run(i, activation)
        skip = cropped(layer_input.x, y) if layer.skip and layer_input is not None else None
        relu = layer.activation is not None and coefficients is not None
        activation, layer_input = Deferred(y, coefficients, relu), activation
    yield activation if activation.coefficients is None else Deferred(_written_out(activation, skip))


def _written_out(activation: Deferred, skip: Tensor | None) -> Tensor:
    """``activation``, normalised, + ``skip``."""
    assert activation.coefficients is not None
    out = torch.empty_like(activation.x)
    kernels.instance_norm.instance_norm_fwd(activation.x, activation.coefficients, skip, activation.relu, out)
    return out


def _forward(
    layer: Layer, layer_input: Deferred, weight: Tensor, bias: Tensor, norm_weight: Any, norm_bias: Any
) -> Output:
    out, partials = layer.kind.forward(layer, layer_input, weight.detach(), bias.float())
    if layer.norm is None:
        return out, None
    return out, _norm_coefficients(layer, partials, norm_weight.float(), norm_bias.float())


def _norm_coefficients(layer: Layer, partials: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
    """The coefficients of a layer's norm, from its output's statistics by tiles; updates the running statistics."""
    norm, running, module = layer.norm, None, kernels.instance_norm
    if layer.batch and norm.track_running_stats:
        running = module.RunningStatistics(norm.running_mean, norm.running_var, norm.momentum, norm.num_batches_tracked)
    if layer.batch and partials is not None:
        partials = partials.flatten(0, 1)[None]
        if (group := group_of(norm)) is not None:
            statistics = partials.new_empty(1, 3, len(weight))
            module.norm_coefficients(partials, weight, bias, norm.eps, statistics=statistics)
            partials = gathered(statistics[0], group)[None]
    return module.norm_coefficients(partials, weight, bias, norm.eps, running)


class _Backward:
    """The backward of a chain: the gradients of its input and parameters, where they are needed."""

    def __init__(
        self,
        x: Tensor,
        layers: Sequence[Layer],
        parameters: Sequence[Any],
        outputs: Sequence[Output],
        needed: Sequence[bool],
    ) -> None:
        self.layers, self.needed, self.weights = layers, needed, list(_by_layer(parameters))
        self.leaves = (x, *parameters)
        self.inputs = list(islice(_layer_inputs(x, layers, lambda i, layer_input: outputs[i]), len(layers)))
        self.activations = [
            Deferred(y, coefficients, layer.activation is not None) for layer, (y, coefficients) in zip(layers, outputs)
        ]
        self.grads: list[Tensor | None] = [None] * len(needed)  # of the input, then four for each layer

    def run(self, grad: Tensor) -> list[Tensor | None]:
        """The gradients, from that of the chain's result."""
        deepest = next(i for i, needs in enumerate(self.needed) if needs)  # gradients stop there
        grad_y, partials = self._through_last_activation(grad)
        skips: dict[int, Tensor] = {}  # the gradients that skips bring to a layer's input
        for i in reversed(range(len(self.layers))):
            layer, first = self.layers[i], 1 + 4 * i
            if layer.skip:
                skips[i - 1] = _uncropped(grad_y, self.inputs[i - 1].x)
            raw_grad = self._through_norm(i, grad_y, partials)
            if self.needed[first]:
                self.grads[first] = layer.kind.weight_gradient(layer, self.inputs[i], raw_grad)
            if deepest >= first:
                break
            target = GradientTarget(self.inputs[i].x, self.activations[i - 1] if i else None, skips.pop(i, None))
            grad_y, partials = layer.kind.data_gradient(layer, raw_grad, self.weights[i][0].detach(), target)
            if i == 0:
                self.grads[0] = grad_y
        return [
            grad.to(leaf.dtype) if needs and grad is not None else None
            for grad, leaf, needs in zip(self.grads, self.leaves, self.needed)
        ]

    def _through_last_activation(self, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        """The gradient after the last norm, and its sums by tiles; without a norm, that of the output."""
        activation, fold = self.activations[-1], kernels.fold_gradient
        grad = grad.to(activation.x.dtype)
        if self.layers[-1].norm is None:
            return grad, None
        out = torch.empty_like(activation.x)
        partials = partials_of(out, fold.fold_gradient_tiles(out), 2)
        fold.fold_gradient(grad, None, activation, out, (0, 0, 0, 0), False, partials)
        return out, partials

    def _through_norm(self, i: int, grad_y: Tensor, partials: Tensor | None) -> Deferred:
        """The gradient of layer i's raw output, to be computed where it is loaded, from that after its norm.

        Stores the gradients of the convolution's bias and of the norm's weight and bias.
        """
        layer, (_, bias, norm_weight, _), first = self.layers[i], self.weights[i], 1 + 4 * i
        if layer.norm is None:
            if self.needed[first + 1]:
                self.grads[first + 1] = grad_y.sum((0, 2, 3), dtype=torch.float32)
            return Deferred(grad_y)
        activation, module, scale = self.activations[i], kernels.instance_norm, norm_weight.float()
        assert partials is not None and activation.coefficients is not None
        if layer.batch:
            partials = partials.flatten(0, 1)[None]
        coefficients, sums = module.gradient_coefficients(partials, scale, activation.coefficients, layer.frozen)
        grad_bias = torch.zeros_like(bias)  # the norm subtracts the bias again
        if layer.frozen:
            grad_bias = coefficients[0, 0] * sums[0, 0]
        elif (group := group_of(layer.norm)) is not None:
            sums_of_all = gathered(sums[0], group)[None]
            coefficients, _ = module.gradient_coefficients(sums_of_all, scale, activation.coefficients, False)
        grad_norm_bias, grad_norm_weight = sums.sum(0)
        self.grads[first + 1 : first + 4] = grad_bias, grad_norm_weight, grad_norm_bias
        return Deferred(grad_y, coefficients, other=None if layer.frozen else activation.x)


def _uncropped(grad: Tensor, like: Tensor) -> Tensor:
    """The gradient of what :func:`cropped` cut ``grad``'s part from."""
    left, top = (like.shape[3] - grad.shape[3]) // 2, (like.shape[2] - grad.shape[2]) // 2
    if not left and not top:
        return grad
    right, bottom = like.shape[3] - grad.shape[3] - left, like.shape[2] - grad.shape[2] - top
    return channels_last(F.pad(grad, (left, right, top, bottom)))


# The operation


def _tuned_call(x: Tensor) -> tuple[Any, ...]:
    """The style network's layer with as many input channels as ``x``; of 128, a residual block."""

    def layer(conv: Any, upsample: str | None = None, skip: bool = False) -> Layer:
        norm = nn.BatchNorm2d(conv.out_channels)
        for module in (conv, norm):
            module.to(x.device, x.dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return Layer(conv, norm, None if skip else RELU, upsample, skip)

    layers = {
        3: lambda: [layer(nn.Conv2d(3, 32, 9, padding=4))],
        32: lambda: [layer(nn.Conv2d(32, 64, 3, 2, 1))],
        64: lambda: [layer(nn.ConvTranspose2d(64, 32, 3, 2, 1, 1), "transposed")],
        128: lambda: [layer(nn.Conv2d(128, 128, 3, padding=1), skip=skip) for skip in (False, True)],
    }
    return x, layers[x.shape[1]]()


CONV_CHAIN = register(
    Operation(
        "conv_chain",
        "Layers in a chain",
        (
            Implementation("triton", _fused, why_not_triton),
            Implementation(None, _composed),
        ),
        TuningCases(
            lambda batch, size: [((batch, c, size // s, size // s),) for c, s in ((3, 1), (32, 1), (64, 2), (128, 4))],
            _tuned_call,
        ),
        (
            *dict.fromkeys(
                (*CONV3X3.sources, *NORM_RELU.sources, *CONV_BN_RELU.sources, *SUBPIXEL_CONV_BN_RELU.sources)
            ),
            "fastperc/ops/conv_chain.py",
            "fastperc/ops/kinds.py",
            "kernels/fold_gradient.py",
            "kernels/weight_gradient.py",
            "kernels/rgb_conv_stem.py",
            "kernels/rgb_conv_head.py",
        ),
    )
)
