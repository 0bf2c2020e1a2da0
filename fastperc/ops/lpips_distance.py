"""LPIPS: how far the feature maps of two images are apart, all layers in one call.

The forward reads both maps once and keeps nothing of its own; the backward reads them once more. Each keeps its sums in
float32 or wider.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastperc import _native, backends, kernels, reference
from fastperc.backends import Implementation, Operation, TuningCases, register
from fastperc.ops.common import COMMON_CPP_SOURCES, siblings
from fastperc.ops.gram_loss import dense_format

MOST_CHANNELS = 1024  # of the Triton kernel, whose programs hold all channels of a pixel


def lpips_distance(
    features_a: Sequence[Tensor],
    features_b: Sequence[Tensor],
    channel_weights: Sequence[Tensor],
    size: Sequence[int] | None = None,
) -> Tensor:
    """LPIPS of two batches of images from their features: each pixel's features are divided by their norm + 1e-10; the
    squared difference is weighted by channel and averaged over the pixels; the layers are added up.

    Args:
        features_a, features_b: [N, C, H, W] a layer, of one dtype, any memory format; C, H and W may differ from layer
            to layer. In place of N either side may have one image, which is compared with all of the other side.
        channel_weights: [C], or [1, C, 1, 1] as ``lpips`` has them, one a layer.
        size: height and width to which each layer's distances are upsampled instead of averaged, bilinearly.

    Returns:
        [N, 1, 1, 1], or [N, 1, height, width] with ``size``: float64 for float64, else float32, also under autocast. A
        pixel whose features are all 0 gets a gradient of 0.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    features_a, features_b = tuple(features_a), tuple(features_b)
    weights = tuple(weight.flatten() for weight in channel_weights)
    check(features_a, features_b, weights)
    images = max(len(features_a[0]), len(features_b[0]))
    if len(features_a[0]) != len(features_b[0]):
        images = len(features_b[0]) if len(features_a[0]) == 1 else len(features_a[0])
    sides = [[x.expand(images, -1, -1, -1) for x in features] for features in (features_a, features_b)]
    wide = torch.promote_types(features_a[0].dtype, torch.float32)
    with torch.autocast(features_a[0].device.type, enabled=False):
        maps = LPIPS_DISTANCE(*sides, [weight.to(features_a[0].device, wide) for weight in weights])
        return torch.stack(reference.lpips_terms(maps, size)).sum(dim=0)


def check(features_a: Sequence[Tensor], features_b: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
    """Raises a ``ValueError`` unless both sides have the same layers, of a kind, and each has its channels' weights."""
    if not features_a or not len(features_a) == len(features_b) == len(weights):
        raise ValueError(
            f"lpips_distance needs as many layers of both images as channel weights, "
            f"got {len(features_a)}, {len(features_b)} and {len(weights)}"
        )
    first = features_a[0]
    for a, b, weight in zip(features_a, features_b, weights):
        if a.dim() != 4 or a.shape[1:] != b.shape[1:] or 0 in a.shape[1:] or weight.shape != a.shape[1:2]:
            fits = False
        else:
            fits = len(a) == len(first) and len(b) == len(features_b[0]) and (len(a) == len(b) or 1 in (len(a), len(b)))
        if not fits:
            raise ValueError(
                f"lpips_distance needs features [N or 1, C, H, W] and weights [C], "
                f"got {list(a.shape)}, {list(b.shape)} and {list(weight.shape)}"
            )
        for x in (a, b):
            if (x.dtype, x.device) != (first.dtype, first.device) or not x.is_floating_point():
                raise ValueError(
                    f"lpips_distance needs floating-point features of one dtype and device, "
                    f"got {x.dtype} on {x.device} beside {first.dtype} on {first.device}"
                )


def evenly_spaced(x: Tensor) -> Tensor:
    """``x`` [N, C, H, W], copied unless all pixels of an image, or all of a channel, are evenly spaced in memory."""
    width = x.shape[3]
    rows_follow = x.shape[2] == 1 or width == 1 or x.stride(2) == width * x.stride(3)
    is_plane = x.stride(2 if width == 1 else 3) == 1 or x.shape[2:].numel() == 1
    return x if rows_follow and (x.stride(1) == 1 or is_plane) else x.contiguous()


KERNELS: dict[str, Callable[..., None]] = {
    "native": _native.lpips_distance,
    "triton": lambda *arguments, **others: kernels.lpips_distance.lpips_distance(*arguments, **others),
}


@torch.library.custom_op("fastperc::lpips_distance_fwd", mutates_args=())
def lpips_distance_fwd(
    features_a: list[Tensor], features_b: list[Tensor], weights: list[Tensor], backend: str
) -> list[Tensor]:
    """The distance of each pixel, [N, 1, H, W] a layer; features are [N, C, H, W], weights [C]."""
    maps = _maps(features_a, features_b, weights, backend)
    with backends.on_device(maps[0]):
        for a, b, weight, distances in zip(features_a, features_b, weights, maps):
            KERNELS[backend]((evenly_spaced(a), evenly_spaced(b)), weight.contiguous(), distances)
    return maps


@lpips_distance_fwd.register_fake
def _maps(features_a: list[Tensor], features_b: list[Tensor], weights: list[Tensor], backend: str) -> list[Tensor]:
    return [weight.new_empty(len(a), 1, *a.shape[2:]) for a, weight in zip(features_a, weights)]


@torch.library.custom_op("fastperc::lpips_distance_bwd", mutates_args=())
def lpips_distance_bwd(
    features_a: list[Tensor],
    features_b: list[Tensor],
    weights: list[Tensor],
    grad_maps: list[Tensor],
    of_a: bool,
    of_b: bool,
    backend: str,
) -> list[Tensor]:
    """The gradients of ``features_a``, if ``of_a``, and then those of ``features_b``, if ``of_b``."""
    grads = _gradients(features_a, features_b, weights, grad_maps, of_a, of_b, backend)
    layers = len(features_a)
    grads_a: Sequence[Tensor | None] = grads[:layers] if of_a else [None] * layers
    grads_b: Sequence[Tensor | None] = grads[len(grads) - layers :] if of_b else [None] * layers
    with backends.on_device(weights[0]):
        for a, b, weight, incoming, *own in zip(features_a, features_b, weights, grad_maps, grads_a, grads_b):
            both = evenly_spaced(a), evenly_spaced(b)
            KERNELS[backend](both, weight.contiguous(), incoming=incoming.contiguous(), gradients=tuple(own))
    return grads


@lpips_distance_bwd.register_fake
def _gradients(
    features_a: list[Tensor],
    features_b: list[Tensor],
    weights: list[Tensor],
    grad_maps: list[Tensor],
    of_a: bool,
    of_b: bool,
    backend: str,
) -> list[Tensor]:
    wanted = [*features_a * of_a, *features_b * of_b]
    return [torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=dense_format(x)) for x in wanted]


class _LpipsDistance(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.backend, ctx.layers = backend, len(tensors) // 3
        ctx.save_for_backward(*tensors)
        return tuple(torch.ops.fastperc.lpips_distance_fwd(*_split(tensors, ctx.layers), backend))

    @staticmethod
    def backward(ctx: Any, *grad_maps: Tensor) -> tuple[Tensor | None, ...]:
        layers, none = ctx.layers, [None] * ctx.layers
        features_a, features_b, weights = _split(siblings(ctx.saved_tensors), layers)
        of_a, of_b = any(ctx.needs_input_grad[1 : 1 + layers]), any(ctx.needs_input_grad[1 + layers : 1 + 2 * layers])
        wanted = [*features_a * of_a, *features_b * of_b]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # to be differentiated again
            maps = reference.lpips_maps(features_a, features_b, weights)
            grads = torch.autograd.grad(maps, wanted, grad_maps, create_graph=True, allow_unused=True)
        else:
            grads = torch.ops.fastperc.lpips_distance_bwd(
                features_a, features_b, weights, list(grad_maps), of_a, of_b, ctx.backend
            )
        return None, *(grads[:layers] if of_a else none), *(grads[len(grads) - layers :] if of_b else none), *none


def _split(tensors: Sequence[Tensor], layers: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    return list(tensors[:layers]), list(tensors[layers : 2 * layers]), list(tensors[2 * layers :])


def _why_not_fused(features_a: Sequence[Tensor], features_b: Sequence[Tensor], weights: Sequence[Tensor]) -> str | None:
    if len(features_a[0]) == 0:
        return "the batch is empty"
    if any(weight.requires_grad for weight in weights):
        return "the channel weights want gradients"
    return None


def _why_not_native(
    features_a: Sequence[Tensor], features_b: Sequence[Tensor], weights: Sequence[Tensor]
) -> str | None:
    if reason := _why_not_fused(features_a, features_b, weights):
        return reason
    x = features_a[0]
    return _native.why_not(x) if x.device.type == "cpu" else f"no C++ kernel for {x.device.type} tensors"


def _why_not_triton(
    features_a: Sequence[Tensor], features_b: Sequence[Tensor], weights: Sequence[Tensor]
) -> str | None:
    if reason := _why_not_fused(features_a, features_b, weights):
        return reason
    if any(x.shape[1] > MOST_CHANNELS for x in features_a):
        return f"more than {MOST_CHANNELS} channels"
    return backends.why_not_triton(features_a[0])


def _fused(backend: str) -> Callable[..., Sequence[Tensor]]:
    return lambda features_a, features_b, weights: _LpipsDistance.apply(backend, *features_a, *features_b, *weights)


def _tuned_shapes(batch: int, size: int) -> list[tuple[tuple[int, ...], ...]]:
    """VGG-16's relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3, in one call."""
    channels = (64, 128, 256, 512, 512)
    return [tuple((batch, c, max(size >> i, 1), max(size >> i, 1)) for i, c in enumerate(channels))]


def _tuned_call(*features: Tensor) -> tuple[Any, ...]:
    weights = [x.new_ones(x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32)) for x in features]
    return features, [x.detach().flip(3) for x in features], weights


LPIPS_DISTANCE = register(
    Operation(
        "lpips_distance",
        "LPIPS of features",
        (
            Implementation("triton", _fused("triton"), _why_not_triton),
            Implementation("native", _fused("native"), _why_not_native),
            Implementation("reference", reference.lpips_maps),
        ),
        TuningCases(_tuned_shapes, _tuned_call),
        (
            *COMMON_CPP_SOURCES,
            "csrc/lpips_distance*",
            "kernels/lpips_distance.py",
            "fastperc/ops/lpips_distance.py",
        ),
        lambda features_a, features_b, weights: features_a,
    )
)
