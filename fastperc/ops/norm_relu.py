"""Batch or instance norm and the ReLU or the skip after it, in training: in NHWC two passes forward, two backward.

The backward computes the norm's output once more rather than keep it: only the norm's input is saved.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastperc import _native, backends, reference
from fastperc.ops.frozen import channels_last, native_unsupported, side_by_side, transformed

NORMS = (nn.BatchNorm2d, nn.InstanceNorm2d)
FEWEST_VALUES = 16  # a channel
SMALL = 2_000_000  # elements, below which PyTorch's own batch norm takes less than the calls around these passes


def norm_relu(x: Tensor, norm: nn.Module, relu: bool = True, skip: Tensor | None = None) -> Tensor:
    """relu?(``norm(x)`` + ``skip``); the running statistics of ``norm`` are updated as it does itself.

    Args:
        x: [N, C, H, W].
        norm: ``nn.BatchNorm2d``, ``nn.InstanceNorm2d`` or any other module.
        relu: whether a ReLU comes last.
        skip: [N, C, H, W], added before it.
    """
    batch = isinstance(norm, nn.BatchNorm2d)
    obstacles = {"native": unsupported(x, norm, relu, skip)}
    if batch and x.numel() < SMALL:
        obstacles = {"reference": None, **obstacles}
    if backends.choose("norm_relu", x, **obstacles) == "reference":
        y = norm(x)
        y = y if skip is None else y + skip
        return y.relu() if relu else y
    y, statistics = _NormReLU.apply(x, norm.weight, norm.bias, skip, norm.eps, relu, batch)
    if isinstance(norm, nn.BatchNorm2d) and norm.track_running_stats:
        update_running_statistics(norm, statistics, x.numel() // x.shape[1])
    return y


def unsupported(x: Tensor, norm: nn.Module, relu: bool = True, skip: Tensor | None = None) -> str | None:
    """Why only plain PyTorch can take the call, or ``None``."""
    if obstacle := transformed():
        return obstacle
    if type(norm) not in NORMS or norm.weight is None:
        return "the norm is no plain one with scale and shift"
    if norm._forward_hooks or norm._forward_pre_hooks or norm._backward_hooks or norm._backward_pre_hooks:
        return "the norm has hooks"
    batch = type(norm) is nn.BatchNorm2d
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


def update_running_statistics(norm: nn.BatchNorm2d, statistics: Tensor, count: int) -> None:
    """What ``nn.BatchNorm2d`` does in training, by the mean and Σ (x - mean)² of ``count`` values, [1, 2, C]."""
    assert norm.running_mean is not None and norm.running_var is not None and norm.num_batches_tracked is not None
    mean, m2 = statistics[0]
    with torch.no_grad():
        norm.num_batches_tracked.add_(1)
        share = 1 / norm.num_batches_tracked.item() if norm.momentum is None else norm.momentum
        norm.running_mean.lerp_(mean.to(norm.running_mean), share)
        norm.running_var.lerp_((m2 / (count - 1)).to(norm.running_var), share)


class _Norm(NamedTuple):
    """A norm, measured: out = x · scale + shift."""

    mean: Tensor  # float32 [N, C], N being 1 for a batch norm, as all of these
    scale: Tensor
    shift: Tensor
    inverse: Tensor  # float64: one over the standard deviation


def _measured(statistics: Tensor, count: int, weight: Tensor, bias: Tensor, eps: float) -> _Norm:
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
        x: Tensor, weight: Tensor, bias: Tensor, skip: Tensor | None, eps: float, relu: bool, batch: bool
    ) -> tuple[Tensor, Tensor]:
        out, images = torch.empty_like(x), _images(x, batch)
        statistics = _native.channel_statistics(images)
        norm = _measured(statistics, images[0, 0].numel(), weight, bias, eps)
        beside = None if skip is None else _images(channels_last(skip), batch)
        _native.scale_shift(images, norm.scale, norm.shift, side_by_side(beside), relu, _images(out, batch))
        return out, statistics

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, bias, skip, ctx.eps, ctx.relu, ctx.batch = inputs
        ctx.skipped = skip is not None
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, weight, bias, output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, statistics = ctx.saved_tensors
        of_skip = grad if ctx.skipped else None
        if torch.is_grad_enabled():  # the gradient of this gradient may be asked for
            y = reference.norm_relu(x, weight, bias, ctx.eps, ctx.relu, ctx.batch)
            needed = [one for one, wanted in zip((x, weight, bias), ctx.needs_input_grad) if wanted]
            found = iter(torch.autograd.grad(y, needed, grad, create_graph=True))
            return *(next(found) if wanted else None for wanted in ctx.needs_input_grad[:3]), of_skip, None, None, None

        out, images, grads = torch.empty_like(x), _images(x, ctx.batch), _images(channels_last(grad), ctx.batch)
        count = images[0, 0].numel()
        norm = _measured(statistics, count, weight, bias, ctx.eps)
        total, product = _native.norm_gradient_sums(images, grads, norm[:3], ctx.relu).unbind(1)
        beside = statistics[:, 0] - norm.mean  # of the mean, what float32 has no room for
        product = product - beside * total
        scale, inverse = weight * norm.inverse, norm.inverse
        of_x = -scale * inverse.square() * product / count
        factors = torch.stack([scale, of_x, -scale * total / count - of_x * beside], dim=1)
        _native.norm_gradient(images, grads, norm[:3], factors.float(), ctx.relu, _images(out, ctx.batch))
        of_weight, of_bias = (product * inverse).sum(0).to(weight), total.sum(0).to(bias)
        return out, of_weight, of_bias, of_skip, None, None, None
