"""LPIPS of two images under a frozen VGG, forward and backward.

Both images go through the network as one batch. At each layer that is compared, the activations of both are read once:
they give the distances and, for the backward, the unit gradient of a side (see ``csrc/lpips_distance.h``), which takes
the place of its activations. Autograd would keep the activations of both sides, of all layers, and what lies between
them and the distances. On a CPU the batch goes a few images at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastperc import _native, backends, kernels, reference
from fastperc.backends import Implementation, Operation, TuningCases, register
from fastperc.ops.common import (
    COMMON_CPP_SOURCES,
    channels_last,
    compute_dtype,
    empty_like,
    why_not_here,
    without_slow_autocast,
)
from fastperc.ops.lpips_distance import KERNELS, LPIPS_DISTANCE
from fastperc.ops.vgg_chain import VGG_CONV, PackedConv, Passes, convolve_relu, convolve_turned, pack
from fastperc.types import FrozenConv, Tap

PAIRS_ON_CPU = 2  # that go through the network together

Target = Tensor | Sequence[Tensor]  # images [N, 3, H, W], or the features of such, one [N, C, H', W'] a layer


class Network(NamedTuple):
    """The loss network, and what LPIPS takes of it."""

    convs: Sequence[FrozenConv]
    taps: tuple[int, ...]  # indices into ``convs``, ascending
    weights: Sequence[Tensor]  # of the channels of each tap, [C], float32


def vgg_lpips(x: Tensor, target: Target, network: Network, size: Sequence[int] | None = None) -> list[Tensor]:
    """LPIPS of ``x`` and ``target``, layer by layer; their sum is the distance.

    Args:
        x: [N, C, H, W], normalised as the weights of ``network`` expect it.
        target: the other images, as ``x``; or their features at the taps. Either side may have one image, which is
            compared with all of the other side. Gradients flow to images.
        network: the convolutions and the channel weights.
        size: as in :func:`fastperc.ops.lpips_distance`, whose terms these are.

    Raises:
        ValueError: images of different shapes, or features of another image size.
    """
    sides = [x, *([target] if isinstance(target, Tensor) else target)]
    images = max(len(side) for side in sides) if min(len(side) for side in sides) else 0
    if any(len(side) not in (1, images) for side in sides):
        raise ValueError(f"expected as many images on both sides, or one on either, got {len(x)} and {len(sides[-1])}")
    if isinstance(target, Tensor) and target.shape[1:] != x.shape[1:]:
        raise ValueError(f"expected images of one shape, got {list(x.shape)} and {list(target.shape)}")
    dtype = compute_dtype(x)
    with without_slow_autocast(x):
        x, *others = (side.to(dtype).expand(images, -1, -1, -1) for side in sides)
        maps = VGG_LPIPS(x, others[0] if isinstance(target, Tensor) else others, network)
        with torch.autocast(x.device.type, enabled=False):
            return reference.lpips_terms(maps, size)


def plain_vgg_lpips(x: Tensor, target: Target, network: Network) -> list[Tensor]:
    """The maps of :func:`fastperc.reference.lpips_maps`, out of plain PyTorch, for autograd to differentiate."""
    features = _plain_features(x, network)
    of_target = _plain_features(target, network) if isinstance(target, Tensor) else target
    return reference.lpips_maps(features, of_target, network.weights)


def _plain_features(x: Tensor, network: Network) -> list[Tensor]:
    convs = [conv._replace(weight=conv.weight.to(x.dtype), bias=conv.bias.to(x.dtype)) for conv in network.convs]
    features = reference.vgg_features(x, convs, [Tap(i) for i in network.taps])
    return [features[Tap(i)] for i in network.taps]


class Packed(NamedTuple):
    """A :class:`Network` ready to run by one backend."""

    convs: Sequence[PackedConv]
    taps: tuple[int, ...]
    weights: Sequence[Tensor]
    backend: str

    @property
    def passes(self) -> Passes:
        """The passes between the convolutions."""
        return _native if self.backend == "native" else kernels.vgg_loss

    def add_units(self, unit: Tensor, coefficient: Tensor, grad: Tensor | None) -> Tensor:
        """``grad`` + ``coefficient`` [N, 1, H, W] · ``unit``, in the memory of ``grad`` or else of ``unit``."""
        out = unit if grad is None else grad
        if self.backend == "triton":
            kernels.lpips_distance.add_units(unit, coefficient, grad, out)
        elif grad is None:
            torch.mul(unit, coefficient, out=unit)
        else:
            grad.addcmul_(unit, coefficient)
        return out


class KeptLayer(NamedTuple):
    """What the backward needs of one convolution's output [n, C, H, W], channels-last."""

    shape: torch.Size
    units: Tensor | None  # at a tap: the unit gradients, which the ReLU has let through
    inverses: Tensor | None  # [n, 1, H, W], at a tap
    bits: Tensor | None  # whether each element is positive, where another convolution follows
    winners: Tensor | None  # [n, C, H/2, W/2] uint8, where a pooling follows


class Pairs(NamedTuple):
    """Some images and their targets on the way through the network."""

    images: int
    sides: int  # that get a gradient: none, the images, or both
    target: Sequence[Tensor] | None  # features at the taps; ``None``: the targets follow the images in the batch

    def compare(self, x: Tensor, tap: int, network: Packed, distances: Tensor, may_overwrite: bool) -> Any:
        """Fills ``distances`` [images, 1, H, W] at a tap. Returns the units and inverses of the sides with gradients.

        ``x`` are the activations; the units take their place if they ``may_overwrite`` them.
        """
        position = network.taps.index(tap)
        weight, kernel = network.weights[position], KERNELS[network.backend]
        both = x[: self.images], x[self.images :] if self.target is None else self.target[position]
        if not self.sides:
            kernel(both, weight, distances)
            return None, None
        kept = self.sides * self.images
        units = x if may_overwrite and kept == len(x) else empty_like(x, (kept, *x.shape[1:]))
        inverses = distances.new_empty(kept, *distances.shape[1:])
        of_units, of_inverses = (
            (own[: self.images], own[self.images :] if self.sides == 2 else None) for own in (units, inverses)
        )
        kernel(both, weight, distances, None, of_units, of_inverses, True)
        return units, inverses


def forward_pairs(x: Tensor, pairs: Pairs, network: Packed, maps: Sequence[Tensor]) -> list[KeptLayer]:
    """Runs the network on ``x`` and fills ``maps`` [images, 1, H, W], one a tap. Returns what the backward needs."""
    layers = []
    kept, convs, passes = pairs.sides * pairs.images, network.convs, network.passes
    x = channels_last(x)
    for i, conv in enumerate(convs):
        x = convolve_relu(x, conv)
        is_last = i + 1 == len(convs)
        pooled = units = inverses = bits = winners = None
        shape = torch.Size((kept, *x.shape[1:]))
        if not is_last and convs[i + 1].pooled:
            pooled = empty_like(x, (*x.shape[:2], x.shape[2] // 2, x.shape[3] // 2))
            winners = torch.empty_like(pooled[:kept], dtype=torch.uint8)
            passes.relu_pool_fwd(x, pooled, winners)
        elif kept and not is_last:
            bits = x.new_empty((shape.numel() + 7) // 8, dtype=torch.uint8)
            passes.relu_mask_fwd(x[:kept], bits)
        if i in network.taps:
            distances = maps[network.taps.index(i)]
            units, inverses = pairs.compare(x, i, network, distances, is_last or pooled is not None)
        if kept:
            layers.append(KeptLayer(shape, units, inverses, bits, winners))
        x = x if pooled is None else pooled
    return layers


def backward_pairs(layers: list[KeptLayer], network: Packed, incoming: Sequence[Tensor]) -> Tensor:
    """The gradient of the batch, given those of the maps, [n, 1, H, W] a tap; frees ``layers`` on the way."""
    grad: Tensor | None = None
    while layers:
        layer, i = layers.pop(), len(layers)
        if grad is not None and layer.winners is not None:
            pooled, grad = grad, empty_like(grad, layer.shape)
            network.passes.relu_pool_bwd(channels_last(pooled), layer.winners, grad)
            del pooled
        elif grad is not None:
            assert layer.bits is not None
            network.passes.relu_mask_bwd(grad, layer.bits)
        if layer.units is not None:
            assert layer.inverses is not None
            coefficient = layer.inverses * incoming[network.taps.index(i)]
            grad = network.add_units(layer.units, coefficient, grad)
        del layer
        assert grad is not None, "the network ends at a tap"
        grad = channels_last(convolve_turned(grad, network.convs[i]))
    assert grad is not None
    return grad


def chunks(x: Tensor) -> list[slice]:
    """The images that go through the network together: on a GPU all of them, on a CPU a few."""
    step = len(x) if x.device.type == "cuda" else PAIRS_ON_CPU
    return [slice(i, i + step) for i in range(0, len(x), step)]


def run(x: Tensor, target: Target, network: Packed, sides: int) -> tuple[list[Tensor], list[list[KeptLayer]]]:
    """The maps, and what their backward to the first ``sides`` of ``x`` and ``target`` needs: a list for each of
    :func:`chunks`."""
    maps, tapes = _empty_maps(x, network), []
    with backends.on_device(x), torch.autocast(x.device.type, enabled=False):
        for images in chunks(x):
            batch, features = x[images], None
            if isinstance(target, Tensor):
                batch = torch.cat([batch, target[images]])
            else:
                features = [t.expand(len(batch), -1, -1, -1) if len(t) == 1 else t[images] for t in target]
            pairs = Pairs(len(x[images]), sides, features)
            tapes.append(forward_pairs(batch, pairs, network, [own[images] for own in maps]))
        if x.device.type == "cuda":  # cuDNN's ReLU may drop NaN
            for image in (x, target) if isinstance(target, Tensor) else (x,):
                maps[0].add_(0 * image.sum(dim=(1, 2, 3), keepdim=True, dtype=maps[0].dtype))
    return maps, tapes


def _empty_maps(x: Tensor, network: Packed) -> list[Tensor]:
    """Uninitialised distances [N, 1, H, W], one a tap."""
    maps, (height, width) = [], x.shape[2:]
    for i, conv in enumerate(network.convs):
        height, width = (height // 2, width // 2) if conv.pooled else (height, width)
        if i in network.taps:
            maps.append(network.weights[0].new_empty(len(x), 1, height, width))
    return maps


class _VGGLpips(torch.autograd.Function):
    """The first backward frees what the forward has saved, on the way; a further one runs the forward again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, target: Tensor | None, network: Packed, plain: Network, *features: Tensor) -> Any:
        sides = 2 if ctx.needs_input_grad[1] else int(ctx.needs_input_grad[0])
        ctx.networks, ctx.sides = (network, plain), sides
        ctx.save_for_backward(x, target, *features)
        maps, tapes = run(x, features if target is None else target, network, sides)
        ctx.tapes = tapes if sides else None
        return tuple(maps)

    @staticmethod
    def backward(ctx: Any, *grad_maps: Tensor) -> tuple[Tensor | None, ...]:
        x, target, *features = ctx.saved_tensors
        (network, plain), sides = ctx.networks, ctx.sides
        given = features if target is None else target
        nothing = (None,) * (2 + len(features))
        if torch.is_grad_enabled():  # to be differentiated again
            maps = plain_vgg_lpips(x, given, plain)
            grads = torch.autograd.grad(maps, (x, target)[:sides], grad_maps, create_graph=True, allow_unused=True)
            return *grads, *(None,) * (2 - sides), *nothing
        tapes, ctx.tapes = ctx.tapes, None
        if tapes is None:
            tapes = run(x, given, network, sides)[1]
        outputs = [torch.empty_like(own) for own in (x, target)[:sides]]
        with backends.on_device(x), torch.autocast(x.device.type, enabled=False):
            for images in reversed(chunks(x)):
                incoming = [grad[images].repeat(sides, 1, 1, 1) for grad in grad_maps]
                grad = backward_pairs(tapes.pop(), network, incoming)
                for own, part in zip(outputs, grad.chunk(sides)):
                    own[images] = part
                del grad
        return *outputs, *(None,) * (2 - sides), *nothing


# Why a backend cannot serve


def _why_not_fused(x: Tensor, target: Target, network: Network) -> str | None:
    if reason := why_not_here():
        return reason
    frozen = [tensor for conv in network.convs for tensor in conv[:2]] + list(network.weights)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in frozen):
        return "the weights want gradients"
    if torch.is_grad_enabled() and any(t.requires_grad for t in ([] if isinstance(target, Tensor) else target)):
        return "the target's features want gradients"
    if x.shape[0] == 0:
        return "the batch is empty"
    if min(x.shape[2:]) >> sum(conv.pooled for conv in network.convs[: 1 + network.taps[-1]]) == 0:
        return "the image is smaller than the poolings"
    return None


def _why_not_native(x: Tensor, target: Target, network: Network) -> str | None:
    if reason := _why_not_fused(x, target, network):
        return reason
    return _native.why_not(x) if x.device.type == "cpu" else f"no C++ kernel for {x.device.type} tensors"


def _why_not_triton(x: Tensor, target: Target, network: Network) -> str | None:
    if reason := _why_not_fused(x, target, network):
        return reason
    if any(conv.bias.shape[0] not in (16, 32) and conv.bias.shape[0] % 64 for conv in network.convs):
        return "its blocks are of 16, 32 or 64 channels"
    return backends.why_not_triton(x)


def _fused(backend: str) -> Callable[..., Sequence[Tensor]]:
    def run_fused(x: Tensor, target: Target, network: Network) -> Sequence[Tensor]:
        wide = torch.promote_types(x.dtype, torch.float32)
        weights = [weight.to(x.device, wide).contiguous() for weight in network.weights]
        with torch.autocast(x.device.type, enabled=False):
            convs = [pack(conv, x.dtype) for conv in network.convs[: 1 + network.taps[-1]]]
            packed = Packed(convs, network.taps, weights, backend)
            if not isinstance(target, Tensor):
                return _VGGLpips.apply(x, None, packed, network, *map(channels_last, target))
            if target.requires_grad and not x.requires_grad:  # the distance is the same from either side
                return _VGGLpips.apply(target, x, packed, network)
            return _VGGLpips.apply(x, target, packed, network)

    return run_fused


def _tuned_call(images: Tensor) -> tuple[Any, ...]:
    """VGG-16's convolutions up to relu2_2: the deeper ones are alike on all backends."""
    sizes = [*pairwise((3, 64, 64, 128, 128))]
    convs = [
        FrozenConv(
            images.detach().new_empty(c_out, c_in, 3, 3).normal_(std=(2 / (9 * c_in)) ** 0.5),
            images.detach().new_zeros(c_out),
            i == 2,
        )
        for i, (c_in, c_out) in enumerate(sizes)
    ]
    weights = [torch.ones(channels, device=images.device) for channels in (64, 128)]
    return images, images.detach().flip(3), Network(convs, (1, 3), weights)


VGG_LPIPS = register(
    Operation(
        "vgg_lpips",
        "LPIPS",
        (
            Implementation("triton", _fused("triton"), _why_not_triton),
            Implementation("native", _fused("native"), _why_not_native),
            Implementation("reference", plain_vgg_lpips),
        ),
        TuningCases(lambda batch, size: [((batch, 3, size, size),)], _tuned_call),
        (
            *COMMON_CPP_SOURCES,
            *VGG_CONV.sources,
            *LPIPS_DISTANCE.sources,
            "csrc/vgg_loss*",
            "kernels/vgg_loss.py",
            "fastperc/ops/vgg_lpips.py",
        ),
    )
)
