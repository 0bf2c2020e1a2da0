"""LPIPS of two images under a frozen VGG, forward and backward.

Both images go through the network as one batch. At each layer that is compared, the activations of both are read once:
they give the distances and, for the backward, the unit gradient of a side (see ``csrc/lpips_distance.h``), which takes
the place of its activations. Autograd would keep the activations of both sides, of all layers, and what lies between
them and the distances. On a CPU the batch goes a few images at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastperc import backends, kernels, reference
from fastperc.backends import Implementation, Operation, TuningCases, register
from fastperc.ops.common import channels_last, compute_dtype, empty_like, siblings, without_slow_autocast
from fastperc.ops.lpips_distance import KERNELS, LPIPS_DISTANCE
from fastperc.ops.vgg_chain import PackedConv, Passes, SavedLayer, Taps, backward_chain, chunks, forward_chain
from fastperc.ops.vgg_features import PASSES, SOURCES, packed_down_to, random_convs, why_not_frozen_convs
from fastperc.ops.vgg_terms import shape_at
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
    if any(side.shape[0] != x.shape[0] for side in sides):  # else the number of images may be unknown, in an export
        images = max(len(side) for side in sides) if min(len(side) for side in sides) else 0
        if any(len(side) not in (1, images) for side in sides):
            given = f"{len(x)} and {len(sides[-1])}"
            raise ValueError(f"expected as many images on both sides, or one on either, got {given}")
        sides = [side.expand(images, -1, -1, -1) for side in sides]
    if isinstance(target, Tensor) and target.shape[1:] != x.shape[1:]:
        raise ValueError(f"expected images of one shape, got {list(x.shape)} and {list(target.shape)}")
    dtype = compute_dtype(x)
    with without_slow_autocast(x):
        x, *others = (side.to(dtype) for side in sides)
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

    plain: Network
    convs: Sequence[PackedConv]  # down to the last tap
    weights: Sequence[Tensor]
    backend: str

    @property
    def passes(self) -> Passes:
        """The passes between the convolutions."""
        return PASSES[self.backend].passes

    @property
    def taps(self) -> list[Tap]:
        """Where the images are compared."""
        return [Tap(i) for i in self.plain.taps]


class Units(NamedTuple):
    """What the backward needs of a tap."""

    units: Tensor  # [n, C, H, W], channels-last: the unit gradients, which the ReLU has let through
    inverses: Tensor  # [n, 1, H, W]


class Tape(NamedTuple):
    """What the backward of some images needs."""

    layers: list[SavedLayer]
    units: dict[Tap, Units]  # emptied by their use


class Pairs(NamedTuple):
    """Some images and their targets on the way through the network."""

    network: Packed
    images: int
    sides: int  # that get a gradient: none, the images, or both
    target: Sequence[Tensor] | None  # features at the taps; ``None``: the targets follow the images in the batch
    maps: Sequence[Tensor]  # [images, 1, H, W], one a tap, to be filled
    units: dict[Tap, Units]  # to be filled, if a side gets a gradient

    def forward(self, x: Tensor) -> Tape:
        """Runs the network on ``x``."""
        network, kept = self.network, self.sides * self.images
        taps = Taps(self.compare, network.taps, late=True)
        return Tape(forward_chain(x, kept, network.convs, taps, network.passes), self.units)

    def compare(self, tap: Tap, x: Tensor) -> Tensor:
        """Fills the map at ``tap``, where the activations are ``x``, and what the backward needs there.

        The units take the place of the activations if they fill it and no convolution reads these next.
        """
        network, position = self.network, self.network.taps.index(tap)
        weight, distances, kernel = network.weights[position], self.maps[position], KERNELS[network.backend]
        both = x[: self.images], x[self.images :] if self.target is None else self.target[position]
        if not self.sides:
            kernel(both, weight, distances)
            return x
        kept, above = self.sides * self.images, network.convs[tap.conv + 1 : tap.conv + 2]
        may_overwrite = kept == len(x) and all(conv.pooled for conv in above)
        units = x if may_overwrite else empty_like(x, (kept, *x.shape[1:]))
        inverses = distances.new_empty(kept, *distances.shape[1:])
        of_units, of_inverses = (
            (own[: self.images], own[self.images :] if self.sides == 2 else None) for own in (units, inverses)
        )
        kernel(both, weight, distances, None, of_units, of_inverses, True)
        self.units[tap] = Units(units, inverses)
        return x


def backward_pairs(tape: Tape, network: Packed, incoming: Sequence[Tensor]) -> Tensor:
    """The gradient of the batch, given those of the maps, [n, 1, H, W] a tap; frees ``tape`` on the way."""

    def add_units(tap: Tap, of_map: Tensor, _: SavedLayer, grad: Tensor | None) -> Tensor:
        """Adds the gradient at ``tap`` to ``grad``, in the memory of ``grad`` or else of the units."""
        units, inverses = tape.units.pop(tap)
        coefficient, out = inverses * of_map, units if grad is None else grad
        if network.backend == "triton":
            kernels.lpips_distance.add_units(units, coefficient, grad, out)
            return out
        return torch.mul(units, coefficient, out=out) if grad is None else grad.addcmul_(units, coefficient)

    functions = {tap._replace(kind="conv"): partial(add_units, tap, own) for tap, own in zip(network.taps, incoming)}
    grad = backward_chain(tape.layers, network.convs, functions, network.passes)
    assert grad is not None, "the network ends at a tap"
    return grad


def run(x: Tensor, target: Target, network: Packed, sides: int) -> tuple[list[Tensor], list[Tape]]:
    """The maps, and what their backward to the first ``sides`` of ``x`` and ``target`` needs: a tape for each of the
    batch's chunks."""
    shapes = [shape_at(tap, network.plain.convs, x.shape) for tap in network.taps]
    maps = [weight.new_empty(n, 1, h, w) for weight, (n, _, h, w) in zip(network.weights, shapes)]
    tapes = []
    with backends.on_device(x), torch.autocast(x.device.type, enabled=False):
        for images in chunks(x, PAIRS_ON_CPU):
            batch, features = x[images], None
            if isinstance(target, Tensor):
                batch = torch.cat([batch, target[images]])
            else:
                features = [t.expand(len(batch), -1, -1, -1) if len(t) == 1 else t[images] for t in target]
            pairs = Pairs(network, len(x[images]), sides, features, [own[images] for own in maps], {})
            tapes.append(pairs.forward(batch))
        if x.device.type == "cuda":  # cuDNN's ReLU may drop NaN
            for image in (x, target) if isinstance(target, Tensor) else (x,):
                maps[0].add_(0 * image.sum(dim=(1, 2, 3), keepdim=True, dtype=maps[0].dtype))
    return maps, tapes


class _VGGLpips(torch.autograd.Function):
    """The first backward frees what the forward has saved, on the way; a further one runs the forward again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, target: Tensor | None, network: Packed, *features: Tensor) -> Any:
        sides = 2 if ctx.needs_input_grad[1] else int(ctx.needs_input_grad[0])
        ctx.network, ctx.sides = network, sides
        ctx.save_for_backward(x, target, *features)
        maps, tapes = run(x, features if target is None else target, network, sides)
        ctx.tapes = tapes if sides else None
        return tuple(maps)

    @staticmethod
    def backward(ctx: Any, *grad_maps: Tensor) -> tuple[Tensor | None, ...]:
        x, target, *features = ctx.saved_tensors
        network, sides = ctx.network, ctx.sides
        given = features if target is None else target
        nothing = (None,) * (1 + len(features))
        if torch.is_grad_enabled():  # to be differentiated again
            x, target = siblings((x, target))
            maps = plain_vgg_lpips(x, features if target is None else target, network.plain)
            grads = torch.autograd.grad(maps, (x, target)[:sides], grad_maps, create_graph=True, allow_unused=True)
            return *grads, *(None,) * (2 - sides), *nothing
        tapes, ctx.tapes = ctx.tapes, None
        if tapes is None:
            tapes = run(x, given, network, sides)[1]
        outputs = [torch.empty_like(own) for own in (x, target)[:sides]]
        with backends.on_device(x), torch.autocast(x.device.type, enabled=False):
            for images in reversed(chunks(x, PAIRS_ON_CPU)):
                incoming = [grad[images].repeat(sides, 1, 1, 1) for grad in grad_maps]
                grad = backward_pairs(tapes.pop(), network, incoming)
                for own, part in zip(outputs, grad.chunk(sides)):
                    own[images] = part
                del grad
        return *outputs, *(None,) * (2 - sides), *nothing


# The operation


def _fused(backend: str) -> Implementation:
    def why_not(x: Tensor, target: Target, network: Network) -> str | None:
        if reason := why_not_frozen_convs(x, network.convs, backend):
            return reason
        weights = [tensor for conv in network.convs for tensor in conv[:2]] + list(network.weights)
        if torch.is_grad_enabled() and any(weight.requires_grad for weight in weights):
            return "the weights want gradients"
        features = () if isinstance(target, Tensor) else target
        if torch.is_grad_enabled() and any(t.requires_grad for t in features):
            return "the target's features want gradients"
        if min(shape_at(Tap(network.taps[-1]), network.convs, x.shape)[2:]) == 0:
            return "the image is smaller than the poolings"
        return None

    def run_fused(x: Tensor, target: Target, network: Network) -> Sequence[Tensor]:
        wide = torch.promote_types(x.dtype, torch.float32)
        weights = [weight.to(x.device, wide).contiguous() for weight in network.weights]
        with torch.autocast(x.device.type, enabled=False):
            convs = packed_down_to([Tap(i) for i in network.taps], network.convs, x.dtype)
            packed = Packed(network, convs, weights, backend)
            if not isinstance(target, Tensor):
                return _VGGLpips.apply(x, None, packed, *map(channels_last, target))
            if target.requires_grad and not x.requires_grad:  # the distance is the same from either side
                return _VGGLpips.apply(target, x, packed)
            return _VGGLpips.apply(x, target, packed)

    return Implementation(backend, run_fused, why_not)


def _tuned_call(images: Tensor) -> tuple[Any, ...]:
    weights = [torch.ones(channels, device=images.device) for channels in (64, 128)]
    return images, images.detach().flip(3), Network(random_convs(images.detach()), (1, 3), weights)


VGG_LPIPS = register(
    Operation(
        "vgg_lpips",
        "LPIPS",
        (_fused("triton"), _fused("native"), Implementation("reference", plain_vgg_lpips)),
        TuningCases(lambda batch, size: [((batch, 3, size, size),)], _tuned_call),
        (*SOURCES, *LPIPS_DISTANCE.sources, "fastperc/ops/vgg_lpips.py"),
    )
)
