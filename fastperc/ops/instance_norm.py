"""Instance norm of a frozen network's activations in NHWC, with the skip and the ReLU that follow it.

One pass measures each channel's statistics, a second applies them. In training, norms are ``ops.norm_relu``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastperc import _native, backends, kernels, reference
from fastperc.backends import Implementation, Operation, TuningCases, register
from fastperc.devices import widest_dtype
from fastperc.ops.common import (
    COMMON_CPP_SOURCES,
    COMMON_CUDA_SOURCES,
    activate_,
    channels_adjacent,
    channels_last,
    copied_to,
    why_not_compiled,
    why_not_frozen,
)
from fastperc.types import NO_EPILOGUE, Deferred, Epilogue, InstanceNorm


def instance_norm(x: Tensor, epilogue: Epilogue) -> Tensor:
    """activation(each channel of each image by its own mean and variance, scaled and shifted, + skip).

    Args:
        x: [N, C, H, W].
        epilogue: its norm has weight [C], bias [C] and eps, as ``nn.InstanceNorm2d``; its skip is [N, C, H, W].

    Returns:
        [N, C, H, W], channels-last unless plain PyTorch computed it.
    """
    return INSTANCE_NORM(x, epilogue)


def native_instance_norm(x: Tensor, epilogue: Epilogue, out: Tensor | None = None) -> Tensor:
    """The norm of ``x`` by C++ or CUDA, into ``out``, which may be ``x``; both are channels-last."""
    norm, activation, skip = epilogue.norm, epilogue.activation, epilogue.skip
    assert norm is not None
    x = channels_last(x)
    out = torch.empty_like(x) if out is None else out
    statistics = _native.channel_mean_m2(x)
    fused = activation is None or activation.name in _native.PASS_ACTIVATIONS
    passed = activation if fused else None
    if _native.on_gpu(x):
        parameters = _native.NormParameters(norm.weight.float().contiguous(), norm.bias.float().contiguous(), norm.eps)
        counts = statistics.new_full((1,), x[0, 0].numel())
        mean, scale, shift = _native.norm_state(statistics, counts, parameters, False).factors
        _native.scale_shift(x, scale, shift, skip, passed, out, mean=mean)
    else:
        means, m2 = statistics.unbind(1)
        wide = norm.weight / (m2 / x[0, 0].numel() + norm.eps).sqrt()
        scale, shift = wide.float(), (norm.bias - means * wide).float()
        _native.scale_shift(x, scale, shift, channels_adjacent(skip), passed, out)
    return copied_to(out if fused else activate_(out, activation), epilogue.out)


def triton_instance_norm(x: Tensor, epilogue: Epilogue) -> Tensor:
    """The norm of ``x`` by Triton's kernels."""
    x = channels_last(x)
    with backends.on_device(x):
        tiles = kernels.instance_norm.statistics_tiles(x.shape)
        partials = torch.empty(len(x), tiles, 3, x.shape[1], device=x.device)
        kernels.instance_norm.statistics_fwd(x, partials)
    return _triton_apply(x, partials, epilogue, torch.empty_like(x))


def triton_finish(
    out: Tensor, tiles: Callable[[], int], fill: Callable[[Epilogue, Tensor | None], None], epilogue: Epilogue
) -> Tensor:
    """``out``, filled by a convolution's Triton kernel, ``fill(epilogue, partials)``, with its whole epilogue.

    With an instance norm the kernel also stores the statistics of each of its ``tiles()`` of an image, and a second
    pass applies the norm, the skip and the ReLU in place. Without one the kernel does all of it.
    """
    with backends.on_device(out):
        if epilogue.norm is None:
            fill(epilogue, None)
            return copied_to(out, epilogue.out)
        partials = torch.empty(len(out), tiles(), 3, out.shape[1], device=out.device)
        fill(NO_EPILOGUE, partials)
    return _triton_apply(out, partials, epilogue, out)


def _triton_apply(x: Tensor, partials: Tensor, epilogue: Epilogue, out: Tensor) -> Tensor:
    """Fills ``out``, which may be ``x``, from the statistics of its tiles."""
    norm = epilogue.norm
    assert norm is not None
    with backends.on_device(x):
        coefficients = kernels.norm_coefficients.norm_coefficients(
            partials, norm.weight.float(), norm.bias.float(), norm.eps
        )
        normalised, skip = Deferred(x, coefficients), channels_adjacent(epilogue.skip)
        kernels.instance_norm.instance_norm_fwd(normalised, skip, out, epilogue.activation)
        return copied_to(out, epilogue.out)


def instance_statistics(x: Tensor) -> Tensor:
    """Mean and Σ (x - mean)² of each channel of each image of ``x`` [N, C, H, W]: [N, 2, C], float64 where the device
    has that, else float32."""
    if why_not_compiled(x) is None and x.numel():
        return _native.channel_mean_m2(channels_last(x))
    variance, mean = torch.var_mean(x.to(widest_dtype(x.device)), dim=(2, 3), correction=0)
    return torch.stack([mean, variance * x[0, 0].numel()], dim=1)


def _plain(x: Tensor, epilogue: Epilogue) -> Tensor:
    return copied_to(reference.finish(x, epilogue), epilogue.out)


def _why_not_triton(x: Tensor, epilogue: Epilogue) -> str | None:
    return why_not_frozen(x, epilogue=epilogue) or backends.why_not_triton(x)


def _why_not_native(x: Tensor, epilogue: Epilogue) -> str | None:
    return why_not_frozen(x, epilogue=epilogue) or why_not_compiled(x)


INSTANCE_NORM = register(
    Operation(
        "instance_norm",
        "Instance norm, ReLU",
        (
            Implementation("triton", triton_instance_norm, _why_not_triton),
            Implementation("native", native_instance_norm, _why_not_native),
            Implementation("reference", _plain),
        ),
        TuningCases(
            lambda batch, size: [((batch, c, size // s, size // s),) for c, s in ((32, 1), (64, 2), (128, 4))],
            lambda x: (x, Epilogue(InstanceNorm(x.new_ones(x.shape[1]), x.new_zeros(x.shape[1]), 1e-5))),
        ),
        (
            *COMMON_CPP_SOURCES,
            *COMMON_CUDA_SOURCES,
            "csrc/norm_*",
            "kernels/instance_norm.py",
            "kernels/norm_coefficients.py",
            "fastperc/ops/instance_norm.py",
        ),
        frozen=True,
    )
)
