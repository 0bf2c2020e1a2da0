"""The loss of images under a fixed VGG network: content and Gram terms at its taps, and their gradient.

Each backend runs the output through the network once and keeps a bit or a byte where autograd keeps an activation. On a
CPU the images go one by one, and the target's maps of an image become the slopes of its terms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastperc import backends, reference
from fastperc.backends import CannotServe, Implementation, Operation, TuningCases, register
from fastperc.ops.common import compute_dtype, without_slow_autocast
from fastperc.ops.gram_loss import GRAM_LOSS
from fastperc.ops.vgg_chain import PackedConv, Pictures, SavedLayer, Taps, backward_chain, chunks, forward_chain
from fastperc.ops.vgg_features import (
    PASSES,
    SOURCES,
    packed_down_to,
    random_convs,
    vgg_features,
    why_not_fused,
)
from fastperc.ops.vgg_passes import Content, NativePasses, PiecePasses, SavedTap, Style, slopes_
from fastperc.ops.vgg_terms import (
    CRITERIA,
    ContentTerm,
    GramTerm,
    LossValues,
    Term,
    check_taps,
    compares_target,
    gram_size,
    plain_values,
)
from fastperc.types import FrozenConv, Tap

IMAGES_ON_CPU = 1  # that go through the network together
PIECE_PASSES = PiecePasses()


def vgg_loss(
    output: Tensor,
    target: Tensor,
    convs: Sequence[FrozenConv],
    terms: Sequence[Term],
    sized: bool = False,
    target_gradient: bool = False,
) -> LossValues:
    """The values of ``terms`` of ``output``, each an average over the batch; 0 for an empty batch.

    Args:
        output, target: [N, C, H, W], normalised as the weights expect it. Gradients flow to ``output`` only.
        convs: the network.
        terms: what is compared, at which taps.
        sized: whether to compute the sizes of the targets too.
        target_gradient: whether gradients flow to ``target`` as well. Then only the network's passes are fused, and
            the maps at the taps are kept.

    Raises:
        ValueError: images of different shapes, or smaller than the poolings; no terms; an unknown tap or criterion.
    """
    if output.shape != target.shape:
        raise ValueError(f"the target must have the output's shape {list(output.shape)}, got {list(target.shape)}")
    check_taps({term.tap for term in terms}, convs, output.shape)
    if unknown := [term.criterion for term in terms if term.criterion not in CRITERIA]:
        raise ValueError(f"criterion must be one of {', '.join(CRITERIA)}, got {unknown[0]!r}")
    dtype = compute_dtype(output)
    if output.shape[0] == 0:
        zero = (output.sum() + (target.sum() if target_gradient else 0)).to(torch.promote_types(dtype, torch.float32))
        zeros = zero.expand(len(terms))
        return LossValues(zeros, torch.ones_like(zeros.detach()) if sized else zeros.detach()[:0])
    with without_slow_autocast(output):
        if target_gradient:
            maps = vgg_features(output, convs, {term.tap for term in terms})
            others = {term.tap for term in terms if compares_target(term)}
            return plain_values(maps, vgg_features(target, convs, others) if others else {}, terms, sized)
        return VGG_LOSS(output.to(dtype), target.detach().to(dtype), convs, terms, sized)


def plain_vgg_loss(
    output: Tensor, target: Tensor, convs: Sequence[FrozenConv], terms: Sequence[Term], sized: bool = False
) -> LossValues:
    """:func:`vgg_loss` out of plain PyTorch and the Gram loss, for autograd to differentiate."""
    maps = reference.vgg_features(output, convs, {term.tap for term in terms})
    taps = {term.tap for term in terms if compares_target(term)}
    with torch.no_grad():
        targets = reference.vgg_features(target, convs, taps) if taps else {}
    return plain_values(maps, targets, terms, sized)


class Problem(NamedTuple):
    """What is computed of the images, and how."""

    convs: Sequence[PackedConv]
    terms: Sequence[Term]
    sized: bool
    backend: str
    saves: bool  # whether a backward follows
    in_pieces: bool = False  # whether the values are computed from pieces, by ``ops.loss_terms``

    @property
    def passes(self) -> NativePasses:
        """The passes of the backend."""
        return PIECE_PASSES if self.in_pieces else PASSES[self.backend]

    @property
    def target_taps(self) -> list[Tap]:
        """Where the target's maps are needed."""
        return [term.tap for term in self.terms if compares_target(term)]

    @property
    def kept_taps(self) -> set[Tap]:
        """Where the output's maps are needed after the chain has passed them."""
        keeps_all = self.passes.keeps_maps and self.saves
        return {term.tap for term in self.terms if keeps_all or isinstance(term, GramTerm)}


class Tape(NamedTuple):
    """What the backward of the terms of some images needs."""

    layers: list[SavedLayer]
    taps: Mapping[Tap, SavedTap]


class Chunk:
    """Some images of the batch, whose terms are computed as the network's chain passes their taps."""

    def __init__(self, problem: Problem, images: int, wide: torch.dtype) -> None:
        self.problem, self.images, self.wide = problem, images, wide
        self.values: dict[int, Tensor] = {}  # by position among the terms
        self.sizes: dict[int, Tensor] = {}
        self.losses: Tensor | None = None  # of the Gram terms that sum squares
        self.targets: dict[int, Tensor] = {}  # the target's maps, or their Gram matrices
        self.saved = {term.tap: SavedTap(term.tap, [], [], []) for term in problem.terms}
        self.last_of_target = max((tap.place for tap in problem.target_taps), default=None)

    def forward(self, output: Tensor, target: Tensor) -> Tape:
        """Computes the terms. On a GPU the output and the target go as one batch, down to the last tap of both."""
        problem, passes = self.problem, self.problem.passes.passes
        images = len(output) if problem.saves else 0
        together = output.device.type == "cuda" and self.last_of_target is not None
        if self.last_of_target is not None and not together:
            content = {term.tap for term in problem.terms if isinstance(term, ContentTerm)}
            forward_chain(target, 0, problem.convs, Taps(self.visit_target, problem.target_taps, content), passes)
        batch = torch.cat([output, target]) if together else output
        taps = Taps(self.visit_both if together else self.visit, self.saved.keys(), problem.kept_taps)
        layers = forward_chain(batch, images, problem.convs, taps, passes)
        self.gram_terms()
        return Tape(layers, self.saved)

    def forward_pictures(self, pictures: Pictures) -> Tape:
        """The same of pictures that the first convolution normalises, as one batch; for problems in pieces."""
        pictures = pictures if self.last_of_target is not None else pictures._replace(target=None)
        images = len(pictures.output) if self.problem.saves else 0
        taps = Taps(self.visit_both, self.saved.keys(), self.problem.kept_taps)
        layers = forward_chain(pictures, images, self.problem.convs, taps, self.problem.passes.passes)
        self.gram_terms()
        return Tape(layers, self.saved)

    def terms_at(self, tap: Tap) -> list[tuple[int, Term]]:
        """The terms at ``tap`` and their positions."""
        return [(i, term) for i, term in enumerate(self.problem.terms) if term.tap == tap]

    def visit_target(self, tap: Tap, maps: Tensor) -> Tensor:
        """Takes what the terms at ``tap`` need of the target."""
        contents = 0
        for i, term in self.terms_at(tap):
            if isinstance(term, ContentTerm):
                self.targets[i] = maps.clone() if contents else maps  # the comparison may overwrite it
                contents += 1
            elif term.gram is None:
                self.targets[i] = reference.gram_matrix(maps)
        return maps

    def visit(self, tap: Tap, maps: Tensor) -> Tensor:
        """Computes the content terms at ``tap``, and keeps the output's maps if they are needed later."""
        problem = self.problem
        for i, term in self.terms_at(tap):
            if isinstance(term, ContentTerm):
                compared = problem.passes.compare(maps, self.targets.pop(i), term.criterion, problem.sized)
                self.values[i] = compared.value
                if compared.size is not None:
                    self.sizes[i] = compared.size
                if problem.saves:
                    self.saved[tap].contents.append(Content(i, term.criterion, compared.saved))
        if tap in problem.kept_taps:
            self.saved[tap].maps.append(maps)
        return maps

    def visit_both(self, tap: Tap, maps: Tensor) -> Tensor:
        """:meth:`visit` of a batch of output and, down to the last tap that needs it, target."""
        if len(maps) == self.images:
            return self.visit(tap, maps)
        own, rest = maps[: self.images], maps[self.images :]
        self.visit_target(tap, rest)
        self.visit(tap, own)
        saved = self.saved[tap]
        if saved.maps and not saved.contents:  # else the target's would be kept with it
            saved.maps[0] = own.clone(memory_format=torch.channels_last)
        return own if tap.place == self.last_of_target else maps

    def gram_terms(self) -> None:
        """Computes the Gram terms: those that sum squares in one call."""
        grams = [(i, term) for i, term in enumerate(self.problem.terms) if isinstance(term, GramTerm)]
        squares = [(i, term) for i, term in grams if term.criterion == "l2"]
        for group in (squares, *([entry] for entry in grams if entry not in squares)):
            if not group:
                continue
            maps = [self.saved[term.tap].maps[0] for _, term in group]
            targets = [self.gram_of_target(i, term, maps[0].device) for i, term in group]
            is_square = group is squares
            backend = gram_backend(maps, targets, self.problem.backend) if is_square else "native"
            backend = "triton" if self.problem.in_pieces else backend
            losses, scales, *deltas = torch.ops.fastperc.gram_loss_fwd(maps, targets, backend)
            self.losses = losses if is_square else self.losses
            for k, (i, term) in enumerate(group):
                self.values[i] = losses[k]
                if not is_square:
                    self.values[i] = gram_size(deltas[k], term.criterion)
                    slopes_(deltas[k], term.criterion).div_(2)
                self.saved[term.tap].styles.append(Style(deltas[k], scales[k : k + 1], i, backend))
        if not self.problem.saves:
            self.saved.clear()

    def loss_values(self) -> LossValues:
        """The values of all terms, and the sizes if they are asked for."""
        values = torch.stack([self.values[i].to(self.wide) for i in range(len(self.problem.terms))])
        if not self.problem.sized:
            return LossValues(values, values.new_empty(0))
        one = None if len(self.sizes) == len(values) else values.new_ones(())
        sizes = [self.sizes.get(i, one) for i in range(len(values))]
        return LossValues(values, torch.stack([size.to(self.wide) for size in sizes if size is not None]))

    def gram_of_target(self, i: int, term: GramTerm, device: torch.device) -> Tensor:
        """The Gram matrix that term ``i`` compares with."""
        if term.gram is not None:
            return term.gram.to(device, self.wide)
        gram = self.targets.pop(i)
        if self.problem.sized:
            self.sizes[i] = gram_size(gram, term.criterion)
        return gram


def run(output: Tensor, target: Tensor, problem: Problem) -> tuple[LossValues, list[Tape]]:
    """The values, and what their backward needs: a tape for each of the batch's chunks."""
    wide = torch.promote_types(output.dtype, torch.float32)
    tapes, sums = [], LossValues(output.new_empty(0), output.new_empty(0))
    with backends.on_device(output):
        for i, images in enumerate(chunks(output, IMAGES_ON_CPU)):
            own = output[images]
            chunk, share = Chunk(problem, len(own), wide), len(own) / len(output)
            tape = chunk.forward(own, target[images])
            values = chunk.loss_values()
            if i == 0:
                sums = values if share == 1 else LossValues(*(share * x for x in values))
            else:
                for x, y in zip(sums, values):
                    x.add_(y, alpha=share)
            if problem.saves:
                tapes.append(tape)
            del chunk, tape
    if output.device.type == "cuda":
        sums.values.add_(output.sum(dtype=wide), alpha=0)  # keeps NaN, which cuDNN's ReLU may drop
    return sums, tapes


def gram_backend(features: Sequence[Tensor], targets: Sequence[Tensor], backend: str) -> str:
    """The Gram loss's own choice, if it leaves Δ in a form that the passes of ``backend`` read."""
    try:
        with torch.enable_grad():
            name = GRAM_LOSS.choose([x.detach().requires_grad_() for x in features], targets).name
    except CannotServe:  # use_backend("triton") with float32 features
        return "native"
    return "triton" if name == backend == "triton" else "native"


class _VGGLoss(torch.autograd.Function):
    """The first backward frees what the forward has saved, on the way; a further one runs the forward again."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, target: Tensor, problem: Problem) -> Any:
        values, ctx.tapes = run(output, target, problem)
        ctx.problem = problem
        ctx.save_for_backward(output, target)
        ctx.mark_non_differentiable(values.sizes)
        return tuple(values)

    @staticmethod
    def backward(ctx: Any, grads: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        output, target = ctx.saved_tensors
        problem = ctx.problem
        if torch.is_grad_enabled():  # to be differentiated again
            values, _ = plain_vgg_loss(output, target, problem.convs, problem.terms)
            return torch.autograd.grad(values, output, grads, create_graph=True)[0], None, None
        tapes, ctx.tapes = ctx.tapes, None
        if tapes is None:
            tapes = run(output, target, problem)[1]
        slices = chunks(output, IMAGES_ON_CPU)
        grad = torch.empty_like(output) if len(slices) > 1 else None
        with backends.on_device(output), torch.autocast(output.device.type, enabled=False):
            for images in reversed(slices):
                tape, share = tapes.pop(), len(output[images]) / len(output)
                functions = tap_gradients(problem.passes, tape, grads if share == 1 else share * grads)
                gradient = backward_chain(tape.layers, problem.convs, functions, problem.passes.passes)
                if grad is None:
                    return torch.zeros_like(output) if gradient is None else gradient, None, None
                grad[images] = 0 if gradient is None else gradient
                del tape, functions, gradient
        return grad, None, None


def tap_gradients(
    passes: NativePasses, tape: Tape, grads: Any
) -> dict[Tap, Callable[[SavedLayer, Tensor | None], Tensor]]:
    """The gradients of the terms at the taps, for :func:`backward_chain`."""
    return {tap: partial(passes.tap_gradient, saved, grads) for tap, saved in tape.taps.items()}


# The operation


def _fused(backend: str) -> Implementation:
    def why_not(
        output: Tensor, target: Tensor, convs: Sequence[FrozenConv], terms: Sequence[Term], sized: bool = False
    ) -> str | None:
        return why_not_fused(output, convs, backend)

    def run(
        output: Tensor, target: Tensor, convs: Sequence[FrozenConv], terms: Sequence[Term], sized: bool = False
    ) -> LossValues:
        saves = output.requires_grad and torch.is_grad_enabled()
        with torch.autocast(output.device.type, enabled=False):
            packed = packed_down_to([term.tap for term in terms], convs, output.dtype)
            return LossValues(*_VGGLoss.apply(output, target, Problem(packed, terms, sized, backend, saves)))

    return Implementation(backend, run, why_not)


def _tuned_loss(images: Tensor) -> tuple[Any, ...]:
    grams = ((1, 64), (3, 128))
    terms = [
        ContentTerm(Tap(3)),
        *(GramTerm(Tap(i), gram=images.new_zeros(1, c, c, dtype=torch.float32)) for i, c in grams),
    ]
    return images, images.detach().flip(3), random_convs(images.detach()), terms


VGG_LOSS = register(
    Operation(
        "vgg_loss",
        "Loss network",
        (_fused("triton"), _fused("native"), Implementation("reference", plain_vgg_loss)),
        TuningCases(lambda batch, size: [((batch, 3, size, size),)], _tuned_loss),
        (
            *SOURCES,
            *GRAM_LOSS.sources,
            "fastperc/ops/vgg_terms.py",
            "fastperc/ops/vgg_loss.py",
            "fastperc/ops/loss_terms.py",
            "kernels/loss_terms.py",
        ),
    )
)
