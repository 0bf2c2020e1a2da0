"""The terms of a loss over a frozen network's maps at its taps, and their values in plain PyTorch.

A term compares the maps of an output with those of a target at one tap. Its value is an average over the batch, so the
fused path may take the images one by one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastperc import reference
from fastperc.ops.gram_loss import gram_loss
from fastperc.types import TAP_KINDS, FrozenConv, Tap

CRITERIA = ("l2", "l1", "smooth_l1")  # of reference.distances


class ContentTerm(NamedTuple):
    """The mean of d(maps, the target's maps), d as in :func:`fastperc.reference.distances`."""

    tap: Tap
    criterion: str = "l2"


class GramTerm(NamedTuple):
    """Σ d(G(maps), gram) averaged over the batch, G being the Gram matrix."""

    tap: Tap
    criterion: str = "l2"
    gram: Tensor | None = None  # [1, C, C]; None: the Gram matrix of the target's maps


Term = ContentTerm | GramTerm


class LossValues(NamedTuple):
    """The values of terms, float32 or wider."""

    values: Tensor  # [terms]
    sizes: Tensor
    """[terms], or [0] if not asked for: the values that a target gives against zeros, without a gradient; 1 for a
    :class:`GramTerm` with a Gram matrix of its own."""


def compares_target(term: Term) -> bool:
    """Whether ``term`` needs the target's maps."""
    return isinstance(term, ContentTerm) or term.gram is None


def check_taps(taps: Collection[Tap], convs: Sequence[FrozenConv], shape: Sequence[int]) -> None:
    """Raises a ``ValueError`` unless ``convs`` has ``taps``, and an image of ``shape`` reaches them."""
    if not taps:
        raise ValueError("no layer of the loss network is asked for")
    for tap in taps:
        known = tap.kind in TAP_KINDS and 0 <= tap.conv < len(convs)
        if not known or (tap.kind == "pool" and tap.conv + 1 < len(convs) and not convs[tap.conv + 1].pooled):
            raise ValueError(f"the loss network of {len(convs)} convolutions has no {tap}")
    poolings = max([poolings_above(tap, convs) for tap in taps])
    if min(shape[2:]) < 2**poolings:
        raise ValueError(
            f"images of {shape[2]}×{shape[3]} are too small for the loss network: its poolings down to the deepest "
            f"layer take at least {2**poolings}×{2**poolings} pixels"
        )


def poolings_above(tap: Tap, convs: Sequence[FrozenConv]) -> int:
    """The poolings between the image and the maps at ``tap``."""
    return sum(conv.pooled for conv in convs[: 1 + tap.conv]) + (tap.kind == "pool")


def shape_at(tap: Tap, convs: Sequence[FrozenConv], shape: Sequence[int]) -> tuple[int, int, int, int]:
    """The shape of the maps at ``tap`` of images of ``shape`` [N, C, H, W]."""
    poolings = poolings_above(tap, convs)
    return shape[0], convs[tap.conv].bias.shape[0], shape[2] >> poolings, shape[3] >> poolings


def plain_values(
    maps: Mapping[Tap, Tensor], targets: Mapping[Tap, Tensor], terms: Sequence[Term], sized: bool
) -> LossValues:
    """The values of ``terms`` from the maps of output and target, [N, C, H, W] each, for autograd to differentiate."""
    values: list[Tensor] = [torch.empty(0)] * len(terms)
    squares: dict[int, tuple[Tensor, Tensor]] = {}
    sizes = []
    for i, term in enumerate(terms):
        x = maps[term.tap]
        if isinstance(term, ContentTerm):
            values[i] = reference.feature_loss(x, targets[term.tap], term.criterion)
            size = reference.distances(reference.widen(targets[term.tap].detach()), term.criterion).mean()
        else:
            gram = reference.gram_matrix(targets[term.tap]) if term.gram is None else term.gram
            gram = gram.to(x.device, torch.promote_types(x.dtype, torch.float32))
            if term.criterion == "l2":
                squares[i] = x, gram
            else:
                values[i] = reference.gram_loss(x, gram, term.criterion)
            size = gram.new_ones(()) if term.gram is not None else gram_size(gram.detach(), term.criterion)
        sizes.append(size)
    if squares:
        losses = gram_loss([x for x, _ in squares.values()], [gram for _, gram in squares.values()])
        for i, loss in zip(squares, losses.unbind()):
            values[i] = loss
    stacked = torch.stack(values)
    return LossValues(stacked, torch.stack(sizes) if sized else stacked.new_zeros(0))


def gram_size(gram: Tensor, criterion: str) -> Tensor:
    """Σ d(gram, 0) averaged over the batch."""
    return reference.distances(gram, criterion).sum(dim=(1, 2)).mean()
