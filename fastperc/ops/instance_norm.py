"""Instance norm of activations in NHWC, with the ReLU and the skip that follow it: one pass for each channel's
statistics, one that applies them."""

from __future__ import annotations

import torch
from torch import Tensor

from fastperc import _native, backends, reference
from fastperc.reference import InstanceNorm


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
    obstacle = unsupported(x, norm.weight, norm.bias, skip)
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
        return triton_instance_norm(x, None, norm, relu, skip)
    return native_instance_norm(x, norm, relu, skip, torch.empty_like(x))


def unsupported(*tensors: Tensor | None) -> str | None:
    """Why only plain PyTorch can take these, or ``None``: what a frozen network's kernels have in common."""
    given = [t for t in tensors if t is not None]
    if torch.compiler.is_compiling():
        return "torch.compile fuses plain PyTorch itself"
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        return "these kernels give no gradients"
    if given[0].numel() == 0:
        return "the tensor is empty"
    return None


def native_unsupported(x: Tensor) -> str | None:
    """Why the C++ kernel cannot take ``x``, or ``None`` if it can."""
    if x.device.type != "cpu" or x.dtype == torch.float64:
        return f"no C++ kernel for {str(x.dtype).removeprefix('torch.')} on {x.device.type}"
    return _native.unsupported(x)


def channels_last(x: Tensor) -> Tensor:
    """``x`` [N, C, H, W] dense in NHWC, copied if it is not."""
    return x.contiguous(memory_format=torch.channels_last)


def side_by_side(skip: Tensor | None) -> Tensor | None:
    """``skip``, copied unless the channels of a pixel lie together."""
    return skip if skip is None or skip.stride(1) == 1 else channels_last(skip)


def native_instance_norm(x: Tensor, norm: InstanceNorm, relu: bool, skip: Tensor | None, out: Tensor) -> Tensor:
    """Fills ``out``, which may be ``x``; both channels-last."""
    mean, m2 = _native.channel_statistics(x).unbind(1)
    scale = norm.weight / (m2 / x[0, 0].numel() + norm.eps).sqrt()
    shift = norm.bias - mean * scale
    _native.scale_shift(x, scale.float(), shift.float(), side_by_side(skip), relu, out)
    return out


def triton_instance_norm(
    x: Tensor, partials: Tensor | None, norm: InstanceNorm, relu: bool, skip: Tensor | None
) -> Tensor:
    """In place, with the ``partials`` that the convolution that made ``x`` left, or those taken here."""
    from fastperc.kernels import instance_norm as kernels

    with backends.on_device(x):
        if partials is None:
            shape = (len(x), kernels.statistics_tiles(x.shape), 3, x.shape[1])
            partials = torch.empty(shape, device=x.device)
            kernels.statistics_fwd(x, partials)
            out = torch.empty_like(x)
        else:
            out = x
        weight, bias = norm.weight.float(), norm.bias.float()
        kernels.instance_norm_fwd(x, partials, weight, bias, norm.eps, side_by_side(skip), relu, out)
    return out


def channel_statistics(x: Tensor) -> Tensor:
    """The mean of each channel of each image of ``x`` [N, C, H, W], and Σ (x - mean)²: float64 [N, 2, C]."""
    if native_unsupported(x) is None and x.numel():
        return _native.channel_statistics(channels_last(x))
    variance, mean = torch.var_mean(x.double(), dim=(2, 3), correction=0)
    return torch.stack([mean, variance * x[0, 0].numel()], dim=1)
