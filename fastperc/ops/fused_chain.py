"""The chain of kernels of ``ops.conv_chain`` as a function that autograd can differentiate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastperc import backends, kernels, reference
from fastperc.collective import gathered
from fastperc.ops.common import channels_last, compute_dtype, partials_of, siblings
from fastperc.ops.kinds import HEAD, STEM, GradientTarget, Layer
from fastperc.ops.norm_relu import group_of
from fastperc.ops.rgb_pictures import SCALINGS, gradient_of_raw
from fastperc.ops.weight_forms import Weight, in_forms
from fastperc.types import Deferred

if TYPE_CHECKING:
    from fastperc.kernels.chain_passes import Norm, Pass

MOST_BYTES_IN_PARTS = 64 << 20  # that gradients of weights in parts take; no more than half of what is kept


def fused_chain(x: Tensor, layers: Sequence[Layer]) -> Tensor:
    """``layers`` on Triton's kernels; see :func:`fastperc.ops.conv_chain.conv_chain`."""
    parameters = [parameter for layer in layers for parameter in layer.parameters]
    dtype = compute_dtype(x)
    x = x if layers[0].kind is STEM else x.to(dtype)  # the stem's kernel converts what it loads
    return _ConvChain.apply(x, dtype, tuple(layers), *parameters)


def cropped(x: Tensor, like: Tensor) -> Tensor:
    """The middle of ``x``, as large as ``like``."""
    top, left = (x.shape[2] - like.shape[2]) // 2, (x.shape[3] - like.shape[3]) // 2
    return x[:, :, top : top + like.shape[2], left : left + like.shape[3]]


def differentiable_chain(x: Tensor, layers: Sequence[Layer], parameters: Sequence[Any]) -> Tensor:
    """The chain in plain PyTorch, for gradients of gradients; it updates no running statistics."""
    if layers[0].from_picture is not None:
        x = reference.to_network_range(x, layers[0].from_picture)
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
    return x if layers[-1].to_picture is None else reference.to_image_range(x, layers[-1].to_picture)


def _by_layer(parameters: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """The parameters of each layer, in the order of :attr:`Layer.parameters`."""
    return (parameters[i : i + 4] for i in range(0, len(parameters), 4))


class _ConvChain(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dtype: torch.dtype, layers: tuple[Layer, ...], *parameters: Tensor | None
    ) -> Tensor:
        counters = [layer.norm.num_batches_tracked for layer in layers if _updates_statistics(layer)]
        if counters:
            torch._foreach_add_(counters, 1)
        with backends.on_device(x), torch.autocast(x.device.type, enabled=False):
            weights = in_forms([layer.kind.forms(layer) for layer in layers], parameters[::4], dtype)
            outputs: list[Output] = []
            inputs = _Inputs(x, layers, outputs)
            numbers = [len(layers) * kernels.chain_passes.COUNTERS, _zeros_of_backward(layers, len(x))]  # in one launch
            zeros, ctx.zeros = torch.zeros(sum(numbers), device=x.device).split(numbers)
            zeros = zeros.view(torch.int32).view(len(layers), -1)
            picture = None
            for i, (layer, (_, bias, scale, shift)) in enumerate(zip(layers, _by_layer(parameters))):
                if layer.to_picture is not None:
                    raw, picture = HEAD.painted(layer, inputs[i], weights[i], bias.float())
                    partials = None
                else:
                    raw, partials = layer.kind.forward(layer, inputs[i], weights[i], bias.float(), dtype)
                coefficients = None
                if layer.norm is not None:
                    inputs.norms[i] = _norm(layer, partials, scale.float(), shift.float(), zeros[i])
                    coefficients = inputs.norms[i].empty_coefficients()
                outputs.append(Output(raw, coefficients))
                inputs.forget_before(i)
            result = inputs[len(layers)] if layers[-1].norm else outputs[-1].raw if picture is None else picture
        ctx.layers, ctx.weights, ctx.dtype = layers, weights, dtype
        ctx.save_for_backward(x, *parameters, *(t for output in outputs for t in output))
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        layers, count = ctx.layers, 1 + 4 * len(ctx.layers)
        saved = ctx.saved_tensors  # read once: torch.utils.checkpoint recomputes it each time
        x, *parameters = saved[:count]
        needed = [ctx.needs_input_grad[0], *ctx.needs_input_grad[3:]]
        if torch.is_grad_enabled():  # to be differentiated again
            x, *parameters = siblings(saved[:count])
            leaves = [t for t, needs in zip((x, *parameters), needed) if needs]
            y = differentiable_chain(x.to(ctx.dtype), layers, parameters)
            grads = iter(torch.autograd.grad(y, leaves, grad, create_graph=True, materialize_grads=True))
            grad_x, *others = (next(grads) if needs else None for needs in needed)
            return grad_x, None, None, *others
        outputs = [Output(*output) for output in zip(saved[count::2], saved[count + 1 :: 2])]
        with backends.on_device(x), torch.autocast(x.device.type, enabled=False):
            zeros, ctx.zeros = ctx.zeros, None  # a further backward needs others
            if zeros is None:
                zeros = torch.zeros(_zeros_of_backward(layers, len(x)), device=x.device)
            grad_x, *others = _Backward(x, layers, parameters, ctx.weights, outputs, needed, zeros).run(grad)
        return grad_x, None, None, *others


def _images_of_norms(layers: Sequence[Layer], images: int) -> int:
    """How many images the norms tell apart: a batch norm takes all as one."""
    return 1 if all(layer.batch or layer.norm is None for layer in layers) else images


def _zeros_of_backward(layers: Sequence[Layer], images: int) -> int:
    """The zeros, float32, that a backward needs: see ``_Backward``."""
    channels = sum(layer.conv.out_channels for layer in layers)
    return len(layers) * kernels.chain_passes.COUNTERS + (1 + _images_of_norms(layers, images)) * 2 * channels


def _updates_statistics(layer: Layer) -> bool:
    return layer.batch and layer.norm.track_running_stats and layer.norm.training


class Output(NamedTuple):
    """What is kept of a layer's forward."""

    raw: Tensor  # before the norm
    coefficients: Tensor | None  # of its norm


class _Inputs:
    """What each layer of a chain loads, and last the chain's result: normalised when it is asked for."""

    def __init__(self, x: Tensor, layers: Sequence[Layer], outputs: Sequence[Output]) -> None:
        self.layers, self.outputs = layers, outputs
        self.norms: dict[int, Norm] = {}  # by layer: those whose coefficients are still to be computed
        self.kept = {0: x if layers[0].kind is STEM else channels_last(x)}  # this and those that a skip adds

    def __getitem__(self, i: int) -> Tensor:
        layer_input, normalises = self.begin(i)
        if normalises is not None:
            normalises.run()
        return layer_input

    def begin(self, i: int) -> tuple[Tensor, Pass | None]:
        """The input of layer i, and the pass that fills it if there is one, which is to be run."""
        if i in self.kept:
            return self.kept[i], None
        before, (raw, coefficients) = self.layers[i - 1], self.outputs[i - 1]
        skip = None
        if before.skip:
            if i - 2 not in self.kept:
                self._keep(i - 2)
            skip = cropped(self.kept[i - 2], raw)
        activation = Deferred(raw, coefficients, before.activation is not None)
        layer_input = torch.empty_like(raw)
        if i < len(self.layers) - 1 and self.layers[i + 1].skip:
            self.kept[i] = layer_input
        return layer_input, kernels.chain_passes.Pass(activation, skip, layer_input, self.norms.pop(i - 1, None))

    def _keep(self, i: int) -> None:
        """Computes the input of layer i, and with it, in one pass, those that it is a sum of."""
        inputs = [i]
        while self.layers[inputs[0] - 1].skip and inputs[0] - 2 not in self.kept:
            inputs.insert(0, inputs[0] - 2)
        start = self.kept[inputs[0] - 2] if self.layers[inputs[0] - 1].skip else None
        activations = [Deferred(*self.outputs[k - 1], relu=self.layers[k - 1].activation is not None) for k in inputs]
        maps = [activation.x for activation in activations] + ([] if start is None else [start])
        alike = all(x.shape == maps[0].shape and x.dtype == maps[0].dtype for x in maps)
        if len(inputs) == 1 or not alike or any(k - 1 in self.norms for k in inputs):
            self.kept[i] = self[i]
            return
        outs = [torch.empty_like(activation.x) for activation in activations]
        kernels.residual_inputs.residual_inputs(start, activations, outs)
        self.kept.update(zip(inputs, outs))

    def forget_before(self, i: int) -> None:
        """Drops those that no layer after layer ``i`` adds; the chain's own input is not computed here."""
        for known in [*self.kept]:
            if 0 < known < i - 1:
                del self.kept[known]


def _norm(layer: Layer, partials: Tensor | None, weight: Tensor, bias: Tensor, counters: Tensor) -> Norm:
    """A layer's norm, from its output's statistics by tiles; its coefficients are computed by the pass that needs them,
    which updates the running statistics."""
    norm, running, module = layer.norm, None, kernels.norm_coefficients
    if layer.batch and norm.track_running_stats:
        running = module.RunningStatistics(norm.running_mean, norm.running_var, norm.momentum, norm.num_batches_tracked)
    if layer.batch and partials is not None:
        partials = partials.flatten(0, 1)[None]
        if (group := group_of(norm)) is not None:
            statistics = partials.new_empty(1, 3, len(weight))
            module.norm_coefficients(partials, weight, bias, norm.eps, statistics=statistics)
            partials = gathered(statistics[0], group)[None]
    return kernels.chain_passes.Norm(counters, partials, weight, bias, norm.eps, running)


class _Backward:
    """The backward of a chain: the gradients of its input and parameters, where they are needed."""

    def __init__(
        self,
        x: Tensor,
        layers: Sequence[Layer],
        parameters: Sequence[Any],
        weights: Sequence[Weight],
        outputs: Sequence[Output],
        needed: Sequence[bool],
        zeros: Tensor,
    ) -> None:
        self.layers, self.needed, self.weights = layers, needed, weights
        self.leaves, self.norms = (x, *parameters), parameters[2::4]
        self.inputs = _Inputs(x, layers, outputs)
        self.activations = [
            Deferred(raw, coefficients, layer.activation is not None)
            for layer, (raw, coefficients) in zip(layers, outputs)
        ]
        self.grads: list[Tensor | None] = [None] * len(needed)  # of the input, then four for each layer
        kept = sum(output.raw.nbytes for output in outputs)
        self.split_sums = kernels.sum_parts.SplitSums(min(MOST_BYTES_IN_PARTS, kept // 2), x.device)
        # The counters, the gradients of all norms' biases and weights, for each image, and zeros for the convolutions'
        # biases.
        channels = [layer.conv.out_channels for layer in layers]
        counters = len(layers) * kernels.chain_passes.COUNTERS
        self.counters = zeros[:counters].view(torch.int32).view(len(layers), -1)
        buffer = zeros[counters:].view(-1, 2, sum(channels))
        self.zeros = buffer[0, 0].split(channels)
        self.sums_of_all = buffer[1:]
        self.sums = self.sums_of_all.split(channels, dim=2)

    def run(self, grad: Tensor) -> list[Tensor | None]:
        """The gradients, from that of the chain's result."""
        deepest = next(i for i, needs in enumerate(self.needed) if needs)  # gradients stop there
        grad_y, partials = self._through_last_activation(grad)
        skips: dict[int, Tensor] = {}  # the gradients that skips bring to a layer's input
        for i in reversed(range(len(self.layers))):
            layer, first = self.layers[i], 1 + 4 * i
            if layer.skip:
                skips[i - 1] = _uncropped(grad_y, self._input_shape(i - 1))
            layer_input, normalises = self.inputs.begin(i) if self.needed[first] else (None, None)
            raw_grad = self._through_norm(i, grad_y, partials, normalises)
            if layer_input is not None:
                destination = kernels.sum_parts.SumOf(self.split_sums, first)
                layer.kind.weight_gradient(layer, layer_input, raw_grad, destination)
            if deepest >= first:
                break
            target = GradientTarget(self._input_shape(i), self.activations[i - 1] if i else None, skips.pop(i, None))
            grad_y, partials = layer.kind.data_gradient(layer, raw_grad, self.weights[i], target)
            if i == 0:
                scale = SCALINGS[layer.from_picture][0]
                self.grads[0] = grad_y if scale == 1 else scale * grad_y.to(self.leaves[0].dtype)
        self._finish_sums()
        return [
            grad.to(leaf.dtype) if needs and grad is not None else None
            for grad, leaf, needs in zip(self.grads, self.leaves, self.needed)
        ]

    def _input_shape(self, i: int) -> torch.Size:
        return self.activations[i - 1].x.shape if i else self.leaves[0].shape

    def _through_last_activation(self, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        """The gradient after the last norm, and its sums by tiles; without a norm, that of the output."""
        activation, fold = self.activations[-1], kernels.fold_gradient
        if (output := self.layers[-1].to_picture) is not None:
            return gradient_of_raw(grad, activation.x, output), None
        grad = grad.to(activation.x.dtype)
        if self.layers[-1].norm is None:
            return grad, None
        out = torch.empty_like(activation.x)
        partials = partials_of(out, fold.fold_gradient_tiles(out), 2)
        fold.fold_gradient(grad, None, activation, out, (0, 0, 0, 0), False, partials)
        return out, partials

    def _through_norm(self, i: int, grad_y: Tensor, partials: Tensor | None, normalises: Pass | None) -> Tensor:
        """The gradient of layer i's raw output, from that after its norm; runs ``normalises`` too.

        Stores the gradients of the convolution's bias and of the norm's weight and bias.
        """
        layer, first = self.layers[i], 1 + 4 * i
        if layer.norm is None:
            if self.needed[first + 1]:
                self.grads[first + 1] = grad_y.sum((0, 2, 3), dtype=torch.float32)
            if normalises is not None:
                normalises.run()
            return grad_y
        activation, passes, scale = self.activations[i], kernels.chain_passes, self.norms[i].float()
        assert partials is not None and activation.coefficients is not None
        if layer.batch:
            partials = partials.flatten(0, 1)[None]
        sums = self.sums[i][: len(partials)]
        norm = passes.GradientNorm(self.counters[i], partials, scale, activation.coefficients, layer.frozen, sums)
        if not layer.frozen and (group := group_of(layer.norm)) is not None:
            kernels.norm_coefficients.gradient_coefficients(*norm[1:])  # for this process's sums
            total = gathered(sums[0], group)[None]
            ours = torch.empty_like(sums)  # what the other processes computed is not this one's gradient
            norm = norm._replace(partials=total, sums=ours)
        raw_grad = torch.empty_like(grad_y) if layer.skip else grad_y  # the skip's own gradient is used later
        coefficients, other = norm.empty_coefficients(), None if layer.frozen else activation.x
        gradient = passes.Pass(Deferred(grad_y, coefficients, other=other), None, raw_grad)
        passes.before_norm(norm, gradient, normalises)
        self.grads[first + 1] = coefficients[0, 0] * sums[0, 0] if layer.frozen else self.zeros[i]  # subtracted again
        return raw_grad

    def _finish_sums(self) -> None:
        """Stores the gradients of the convolutions' weights, and of the norms' weights and biases."""
        for position, grad in self.split_sums.add_up().items():
            self.grads[position] = grad.permute(0, 3, 1, 2)
        channels = [layer.conv.out_channels for layer in self.layers]
        sums = self.sums_of_all[0] if len(self.sums_of_all) == 1 else self.sums_of_all.sum(0)
        for i, (bias, weight) in enumerate(zip(*(row.split(channels) for row in sums))):
            if self.layers[i].norm is not None:
                self.grads[3 + 4 * i : 5 + 4 * i] = weight, bias


def _uncropped(grad: Tensor, shape: torch.Size) -> Tensor:
    """The gradient of a map of ``shape`` that :func:`cropped` cut ``grad``'s part from."""
    left, top = (shape[3] - grad.shape[3]) // 2, (shape[2] - grad.shape[2]) // 2
    if not left and not top:
        return grad
    right, bottom = shape[3] - grad.shape[3] - left, shape[2] - grad.shape[2] - top
    return channels_last(F.pad(grad, (left, right, top, bottom)))
