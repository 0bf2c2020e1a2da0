"""The weighted terms of a perceptual loss, content, style and total variation, and their sum, as Triton kernels.

The same as ``ops.vgg_loss`` and ``ops.tv_loss`` and what weighs their results, with few launches: the pictures are
normalised as the first convolution loads them, one program computes all terms, and the kernels of the gradients take
the weights' factors from memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastperc import _native, backends, kernels, reference
from fastperc.backends import CannotServe
from fastperc.ops.common import compute_dtype, why_not_here
from fastperc.ops.vgg_chain import Pictures, backward_chain
from fastperc.ops.vgg_features import packed_down_to
from fastperc.ops.vgg_loss import VGG_LOSS, Chunk, Problem, Tape, plain_vgg_loss, tap_gradients
from fastperc.ops.vgg_terms import ContentTerm, GramTerm, Term, check_taps, shape_at
from fastperc.types import FrozenConv


class LossTerms(NamedTuple):
    """A perceptual loss: what it compares, and how its terms are weighed."""

    convs: Sequence[FrozenConv]  # the loss network
    mean: Tensor  # [1, 3, 1, 1]: pictures in 0–1 less this, over ``std``, are what the network sees
    std: Tensor  # [1, 3, 1, 1]
    terms: Sequence[Term]  # a content term or none, then the Gram terms
    content_weight: float
    style_weight: float
    layer_weights: Tensor | None  # [Gram terms] float32, which ``style_weight`` multiplies
    tv_weight: float  # of the sum of squares
    relative: bool  # whether the content term is over that of its target against zeros

    @property
    def contents(self) -> int:
        """How many content terms there are."""
        return sum(isinstance(term, ContentTerm) for term in self.terms)


def why_not_loss_terms(output: Tensor, target: Tensor, loss: LossTerms) -> str | None:
    """Why :func:`loss_terms` cannot serve ``loss``, or ``None``."""
    if reason := why_not_here() or backends.why_not_triton(output):
        return reason
    dtype, grams = compute_dtype(output), loss.terms[loss.contents :]
    if dtype not in (torch.float16, torch.bfloat16):
        return "products in float32 are left to the library"
    if output.shape != target.shape or output.shape[1] != 3 or len(output) == 0:
        return "the pictures differ in shape, or there are none"
    if loss.contents > 1 or not loss.terms or len({term.tap for term in grams}) < len(grams):
        return "there are several terms of a kind at a layer"
    if any(not isinstance(term, GramTerm) or term.gram is None or term.criterion != "l2" for term in grams):
        return "a Gram term has a kernel for squares only, against a matrix"
    constants = [loss.mean, loss.std, *([] if loss.layer_weights is None else [loss.layer_weights])]
    if any(t.dtype != torch.float32 or t.device != output.device for t in constants):
        return "the statistics have another dtype or device"
    with torch.autocast(output.device.type, enabled=False):
        pictures = torch.empty_like(output, dtype=dtype).requires_grad_(output.requires_grad)
        try:
            chosen = VGG_LOSS.choose(pictures, pictures.detach(), loss.convs, loss.terms, loss.relative).name
        except CannotServe as error:
            return str(error)
    return None if chosen == "triton" else "another backend runs the loss network"


def loss_terms(output: Tensor, target: Tensor, loss: LossTerms) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The total, the content, the style and the total variation term, weighted; float32 scalars.

    Args:
        output, target: RGB in 0–1 [N, 3, H, W]. Gradients flow to ``output`` only.
        loss: one that :func:`why_not_loss_terms` has nothing against.

    Raises:
        ValueError: pictures smaller than the poolings.
    """
    check_taps({term.tap for term in loss.terms}, loss.convs, output.shape)
    dtype = compute_dtype(output)
    saves = output.requires_grad and torch.is_grad_enabled()
    with torch.autocast(output.device.type, enabled=False):
        packed = packed_down_to([term.tap for term in loss.terms], loss.convs, dtype)
        problem = Problem(packed, loss.terms, False, "triton", saves, in_pieces=True)
        return _LossTerms.apply(output, target.detach(), loss, problem)


def plain_loss_terms(output: Tensor, target: Tensor, loss: LossTerms) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`loss_terms` in plain PyTorch, for autograd to differentiate."""
    seen, seen_target = ((x - loss.mean) / loss.std for x in (output, target))
    wide = torch.promote_types(output.dtype, torch.float32)
    convs = [conv._replace(weight=conv.weight.to(wide), bias=conv.bias.to(wide)) for conv in loss.convs]
    values, sizes = plain_vgg_loss(seen, seen_target, convs, loss.terms, loss.relative)
    tv = loss.tv_weight * reference.tv_loss(output)
    content, style = tv * 0, tv * 0
    if loss.contents:
        content = loss.content_weight * (values[0] / sizes[0] if loss.relative else values[0])
    if loss.layer_weights is not None:
        style = loss.style_weight * (values[loss.contents :] * loss.layer_weights).sum()
    return content + style + tv, content, style, tv


def _run(output: Tensor, target: Tensor, loss: LossTerms, problem: Problem) -> tuple[Tensor, Tensor, Tape]:
    """The terms, the factors of their gradients, and what the backward of the network needs."""
    module = kernels.loss_terms
    pictures = Pictures(output, target, loss.mean, loss.std, problem.convs[0].weight.dtype)
    with backends.on_device(output):
        chunk = Chunk(problem, len(output), torch.float32)
        tape = chunk.forward_pictures(pictures)
        count = 0
        if loss.contents:
            n, c, h, w = shape_at(loss.terms[0].tap, loss.convs, output.shape)
            count = n * c * h * w
        tv = kernels.tv_loss.tv_loss_fwd(output, "l2", _native.is_channels_last(output))
        content = chunk.values[0] if loss.contents else None
        pieces = module.Pieces(content, count, chunk.losses, loss.layer_weights, tv)
        weights = module.Weights(loss.content_weight, loss.style_weight, loss.tv_weight, loss.relative)
        return *module.loss_terms(pieces, weights), tape


class _LossTerms(torch.autograd.Function):
    """The first backward frees what the forward has saved, on the way; a further one runs the forward again."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, target: Tensor, loss: LossTerms, problem: Problem) -> Any:
        terms, ctx.factors, ctx.tape = _run(output, target, loss, problem)
        ctx.loss, ctx.problem = loss, problem
        ctx.save_for_backward(output, target)
        ctx.set_materialize_grads(False)
        return terms[0], terms[1], terms[2], terms[3]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        output, target = ctx.saved_tensors
        loss, problem = ctx.loss, ctx.problem
        if torch.is_grad_enabled():  # to be differentiated again
            given = {i: grad for i, grad in enumerate(grads) if grad is not None}
            terms = plain_loss_terms(output, target, loss)
            grad = torch.autograd.grad([terms[i] for i in given], output, list(given.values()), create_graph=True)[0]
            return grad, None, None, None
        tape, ctx.tape = ctx.tape, None
        with backends.on_device(output), torch.autocast(output.device.type, enabled=False):
            if tape is None:
                tape = _run(output, target, loss, problem)[2]
            return _gradient(output, loss, problem, ctx.factors, tape, grads), None, None, None


def _gradient(
    output: Tensor, loss: LossTerms, problem: Problem, factors: Tensor, tape: Tape, grads: Sequence[Tensor | None]
) -> Tensor:
    """The gradient of ``output`` from those of the four terms, each of which may be missing."""
    module, tv_loss = kernels.loss_terms, kernels.tv_loss
    content, style, tv = (_added(grads[0], grad) for grad in grads[1:])
    of_terms: list[tuple[Tensor, Tensor] | None] = [None] * len(loss.terms)
    for i in range(len(loss.terms)):
        grad, place = (content, module.CONTENT) if i < loss.contents else (style, module.GRAMS + i - loss.contents)
        of_terms[i] = None if grad is None else (grad, factors[place])
    addend = None
    nhwc = _native.is_channels_last(output)
    layout = torch.channels_last if nhwc else torch.contiguous_format
    if any(entry is not None for entry in of_terms):
        functions = tap_gradients(problem.passes, tape, of_terms)
        above = backward_chain(tape.layers, problem.convs, functions, problem.passes.passes)
        assert above is not None
        addend = tv_loss.Addend(above.contiguous(memory_format=layout), loss.std)
    grad_output = torch.empty_like(output, memory_format=layout)
    tv_loss.tv_loss_bwd(output, tv, grad_output, "l2", nhwc, factors[module.TV], addend)
    return grad_output


def _added(total: Tensor | None, own: Tensor | None) -> Tensor | None:
    """The gradient of a term, from that of the total and its own."""
    if total is None or own is None:
        return own if total is None else total
    return total + own
