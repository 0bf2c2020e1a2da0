"""Batch or instance norm and the ReLU or the skip after it, in training: in NHWC two passes forward, two backward.

The backward computes the norm's output once more rather than keep it: only the norm's input is saved.

A ``nn.SyncBatchNorm``, in training, has the statistics of all processes of its group: each measures its own values,
one exchange each way combines them. PyTorch's own serves GPUs alone; here it works on a CPU too.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastperc import _native, backends, reference
from fastperc.collective import combine_over_processes, gathered
from fastperc.ops.frozen import channels_last, native_unsupported, side_by_side, transformed

BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
NORMS = (*BATCH_NORMS, nn.InstanceNorm2d)
FEWEST_VALUES = 16  # a channel
SMALL = 2_000_000  # elements, below which PyTorch's own batch norm takes less than the calls around these passes


def norm_relu(x: Tensor, norm: nn.Module, relu: bool = True, skip: Tensor | None = None) -> Tensor:
    """relu?(``norm(x)`` + ``skip``); the running statistics of ``norm`` are updated as it does itself.

    Args:
        x: [N, C, H, W].
        norm: ``nn.BatchNorm2d``, ``nn.SyncBatchNorm``, ``nn.InstanceNorm2d`` or any other module.
        relu: whether a ReLU comes last.
        skip: [N, C, H, W], added before it.
    """
    group = group_of(norm)
    obstacles = {"native": unsupported(x, norm, relu, skip)}
    if isinstance(norm, BATCH_NORMS) and group is None and x.numel() < SMALL:
        obstacles = {"reference": None, **obstacles}
    if backends.choose("norm_relu", x, **obstacles) == "reference":
        y = _by_pytorch(x, norm, group)
        y = y if skip is None else y + skip
        return y.relu() if relu else y
    y, statistics, count = _NormReLU.apply(
        x, norm.weight, norm.bias, skip, norm.eps, relu, type(norm) in BATCH_NORMS, group
    )
    if isinstance(norm, BATCH_NORMS) and norm.track_running_stats:
        update_running_statistics(norm, statistics, count)
    return y


def group_of(norm: nn.Module) -> dist.ProcessGroup | None:
    """The processes whose values ``norm`` takes its statistics of, where those are more than this one."""
    if type(norm) is not nn.SyncBatchNorm or not (norm.training or norm.running_mean is None):
        return None
    if not dist.is_available() or not dist.is_initialized():
        return None
    group = norm.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def _by_pytorch(x: Tensor, norm: nn.Module, group: dist.ProcessGroup | None) -> Tensor:
    """``norm(x)``."""
    if (
        type(norm) is nn.InstanceNorm2d
        and len(x) == 1
        and not (norm.track_running_stats or has_hooks(norm) or transformed())
    ):
        # Of one image that is a batch norm. PyTorch 2.13's instance norm has a wrong gradient on a CPU where that of
        # its output lies in NHWC.
        return F.batch_norm(x, None, None, norm.weight, norm.bias, True, 0.0, norm.eps)
    if type(norm) is not nn.SyncBatchNorm or x.device.type != "cpu" or has_hooks(norm):
        return norm(x)
    if group is None:
        return _BatchNorm.forward(norm, x)
    norm._check_input_dim(x)
    y, statistics = _SyncNorm.apply(x, norm.weight, norm.bias, norm.eps, group)
    if norm.track_running_stats:
        update_running_statistics(norm, statistics[None, 1:], statistics[0])
    return y


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody looks at what goes in or out of ``module``."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks)


def unsupported(x: Tensor, norm: nn.Module, relu: bool = True, skip: Tensor | None = None) -> str | None:
    """Why only plain PyTorch can take the call, or ``None``."""
    if obstacle := transformed():
        return obstacle
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
        return "of so few values the gradients cancel, and plain PyTorch may compute them in float64"
    if not x.is_contiguous(memory_format=torch.channels_last):
        return "the activations do not lie in NHWC"
    return native_unsupported(x)


def update_running_statistics(norm: _BatchNorm, statistics: Tensor, count: int | Tensor) -> None:
    """What a batch norm does in training, by the mean and Σ (x - mean)² [1, 2, C] of ``count`` values, an integer or
    [C]; of none it keeps what it has."""
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
    """A norm, measured: out = x · scale + shift."""

    mean: Tensor  # float32 [N, C], N being 1 for a batch norm, as all of these
    scale: Tensor
    shift: Tensor
    inverse: Tensor  # float64: one over the standard deviation


def _measured(statistics: Tensor, count: Tensor, weight: Tensor, bias: Tensor, eps: float) -> _Norm:
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
        statistics = _native.channel_statistics(images)
        count = statistics.new_full((x.shape[1],), images[0, 0].numel())
        if group is not None:
            combined = combine_over_processes(torch.cat([count[None], statistics[0]]), group)
            count, statistics = combined[0], combined[None, 1:]
        norm = _measured(statistics, count, weight, bias, eps)
        beside = None if skip is None else _images(channels_last(skip), batch)
        _native.scale_shift(images, norm.scale, norm.shift, side_by_side(beside), relu, _images(out, batch))
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
        of_skip = grad if ctx.skipped else None
        if torch.is_grad_enabled():  # the gradient of this gradient may be asked for
            if ctx.group is None:
                y = reference.norm_relu(x, weight, bias, ctx.eps, ctx.relu, ctx.batch)
            else:
                y = reference.sync_norm_relu(x, weight, bias, ctx.eps, ctx.relu, ctx.group)[0]
            return *_differentiable_gradients(ctx, y, grad, x, weight, bias), of_skip, None, None, None, None

        out, images, grads = torch.empty_like(x), _images(x, ctx.batch), _images(channels_last(grad), ctx.batch)
        norm = _measured(statistics, count, weight, bias, ctx.eps)
        sums = _native.norm_gradient_sums(images, grads, norm[:3], ctx.relu)
        total, product = sums[:, 0], sums[:, 1]
        beside = statistics[:, 0] - norm.mean  # of the mean, what float32 has no room for
        product = product - beside * total
        scale, inverse = weight * norm.inverse, norm.inverse
        of_weight, of_bias = (product * inverse).sum(0).to(weight), total.sum(0).to(bias)
        if ctx.group is not None:  # the gradients of weight and bias stay this process's own
            total, product = _over_processes(total[0], product[0], ctx.group).unbind()
        of_x = -scale * inverse.square() * product / count
        factors = torch.stack([scale, of_x, -scale * total / count - of_x * beside], dim=1)
        _native.norm_gradient(images, grads, norm[:3], factors.float(), ctx.relu, _images(out, ctx.batch))
        return out, of_weight, of_bias, of_skip, None, None, None, None


class _SyncNorm(torch.autograd.Function):
    """:func:`reference.sync_norm_relu` without the ReLU. Its backward exchanges what that of :class:`_NormReLU` does,
    which may be what other processes run."""

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
        if torch.is_grad_enabled():  # the gradient of this gradient may be asked for
            y = reference.sync_norm_relu(x, weight, bias, ctx.eps, False, ctx.group)[0]
            return *_differentiable_gradients(ctx, y, grad, x, weight, bias), None, None
        grads, wide = reference.widen(grad), reference.widen(x)
        count, mean, inverse = reference.count_mean_inverse(statistics, ctx.eps, wide.dtype)
        centred = wide - mean
        total, product = grads.sum((0, 2, 3)), (grads * centred).sum((0, 2, 3))
        of_weight = None if weight is None else (product * inverse[:, 0, 0]).to(weight)
        of_bias = None if bias is None else total.to(bias)
        total, product = _over_processes(total, product, ctx.group).to(centred)[:, :, None, None].unbind()
        of_x = inverse * (grads - total / count - centred * inverse.square() * product / count)
        of_x = of_x if weight is None else of_x * weight[:, None, None]
        return of_x.to(x.dtype), of_weight, of_bias, None, None


def _over_processes(total: Tensor, product: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sums of a backward, [C] each, over all processes of ``group``: float64 [2, C]."""
    return gathered(torch.stack([total, product]).double(), group).sum(0)


def _differentiable_gradients(ctx: Any, y: Tensor, grad: Tensor, *inputs: Tensor | None) -> list[Tensor | None]:
    """The gradients of ``y`` to ``inputs``, where they are wanted, as functions of them."""
    needed = [one for one, wanted in zip(inputs, ctx.needs_input_grad) if wanted and one is not None]
    found = iter(torch.autograd.grad(y, needed, grad, create_graph=True))
    return [next(found) if wanted and one is not None else None for one, wanted in zip(inputs, ctx.needs_input_grad)]
