"""VGG as a fixed loss network: its maps at any taps, and the gradient to the image."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fastperc import _native, backends, reference
from fastperc.backends import Implementation, Operation, TuningCases, register
from fastperc.ops.common import (
    COMMON_CPP_SOURCES,
    channels_last,
    compute_dtype,
    storage_dtype,
    why_not_here,
    without_slow_autocast,
)
from fastperc.ops.vgg_chain import (
    VGG_CONV,
    PackedConv,
    SavedLayer,
    Taps,
    backward_chain,
    forward_chain,
    pack,
    unpool,
)
from fastperc.ops.vgg_passes import NativePasses, TritonPasses
from fastperc.ops.vgg_terms import check_taps
from fastperc.types import FrozenConv, Tap

PASSES = {"triton": TritonPasses(), "native": NativePasses()}


def vgg_features(x: Tensor, convs: Sequence[FrozenConv], taps: Collection[Tap]) -> dict[Tap, Tensor]:
    """The maps at ``taps``, in the network's order, as :func:`fastperc.reference.vgg_features` gives them.

    Args:
        x: [N, C, H, W], normalised as the weights expect it.
        convs: the network. Gradients flow to ``x`` only, if the weights want none.
        taps: places in the network.

    Raises:
        ValueError: there is no such tap, or the images are smaller than the poolings.
    """
    check_taps(taps, convs, x.shape)
    stored = storage_dtype(x)
    with without_slow_autocast(x):
        maps = VGG_FEATURES(x.to(compute_dtype(x)), convs, taps)
    return {tap: features.to(stored) for tap, features in maps.items()}


# Why a backend cannot serve


def why_not_fused(x: Tensor, convs: Sequence[FrozenConv], backend: str) -> str | None:
    """Why ``backend`` cannot run ``convs`` on ``x``, or ``None``."""
    if reason := why_not_frozen_convs(x, convs, backend):
        return reason
    if any(conv.weight.requires_grad or conv.bias.requires_grad for conv in convs):
        return "the loss network's weights want gradients"
    return None


def why_not_frozen_convs(x: Tensor, convs: Sequence[FrozenConv], backend: str) -> str | None:
    """Why ``backend`` cannot run ``convs`` on ``x`` even if their weights want no gradients, or ``None``."""
    if reason := why_not_here():
        return reason
    if x.shape[0] == 0:
        return "the batch is empty"
    if backend == "native":
        return _native.why_not(x) if x.device.type == "cpu" else f"no C++ kernel for {x.device.type} tensors"
    if any(conv.bias.shape[0] not in (16, 32) and conv.bias.shape[0] % 64 for conv in convs):
        return "its blocks are of 16, 32 or 64 channels"
    return backends.why_not_triton(x)


class _VGGFeatures(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, convs: Sequence[PackedConv], taps: Sequence[Tap], backend: str) -> Any:
        maps: dict[Tap, Tensor] = {}

        def visit(tap: Tap, features: Tensor) -> Tensor:
            maps[tap] = features
            return features

        images = len(x) if ctx.needs_input_grad[0] else 0
        with backends.on_device(x):
            ctx.layers = forward_chain(x, images, convs, Taps(visit, taps, taps), PASSES[backend].passes)
        # Those after a ReLU tell where it passes gradients, which saves their bits.
        ctx.save_for_backward(x, *(maps[tap] for tap in taps if tap.kind == "relu"))
        ctx.convs, ctx.taps, ctx.backend = convs, taps, backend
        ctx.set_materialize_grads(False)
        return tuple(maps[tap] for tap in taps)

    @staticmethod
    def backward(ctx: Any, *grad_features: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *after_relu = ctx.saved_tensors
        given = {tap: grad for tap, grad in zip(ctx.taps, grad_features) if grad is not None}
        if torch.is_grad_enabled():  # to be differentiated again
            again = reference.vgg_features(x, ctx.convs, ctx.taps)
            outputs = [again[tap] for tap in given]
            return torch.autograd.grad(outputs, x, list(given.values()), create_graph=True)[0], None, None, None
        passes = PASSES[ctx.backend].passes
        kept = dict(zip((tap for tap in ctx.taps if tap.kind == "relu"), after_relu))

        def tap_gradient(tap: Tap, layer: SavedLayer, above: Tensor | None) -> Tensor | None:
            if above is not None and tap.kind == "relu":
                above = unpool(above, layer, passes)
            grad = given.get(tap)
            total = above if grad is None else channels_last(grad) if above is None else above.add_(grad)
            if tap.kind != "relu" or total is None:
                return total
            return torch.ops.aten.threshold_backward(total, kept[tap], 0)

        functions = {tap: partial(tap_gradient, tap) for tap in ctx.taps}
        with backends.on_device(x), torch.autocast(x.device.type, enabled=False):
            return backward_chain(list(ctx.layers), ctx.convs, functions, passes), None, None, None


def packed_down_to(taps: Collection[Tap], convs: Sequence[FrozenConv], dtype: torch.dtype) -> list[PackedConv]:
    """The convolutions down to the deepest of ``taps``, in ``dtype``."""
    return [pack(conv, dtype) for conv in convs[: 1 + max(tap.conv for tap in taps)]]


def _fused(backend: str) -> Implementation:
    def why_not(x: Tensor, convs: Sequence[FrozenConv], taps: Collection[Tap]) -> str | None:
        return why_not_fused(x, convs, backend)

    def run(x: Tensor, convs: Sequence[FrozenConv], taps: Collection[Tap]) -> dict[Tap, Tensor]:
        ordered = sorted(set(taps), key=lambda tap: tap.place)
        with torch.autocast(x.device.type, enabled=False):
            features = _VGGFeatures.apply(x, packed_down_to(taps, convs, x.dtype), ordered, backend)
        return dict(zip(ordered, features))

    return Implementation(backend, run, why_not)


def random_convs(images: Tensor) -> list[FrozenConv]:
    """VGG-16's convolutions up to relu2_2 for tuning: the deeper ones are alike on all backends."""
    return [
        FrozenConv(
            images.new_empty(c_out, c_in, 3, 3).normal_(std=(2 / (9 * c_in)) ** 0.5), images.new_zeros(c_out), i == 2
        )
        for i, (c_in, c_out) in enumerate(pairwise((3, 64, 64, 128, 128)))
    ]


SOURCES = (
    *COMMON_CPP_SOURCES,
    *VGG_CONV.sources,
    "csrc/vgg_loss*",
    "kernels/relu_masks.py",
    "kernels/vgg_loss.py",
    "fastperc/ops/vgg_passes.py",
    "fastperc/ops/vgg_features.py",
)

VGG_FEATURES = register(
    Operation(
        "vgg_features",
        "Loss network's features",
        (_fused("triton"), _fused("native"), Implementation("reference", reference.vgg_features)),
        TuningCases(
            lambda batch, size: [((batch, 3, size, size),)],
            lambda images: (images, random_convs(images.detach()), (Tap(1), Tap(3))),
        ),
        SOURCES,
    )
)
