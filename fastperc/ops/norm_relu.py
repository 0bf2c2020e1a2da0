"""Batch or instance norm in training, with the ReLU or the skip after it: in NHWC two passes forward, two backward.

Only the norm's input is saved; the backward computes the norm's output again.

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
    channels_adjacent,
    channels_last,
    siblings,
    why_not_cpp,
    why_not_here,
)

BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
NORMS = (*BATCH_NORMS, nn.InstanceNorm2d)
FEWEST_VALUES = 16  # of a channel
FEWEST_ELEMENTS = 2_000_000  # with fewer, PyTorch's own batch norm takes less time than the calls around these passes


def norm_relu(x: Tensor, norm: nn.Module, relu: bool = True, skip: Tensor | None = None) -> Tensor:
    """``norm(x)`` + ``skip``, then a ReLU if ``relu``; updates the running statistics of ``norm`` as it does itself.

    Args:
        x: [N, C, H, W].
        norm: ``nn.BatchNorm2d``, ``nn.SyncBatchNorm``, ``nn.InstanceNorm2d`` or any other module.
        relu: whether a ReLU comes last.
        skip: [N, C, H, W], added before it.
    """
    return NORM_RELU(x, norm, relu, skip)


def group_of(norm: nn.Module) -> dist.ProcessGroup | None:
    """The group of processes over whose values ``norm`` takes its statistics, or ``None`` for this process alone."""
    if type(norm) is not nn.SyncBatchNorm or not (norm.training or norm.running_mean is None):
        return None
    if not dist.is_available() or not dist.is_initialized():
        return None
    group = norm.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def _plain(x: Tensor, norm: nn.Module, relu: bool, skip: Tensor | None) -> Tensor:
    y = _plain_norm(x, norm)
    y = y if skip is None else y + skip
    return y.relu() if relu else y


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


def _why_not_native(x: Tensor, norm: nn.Module, relu: bool, skip: Tensor | None) -> str | None:
    if reason := why_not_here():
        return reason
    if type(norm) not in NORMS or norm.weight is None:
        return "the norm is no plain one with scale and shift"
    if has_hooks(norm):
        return "the norm has hooks"
    batch = type(norm) in BATCH_NORMS
    if norm.track_running_stats and not (batch and norm.training):
        return "running statistics are applied by plain PyTorch"
    if relu and skip is not None:
        return "no gradient of a ReLU after a skip"
    if skip is not None and (skip.shape, skip.dtype) != (x.shape, x.dtype):
        return "the skip is of another shape or dtype"
    if x.dim() != 4 or x.numel() // x.shape[1] // (1 if batch else len(x) or 1) < FEWEST_VALUES:
        return f"with fewer than {FEWEST_VALUES} values a channel, gradients cancel: plain PyTorch may use float64"
    if not x.is_contiguous(memory_format=torch.channels_last):
        return "the activations are not in NHWC"
    return why_not_cpp(x)


def _why_slow_native(x: Tensor, norm: nn.Module, relu: bool, skip: Tensor | None) -> str | None:
    few = isinstance(norm, BATCH_NORMS) and group_of(norm) is None and x.numel() < FEWEST_ELEMENTS
    return f"a batch norm of fewer than {FEWEST_ELEMENTS:,} elements" if few else None


def _native_norm_relu(x: Tensor, norm: nn.Module, relu: bool, skip: Tensor | None) -> Tensor:
    batch, group = type(norm) in BATCH_NORMS, group_of(norm)
    y, statistics, count = _NormReLU.apply(x, norm.weight, norm.bias, skip, norm.eps, relu, batch, group)
    if isinstance(norm, BATCH_NORMS) and norm.track_running_stats:
        update_running_statistics(norm, statistics, count)
    return y


def update_running_statistics(norm: _BatchNorm, statistics: Tensor, count: int | Tensor) -> None:
    """Updates a batch norm's running statistics by the mean and Σ (x - mean)² [1, 2, C] of ``count`` values.

    ``count`` is an integer, or [C]; where it is 0 they stay as they are.
    """
    assert norm.running_mean is not None and norm.running_var is not None and norm.num_batches_tracked is not None
    mean, m2 = statistics[0]
    with torch.no_grad():
        norm.num_batches_tracked.add_(1)
        share: Any = 1 / norm.num_batches_tracked.item() if norm.momentum is None else norm.momentum
        if isinstance(count, Tensor):
            share = share * (count > 0).to(norm.running_mean)
            count = count.clamp(min=2)
        norm.running_mean.lerp_(mean.to(norm.running_mean), share)
        norm.running_var.lerp_((m2 / (count - 1)).to(norm.running_var), share)


class _Norm(NamedTuple):
    """A norm by its statistics: out = x · scale + shift."""

    mean: Tensor  # float32 [N, C], N being 1 for a batch norm, as all of these
    scale: Tensor
    shift: Tensor
    inverse: Tensor  # float64: one over the standard deviation


def _norm_of(statistics: Tensor, count: Tensor, weight: Tensor, bias: Tensor, eps: float) -> _Norm:
    mean, m2 = statistics.unbind(1)
    inverse = (m2 / count + eps).rsqrt()
    scale = weight * inverse
    return _Norm(mean.float(), scale.float(), (bias - mean * scale).float(), inverse)


def _images(x: Tensor, batch: bool) -> Tensor:
    """``x``, or all its images as one above the other: a view."""
    return x.permute(0, 2, 3, 1).flatten(0, 1)[None].permute(0, 3, 1, 2) if batch else x


class _NormReLU(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        skip: Tensor | None,
        eps: float,
        relu: bool,
        batch: bool,
        group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The output, mean and Σ (x - mean)² of each channel, float64 [1 or N, 2, C], and of how many values, [C]."""
        out, images = torch.empty_like(x), _images(x, batch)
        statistics = _native.channel_mean_m2(images)
        count = statistics.new_full((x.shape[1],), images[0, 0].numel())
        if group is not None:
            combined = combine_over_processes(torch.cat([count[None], statistics[0]]), group)
            count, statistics = combined[0], combined[None, 1:]
        norm = _norm_of(statistics, count, weight, bias, eps)
        skip_images = None if skip is None else _images(channels_last(skip), batch)
        _native.scale_shift(images, norm.scale, norm.shift, channels_adjacent(skip_images), relu, _images(out, batch))
        return out, statistics, count

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, weight, bias, skip, ctx.eps, ctx.relu, ctx.batch, ctx.group = inputs
        ctx.skipped = skip is not None
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(x, weight, bias, *output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, statistics, count = ctx.saved_tensors
        grad_skip = grad if ctx.skipped else None
        if torch.is_grad_enabled():  # to be differentiated again
            x, weight, bias = siblings((x, weight, bias))
            if ctx.group is None:
                y = reference.norm_relu(x, weight, bias, ctx.eps, ctx.relu, ctx.batch)
            else:
                y = reference.sync_norm_relu(x, weight, bias, ctx.eps, ctx.relu, ctx.group)[0]
            return *_differentiable_gradients(ctx, y, grad, x, weight, bias), grad_skip, None, None, None, None

        out, images, grads = torch.empty_like(x), _images(x, ctx.batch), _images(channels_last(grad), ctx.batch)
        norm = _norm_of(statistics, count, weight, bias, ctx.eps)
        sums = _native.norm_gradient_sums(images, grads, norm[:3], ctx.relu)
        total, product = sums[:, 0], sums[:, 1]
        residue = statistics[:, 0] - norm.mean  # the part of the mean that float32 cannot hold
        product = product - residue * total
        scale, inverse = weight * norm.inverse, norm.inverse
        grad_weight, grad_bias = (product * inverse).sum(0).to(weight), total.sum(0).to(bias)
        if ctx.group is not None:  # the gradients of weight and bias stay this process's own
            total, product = _over_processes(total[0], product[0], ctx.group).unbind()
        centred_factor = -scale * inverse.square() * product / count
        factors = torch.stack([scale, centred_factor, -scale * total / count - centred_factor * residue], dim=1)
        _native.norm_gradient(images, grads, norm[:3], factors.float(), ctx.relu, _images(out, ctx.batch))
        return out, grad_weight, grad_bias, grad_skip, None, None, None, None


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
            lambda x: (x, nn.BatchNorm2d(x.shape[1]).to(x.device), True, None),
        ),
        (*COMMON_CPP_SOURCES, "csrc/norm_relu*", "fastperc/ops/norm_relu.py", "fastperc/collective.py"),
        lambda x, norm, relu, skip: (x,) if type(norm) is nn.BatchNorm2d else (),  # others are faster natively
    )
)
