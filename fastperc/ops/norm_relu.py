"""Batch or instance norm in training, with the skip and the activation after it: two passes forward, two backward; in
NHWC or, on a GPU, in NCHW too.

Only the norm's input is saved, and the backward computes the norm's output again. An activation after a skip saves its
output too, which the next layer saves anyway.

A ``nn.SyncBatchNorm`` in training uses the statistics of all processes of its group. Each process measures its own
values, and one exchange in each direction combines them. PyTorch's own serves GPUs only; here it works on a CPU too.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastperc import _native, reference
from fastperc.backends import Implementation, Operation, TuningCases, register
from fastperc.collective import combine_over_processes, gathered
from fastperc.ops.common import (
    COMMON_CPP_SOURCES,
    COMMON_CUDA_SOURCES,
    channels_adjacent,
    channels_last,
    laid_out_as,
    siblings,
    why_not_compiled,
    why_not_here,
)
from fastperc.types import RELU, Activation

BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
NORMS = (*BATCH_NORMS, nn.InstanceNorm2d)
FEWEST_VALUES = 16  # of a channel
FEWEST_ELEMENTS = 2_000_000  # with fewer, PyTorch's own single pass takes less time than the calls around these
FEWEST_FUSED_ELEMENTS = 250_000  # the same where a batch norm has a skip or an activation after it


def norm_relu(x: Tensor, norm: Any, activation: Activation | None = RELU, skip: Tensor | None = None) -> Tensor:
    """``activation(norm(x) + skip)``; updates the running statistics of ``norm`` as it does itself.

    Args:
        x: [N, C, H, W].
        norm: ``nn.BatchNorm2d``, ``nn.SyncBatchNorm``, ``nn.InstanceNorm2d``, any other module, or ``None``.
        activation: what comes last; the slopes of a PReLU get their gradient.
        skip: [N, C, H, W], added before it.
    """
    fused = activation if activation is None or _in_the_passes(activation, skip) else None
    if norm is None and (skip is None or fused is None):
        return reference.activate(x if skip is None else x + skip, activation)
    y = NORM_RELU(x, norm, fused, skip)
    return y if fused is activation else reference.activate(y, activation)


def _in_the_passes(activation: Activation, skip: Tensor | None) -> bool:
    """Whether the passes compute ``activation``. After a skip, the sign of its output must be that of its input."""
    if activation.name not in _native.PASS_ACTIVATIONS:
        return False
    if skip is None:
        return True
    return activation.name != "prelu" and (activation.slope is None or activation.slope > 0)


def group_of(norm: nn.Module) -> dist.ProcessGroup | None:
    """The group of processes over whose values ``norm`` takes its statistics, or ``None`` for this process alone."""
    if type(norm) is not nn.SyncBatchNorm or not (norm.training or norm.running_mean is None):
        return None
    if not dist.is_available() or not dist.is_initialized():
        return None
    group = norm.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def _plain(x: Tensor, norm: Any, activation: Activation | None, skip: Tensor | None) -> Tensor:
    y = x if norm is None else _plain_norm(x, norm)
    if type(norm) is not nn.BatchNorm2d or has_hooks(norm):
        return reference.activate(y if skip is None else y + skip, activation)
    if skip is not None:  # in place: nothing else reads y, and its own gradient does not need it
        y = y.add_(skip) if (skip.shape, skip.dtype) == (y.shape, y.dtype) else y + skip
    return y.relu_() if activation is not None and activation.name == "relu" else reference.activate(y, activation)


def _plain_norm(x: Tensor, norm: nn.Module) -> Tensor:
    """``norm(x)`` by PyTorch, but for two cases that it computes wrongly or not at all."""
    if (
        type(norm) is nn.InstanceNorm2d
        and len(x) == 1
        and not (norm.track_running_stats or has_hooks(norm) or why_not_here())
    ):
        # Of one image this is a batch norm. PyTorch 2.13's instance norm has a wrong gradient on a CPU where the
        # gradient of its output is in NHWC.
        return F.batch_norm(x, None, None, norm.weight, norm.bias, True, 0.0, norm.eps)
    if type(norm) is not nn.SyncBatchNorm or x.device.type != "cpu" or has_hooks(norm):
        return norm(x)
    if (group := group_of(norm)) is None:
        return _BatchNorm.forward(norm, x)
    norm._check_input_dim(x)
    y, statistics = _SyncNorm.apply(x, norm.weight, norm.bias, norm.eps, group)
    if norm.track_running_stats:
        update_running_statistics(norm, statistics[None, 1:], statistics[0])
    return y


def has_hooks(module: nn.Module) -> bool:
    """Whether ``module`` has forward or backward hooks."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks)


def _why_not_native(x: Tensor, norm: Any, activation: Activation | None, skip: Tensor | None) -> str | None:
    if reason := why_not_here() or _why_not_norm(norm):
        return reason
    if activation is not None and not _in_the_passes(activation, skip):
        return f"{activation.name} is computed by plain PyTorch"
    if skip is not None and (skip.shape, skip.dtype) != (x.shape, x.dtype):
        return "the skip is of another shape or dtype"
    if x.dim() != 4 or x.numel() // x.shape[1] // (1 if type(norm) in BATCH_NORMS else len(x) or 1) < FEWEST_VALUES:
        return f"with fewer than {FEWEST_VALUES} values a channel, gradients cancel: plain PyTorch may use float64"
    if not x.is_contiguous(memory_format=torch.channels_last) and not (_native.on_gpu(x) and x.is_contiguous()):
        return "the activations are neither in NHWC nor in NCHW" if _native.on_gpu(x) else "they are not in NHWC"
    return why_not_compiled(x)


def _why_not_norm(norm: Any) -> str | None:
    if norm is None:
        return None
    if type(norm) not in NORMS or (norm.weight is None) != (norm.bias is None):
        return "the norm is no plain one"
    if has_hooks(norm):
        return "the norm has hooks"
    if norm.track_running_stats and not (type(norm) in BATCH_NORMS and norm.training):
        return "running statistics are applied by plain PyTorch"
    return None


def _why_slow_native(x: Tensor, norm: Any, activation: Activation | None, skip: Tensor | None) -> str | None:
    is_bare = activation is None and skip is None
    if is_bare and _native.on_gpu(x) and type(norm) is nn.BatchNorm2d:
        return "cuDNN's batch norm takes as few passes"
    fewest = FEWEST_ELEMENTS if is_bare or norm is None else FEWEST_FUSED_ELEMENTS
    if x.numel() >= fewest or type(norm) is nn.InstanceNorm2d or group_of(norm) is not None:
        return None
    return f"a {'skip' if norm is None else 'batch norm'} of fewer than {fewest:,} elements"


def _native_norm_relu(x: Tensor, norm: Any, activation: Activation | None, skip: Tensor | None) -> Tensor:
    if norm is None:
        return _SkipActivation.apply(x, skip, activation)
    options = _Options(norm.eps, activation, norm if type(norm) in BATCH_NORMS else None, group_of(norm))
    slopes = None if activation is None else activation.slopes
    return _NormReLU.apply(x, norm.weight, norm.bias, slopes, skip, options)


def update_running_statistics(norm: _BatchNorm, statistics: Tensor, count: Tensor) -> None:
    """Updates a batch norm's running statistics by the mean and Σ (x - mean)² of ``count`` values a channel.

    ``statistics`` is [1, 2, C], and ``count`` [1] or [C]. Where ``count`` is 0 they stay as they are.
    """
    mean, variance, batches = norm.running_mean, norm.running_var, norm.num_batches_tracked
    assert mean is not None and variance is not None and batches is not None
    with torch.no_grad():
        batches.add_(1)
        share: Any = 1 / batches.item() if norm.momentum is None else norm.momentum
        if mean.dtype == variance.dtype == torch.float32 and mean.is_contiguous() and variance.is_contiguous():
            _native.update_running_statistics(statistics.double(), count.double(), share, mean, variance)
            return
        shares = share * (count > 0).to(mean).expand_as(mean)
        mean.lerp_(statistics[0, 0].to(mean), shares)
        variance.lerp_((statistics[0, 1] / (count - 1).clamp(min=1)).to(variance), shares)


class _Options(NamedTuple):
    """What decides how the passes compute, beside tensors."""

    eps: float
    activation: Activation | None
    batch_norm: _BatchNorm | None  # the norm, if it is a batch norm
    group: dist.ProcessGroup | None  # over whose values it takes its statistics

    def with_slopes(self, slopes: Tensor | None) -> Activation | None:
        """The activation with these ``slopes``, which it has as an input that gets a gradient."""
        return self.activation and self.activation._replace(slopes=slopes)


def _parameters(weight: Tensor | None, bias: Tensor | None, eps: float) -> _native.NormParameters:
    def plain(one: Tensor | None) -> Tensor | None:
        return None if one is None else one.detach().float().contiguous()

    return _native.NormParameters(plain(weight), plain(bias), eps)


class _NormReLU(torch.autograd.Function):
    # Without setup_context, for which PyTorch inspects signatures in each call: that takes longer than a small map.
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        slopes: Tensor | None,
        skip: Tensor | None,
        options: _Options,
    ) -> Tensor:
        norm, out = options.batch_norm, torch.empty_like(x)
        batch = norm is not None
        statistics = _native.channel_mean_m2(x, batch)
        count = statistics.new_full((1,), x.numel() // (statistics.shape[0] * x.shape[1]))
        if options.group is not None:
            combined = combine_over_processes(torch.cat([count.expand(1, x.shape[1]), statistics[0]]), options.group)
            count, statistics = combined[0], combined[None, 1:]
        state = _native.norm_state(statistics, count, _parameters(weight, bias, options.eps), batch)
        skipped = skip if _native.on_gpu(x) else channels_adjacent(skip)
        if skipped is not None and batch and not (_native.on_gpu(x) or _native.images_follow(skipped)):
            skipped = channels_last(skipped)
        mean, scale, shift = state.factors.unbind()
        _native.scale_shift(x, scale, shift, skipped, options.with_slopes(slopes), out, batch, mean)
        if norm is not None and norm.track_running_stats:
            update_running_statistics(norm, statistics, count)
        ctx.options, ctx.skipped = options, skip is not None
        y = out if ctx.skipped and options.activation else None
        ctx.save_for_backward(x, weight, bias, slopes, y, *state[:3])
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, slopes, y, *state_tensors = ctx.saved_tensors
        options: _Options = ctx.options
        if torch.is_grad_enabled():  # to be differentiated again
            return *_norm_relu_again(ctx, grad, x, weight, bias, slopes, y), None
        statistics, counts, factors = state_tensors
        state = _native.NormState(statistics, counts, factors, options.batch_norm is not None)
        activation = options.with_slopes(slopes)
        parameters, out = _parameters(weight, bias, options.eps), torch.empty_like(x)
        masked = grad = laid_out_as(grad, x)
        if y is None:
            sums = _native.norm_gradient_sums(x, grad, state, activation)
        else:
            masked = torch.empty_like(x)
            sums = _native.norm_gradient_sums(x, grad, state, activation, y, masked)
            activation = None  # done
        of_weight = of_bias = of_slopes = None
        if weight is not None or slopes is not None:
            of_weight, of_bias, *rest = _native.norm_parameter_gradients(state, sums, options.eps)
            of_weight = None if weight is None else of_weight.to(weight.dtype)
            of_bias = None if bias is None else of_bias.to(bias.dtype)
            of_slopes = None if slopes is None else rest[0].sum_to_size(slopes.shape).to(slopes.dtype)
        if options.group is not None:  # the gradients of weight and bias stay this process's own
            sums = _over_processes(sums[0, 0], sums[0, 1], options.group)[None]
        _native.norm_gradient(x, masked, state, parameters, sums, activation, out)
        return out, of_weight, of_bias, of_slopes, masked if ctx.skipped else None, None


def _norm_relu_again(ctx: Any, grad: Tensor, *saved: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients of :class:`_NormReLU` as differentiable functions of ``grad`` and of what it ``saved``."""
    *inputs, y = saved
    x, weight, bias, slopes = siblings(inputs)
    activation, eps, group = ctx.options.with_slopes(slopes), ctx.options.eps, ctx.options.group
    if y is not None:
        grad, activation = _through(activation, grad, y), None
    scale, shift = (x.new_ones(x.shape[1]), x.new_zeros(x.shape[1])) if weight is None else (weight, bias)
    if group is None:
        z = reference.norm_relu(x, scale, shift, eps, False, ctx.options.batch_norm is not None)
    else:
        z = reference.sync_norm_relu(x, scale, shift, eps, False, group)[0]
    gradients = _differentiable_gradients(ctx, reference.activate(z, activation), grad, x, weight, bias, slopes)
    return *gradients, grad if ctx.skipped else None


def _through(activation: Activation, grad: Tensor, y: Tensor) -> Tensor:
    """The gradient before an activation of the passes, from ``grad`` after it and its output ``y``."""
    if activation.name == "relu6":
        return torch.where((y <= 0) | (y >= 6), 0, grad)
    if activation.name == "relu":
        return torch.where(y <= 0, 0, grad)
    slope = 0.01 if activation.slope is None else activation.slope
    return torch.where(y > 0, grad, grad * slope)


class _SkipActivation(torch.autograd.Function):
    """activation(x + skip), for an activation whose output has the sign of its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, skip: Tensor, activation: Activation) -> Tensor:
        out, scale, shift, skipped = torch.empty_like(x), None, None, skip
        if not _native.on_gpu(x):
            scale = x.new_ones(1, x.shape[1], dtype=torch.float32)
            shift, skipped = torch.zeros_like(scale), channels_last(skip)
        _native.scale_shift(x, scale, shift, skipped, activation, out, True)
        ctx.activation = activation
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (y,) = ctx.saved_tensors
        if ctx.activation.name == "relu" and not torch.is_grad_enabled():
            grad = torch.ops.aten.threshold_backward(grad, y, 0)
        else:
            grad = _through(ctx.activation, grad, y)
        return grad, grad, None


class _SyncNorm(torch.autograd.Function):
    """:func:`reference.sync_norm_relu` without the ReLU. Its backward exchanges the same sums as that of
    :class:`_NormReLU`, which other processes of the group may run."""

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, group: dist.ProcessGroup
    ) -> tuple[Tensor, Tensor]:
        return reference.sync_norm_relu(x, weight, bias, eps, False, group)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, bias, ctx.eps, ctx.group = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, weight, bias, output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, statistics = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again
            x, weight, bias = siblings((x, weight, bias))
            y = reference.sync_norm_relu(x, weight, bias, ctx.eps, False, ctx.group)[0]
            return *_differentiable_gradients(ctx, y, grad, x, weight, bias), None, None
        grads, wide = reference.widen(grad), reference.widen(x)
        count, mean, inverse = reference.count_mean_inverse(statistics, ctx.eps, wide.dtype)
        centred = wide - mean
        total, product = grads.sum((0, 2, 3)), (grads * centred).sum((0, 2, 3))
        grad_weight = None if weight is None else (product * inverse[:, 0, 0]).to(weight)
        grad_bias = None if bias is None else total.to(bias)
        total, product = _over_processes(total, product, ctx.group).to(centred)[:, :, None, None].unbind()
        grad_x = inverse * (grads - total / count - centred * inverse.square() * product / count)
        grad_x = grad_x if weight is None else grad_x * weight[:, None, None]
        return grad_x.to(x.dtype), grad_weight, grad_bias, None, None


def _over_processes(total: Tensor, product: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sums of a backward, [C] each, over all processes of ``group``: float64 [2, C]."""
    return gathered(torch.stack([total, product]).double(), group).sum(0)


def _differentiable_gradients(ctx: Any, y: Tensor, grad: Tensor, *inputs: Tensor | None) -> list[Tensor | None]:
    """The gradients of ``y`` to those ``inputs`` that need one, as functions of them."""
    needed = [x is not None and needs for x, needs in zip(inputs, ctx.needs_input_grad)]
    leaves = [x for x, needs in zip(inputs, needed) if x is not None and needs]
    grads = iter(torch.autograd.grad(y, leaves, grad, create_graph=True))
    return [next(grads) if needs else None for needs in needed]


NORM_RELU = register(
    Operation(
        "norm_relu",
        "Norm, ReLU",
        (
            Implementation("native", _native_norm_relu, _why_not_native, _why_slow_native),
            Implementation("reference", _plain),
        ),
        TuningCases(
            lambda batch, size: [((batch, c, size // s, size // s),) for c, s in ((32, 1), (64, 2), (128, 4))],
            lambda x: (x, nn.BatchNorm2d(x.shape[1]).to(x.device), RELU, None),
        ),
        (
            *COMMON_CPP_SOURCES,
            *COMMON_CUDA_SOURCES,
            "csrc/norm_*",
            "fastperc/ops/norm_relu.py",
            "fastperc/collective.py",
        ),
        lambda x, norm, activation, skip: (x,) if type(norm) is nn.BatchNorm2d else (),  # others are faster natively
    )
)
