"""Instance norm of activations in NHWC, with the ReLU and the skip that follow it: one pass for each channel's
statistics, one that applies them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastperc import _native, backends, reference
from fastperc.ops.frozen import channels_last, native_unsupported, side_by_side, unsupported
from fastperc.types import InstanceNorm


def instance_norm(x: Tensor, norm: InstanceNorm, relu: bool = False, skip: Tensor | None = None) -> Tensor:
    """relu?(each channel of each image by its own mean and variance, scaled and shifted, + ``skip``).

    Args:
        x: [N, C, H, W].
        norm: weight [C], bias [C] and eps, as ``nn.InstanceNorm2d``'s.
        relu: whether a ReLU comes last.
        skip: [N, C, H, W], added before it.

    Returns:
        [N, C, H, W], channels-last unless plain PyTorch computed it.
    """
    obstacle = unsupported(x, norm, skip)
    backend = backends.choose(
        "instance_norm",
        x,
        triton=obstacle or backends.triton_unsupported(x),
        native=obstacle or native_unsupported(x),
    )
    if backend == "reference":
        return reference.finish(x, norm, relu, skip)
    x = channels_last(x)
    if backend == "triton":
        return triton_instance_norm(x, norm, relu, skip)
    return native_instance_norm(x, norm, relu, skip, torch.empty_like(x))


def native_instance_norm(x: Tensor, norm: InstanceNorm, relu: bool, skip: Tensor | None, out: Tensor) -> Tensor:
    """Fills ``out``, which may be ``x``; both channels-last."""
    mean, m2 = _native.channel_statistics(x).unbind(1)
    scale = norm.weight / (m2 / x[0, 0].numel() + norm.eps).sqrt()
    shift = norm.bias - mean * scale
    _native.scale_shift(x, scale.float(), shift.float(), side_by_side(skip), relu, out)
    return out


def triton_instance_norm(x: Tensor, norm: InstanceNorm, relu: bool, skip: Tensor | None) -> Tensor:
    from fastperc.kernels import instance_norm as kernels

    with backends.on_device(x):
        partials = torch.empty(len(x), kernels.statistics_tiles(x.shape), 3, x.shape[1], device=x.device)
        kernels.statistics_fwd(x, partials)
    return triton_apply(x, partials, norm, relu, skip, torch.empty_like(x))


def triton_finish(
    out: Tensor,
    tiles: Callable[[], int],
    fill: Callable[[bool, Tensor | None], None],
    norm: InstanceNorm | None,
    relu: bool,
    skip: Tensor | None = None,
) -> Tensor:
    """``out``, as a convolution's Triton kernel fills it by ``fill(relu, partials)``.

    For an instance norm the kernel takes the statistics of each of its ``tiles()`` of an image too, and a second pass
    applies them in place, with the ``skip`` and the ReLU; without one the kernel does all of it.
    """
    with backends.on_device(out):
        if norm is None:
            fill(relu, None)
            return out
        partials = torch.empty(len(out), tiles(), 3, out.shape[1], device=out.device)
        fill(False, partials)
    return triton_apply(out, partials, norm, relu, skip, out)


def triton_apply(
    x: Tensor, partials: Tensor, norm: InstanceNorm, relu: bool, skip: Tensor | None, out: Tensor
) -> Tensor:
    """Fills ``out``, which may be ``x``, by the statistics of its tiles."""
    from fastperc.kernels import instance_norm as kernels

    with backends.on_device(x):
        coefficients = kernels.norm_coefficients(partials, norm.weight.float(), norm.bias.float(), norm.eps)
        kernels.instance_norm_fwd(x, coefficients, side_by_side(skip), relu, out)
    return out


def channel_statistics(x: Tensor) -> Tensor:
    """The mean of each channel of each image of ``x`` [N, C, H, W], and Σ (x - mean)²: float64 [N, 2, C]."""
    if native_unsupported(x) is None and x.numel():
        return _native.channel_statistics(channels_last(x))
    variance, mean = torch.var_mean(x.double(), dim=(2, 3), correction=0)
    return torch.stack([mean, variance * x[0, 0].numel()], dim=1)
