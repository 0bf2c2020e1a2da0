"""VGG-16 as a fixed loss network: its features, and the content and style terms of an image under it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastperc import _native, backends, reference
from fastperc.backends import CannotServe, Implementation, Operation, TuningCases, register
from fastperc.ops.common import COMMON_CPP_SOURCES, compute_dtype, without_slow_autocast
from fastperc.ops.gram_loss import GRAM_LOSS, gram_loss
from fastperc.ops.vgg_chain import (
    VGG_CONV,
    PackedConv,
    Passes,
    SavedLayer,
    backward_chain,
    forward_chain,
    pack,
    unpool,
)
from fastperc.ops.vgg_passes import NativePasses, Style, Tap, TritonPasses
from fastperc.types import FrozenConv


class Terms(NamedTuple):
    """What :func:`vgg_loss` returns; float32, or float64 for float64."""

    content: Tensor  # scalar: mean of (features − target)²
    style: Tensor  # [layers]: ‖G − target‖²_F of each, averaged over the batch
    target_square: Tensor  # scalar: mean of target², without a gradient


def vgg_features(x: Tensor, convs: Sequence[FrozenConv], taps: Collection[int]) -> dict[int, Tensor]:
    """The activations of the convolutions numbered ``taps``, as :func:`fastperc.reference.vgg_features` gives them.

    Args:
        x: [N, C, H, W], normalised as the weights expect it.
        convs: the network. Gradients flow to ``x`` only.
        taps: indices into ``convs``.
    """
    dtype = compute_dtype(x)
    with without_slow_autocast(x):
        return VGG_FEATURES(x.to(dtype), convs, taps)


def vgg_loss(
    output: Tensor,
    content: Tensor,
    convs: Sequence[FrozenConv],
    content_layer: int,
    grams: Mapping[int, Tensor],
) -> Terms:
    """The content and style terms of ``output`` (paper, equations 2 and 4).

    Args:
        output, content: [N, C, H, W], normalised as the weights expect it. Gradients flow to ``output`` only.
        convs: the network.
        content_layer: index into ``convs`` of the layer where ``output`` is compared with ``content``.
        grams: the style's Gram matrices [1, C, C], by index into ``convs``.

    Raises:
        ValueError: images of different shapes.
    """
    if output.shape != content.shape:
        raise ValueError(f"content must have the output's shape {list(output.shape)}, got {list(content.shape)}")
    dtype = compute_dtype(output)
    with without_slow_autocast(output):
        return VGG_LOSS(output.to(dtype), content.detach().to(dtype), convs, content_layer, grams)


def plain_vgg_loss(
    output: Tensor, content: Tensor, convs: Sequence[FrozenConv], content_layer: int, grams: Mapping[int, Tensor]
) -> Terms:
    """:func:`vgg_loss` out of plain PyTorch and the Gram loss, for autograd to differentiate."""
    features = reference.vgg_features(output, convs, {content_layer, *grams})
    with torch.no_grad():
        target = reference.vgg_features(content, convs, {content_layer})[content_layer]
    layers = list(grams)
    style = gram_loss([features[layer] for layer in layers], list(grams.values())) if layers else output.new_zeros(0)
    square = reference.widen(target).square().mean()
    return Terms(reference.feature_loss(features[content_layer], target), style, square)


# Why a backend cannot serve


def _why_not_fused(x: Tensor, convs: Sequence[FrozenConv], deepest: int) -> str | None:
    if torch.compiler.is_compiling():
        return "torch.compile fuses plain PyTorch itself"
    if any(conv.weight.requires_grad or conv.bias.requires_grad for conv in convs):
        return "the loss network's weights want gradients"
    if x.shape[0] == 0:
        return "the batch is empty"
    if min(x.shape[2:]) >> sum(conv.pooled for conv in convs[: 1 + deepest]) == 0:
        return "the image is smaller than the poolings"
    return None


def _why_not_triton(x: Tensor, convs: Sequence[FrozenConv]) -> str | None:
    if any(conv.bias.shape[0] not in (16, 32) and conv.bias.shape[0] % 64 for conv in convs):
        return "its blocks are of 16, 32 or 64 channels"
    return backends.why_not_triton(x)


def _why_not_native(x: Tensor, convs: Sequence[FrozenConv]) -> str | None:
    return _native.why_not(x) if x.device.type == "cpu" else f"no C++ kernel for {x.device.type} tensors"


WHY_NOT = {"triton": _why_not_triton, "native": _why_not_native}
PASSES = {"triton": TritonPasses(), "native": NativePasses()}


def chunks(x: Tensor) -> list[slice]:
    """The images that go through the chain together: on a GPU all of them, on a CPU one."""
    step = len(x) if x.device.type == "cuda" else 1
    return [slice(i, i + step) for i in range(0, len(x), step)]


class _VGGFeatures(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, convs: Sequence[PackedConv], taps: Sequence[int], backend: str) -> Any:
        with backends.on_device(x):
            layers, _ = forward_chain(x, len(x), convs, taps, -1, PASSES[backend].passes)
        features = tuple(layers[i].features for i in taps)
        ctx.layers = [layer._replace(features=None) for layer in layers]  # autograd keeps the outputs
        ctx.save_for_backward(x, *features)
        ctx.convs, ctx.taps, ctx.backend = convs, taps, backend
        ctx.set_materialize_grads(False)
        return features

    @staticmethod
    def backward(ctx: Any, *grad_features: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *features = ctx.saved_tensors
        given = {i: grad for i, grad in zip(ctx.taps, grad_features) if grad is not None}
        if torch.is_grad_enabled():  # to be differentiated again
            again = reference.vgg_features(x, ctx.convs, ctx.taps)
            outputs = [again[i] for i in given]
            return torch.autograd.grad(outputs, x, list(given.values()), create_graph=True)[0], None, None, None
        passes = PASSES[ctx.backend].passes
        layers = list(ctx.layers)
        for i, kept in zip(ctx.taps, features):
            layers[i] = layers[i]._replace(features=kept)

        def tap_gradient(i: int, features: Tensor, layer: SavedLayer, above: Tensor | None) -> Tensor:
            if above is not None and layer.winners is not None:
                above = unpool(above, layer, passes)
            if above is None:
                total = given.get(i, torch.zeros_like(features))
            else:
                total = above.add_(given[i]) if i in given else above
            return torch.ops.aten.threshold_backward(total, features, 0)

        with backends.on_device(x), torch.autocast(x.device.type, enabled=False):
            return backward_chain(layers, ctx.convs, tap_gradient, passes), None, None, None


class Tape(NamedTuple):
    """What the backward of the terms of some images needs."""

    layers: list[SavedLayer]
    target: list[Tensor]  # the content's activations at the content layer; emptied by their use
    style: dict[int, Style]
    content_layer: int


def forward_both(
    output: Tensor,
    content: Tensor,
    convs: Sequence[PackedConv],
    taps: Collection[int],
    content_layer: int,
    passes: Passes,
) -> tuple[list[SavedLayer], Tensor]:
    """The layers of ``output``, and the activations of ``content`` at its layer; on a GPU both go as one batch."""
    if output.device.type == "cuda":
        return forward_chain(torch.cat([output, content]), len(output), convs, taps, content_layer, passes)
    _, target = forward_chain(content, 0, convs[: content_layer + 1], (), content_layer, passes)
    layers, _ = forward_chain(output, len(output), convs, taps, -1, passes)
    return layers, target


def run(
    output: Tensor,
    content: Tensor,
    convs: Sequence[PackedConv],
    content_layer: int,
    grams: Mapping[int, Tensor],
    backend: str,
) -> tuple[Terms, list[Tape]]:
    """The terms, and what their backward needs: a tape for each of :func:`chunks`."""
    passes = PASSES[backend]
    wide = torch.promote_types(output.dtype, torch.float32)
    targets = [gram.to(output.device, wide) for gram in grams.values()]
    sums = Terms(*(output.new_zeros(size, dtype=wide) for size in ((), (len(grams),), ())))
    if output.device.type == "cuda":
        sums.content.copy_(0 * output.sum(dtype=wide))  # keeps NaN, which cuDNN's ReLU may drop
    tapes = []
    with backends.on_device(output):
        for images in chunks(output):
            taps = {content_layer, *grams}
            layers, target = forward_both(output[images], content[images], convs, taps, content_layer, passes.passes)
            share = len(target) / len(output)
            kept = {i: layer.features for i, layer in enumerate(layers) if layer.features is not None}
            difference, square = passes.compare(kept[content_layer], target)
            sums.content.add_(difference, alpha=share)
            sums.target_square.add_(square, alpha=share)
            style = {}
            if grams:
                features = [kept[i] for i in grams]
                gram_backend = _gram_backend(features, targets, backend)
                losses, scales, *deltas = torch.ops.fastperc.gram_loss_fwd(features, targets, gram_backend)
                sums.style.add_(losses, alpha=share)
                for position, (i, delta) in enumerate(zip(grams, deltas)):
                    style[i] = Style(delta, scales[position : position + 1], position, gram_backend)
            tapes.append(Tape(layers, [target], style, content_layer))
    return sums, tapes


def _gram_backend(features: Sequence[Tensor], targets: Sequence[Tensor], backend: str) -> str:
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
    def forward(
        ctx: Any,
        output: Tensor,
        content: Tensor,
        convs: Sequence[PackedConv],
        content_layer: int,
        grams: Mapping[int, Tensor],
        backend: str,
    ) -> Any:
        ctx.arguments = convs, content_layer, grams, backend
        terms, tapes = run(output, content, *ctx.arguments)
        ctx.tapes = tapes if ctx.needs_input_grad[0] else None
        ctx.save_for_backward(output, content)
        ctx.mark_non_differentiable(terms.target_square)
        return tuple(terms)

    @staticmethod
    def backward(ctx: Any, grad_content: Tensor, grad_style: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        output, content = ctx.saved_tensors
        convs, content_layer, grams, backend = ctx.arguments
        if torch.is_grad_enabled():  # to be differentiated again
            terms = plain_vgg_loss(output, content, convs, content_layer, grams)
            total = terms.content * grad_content + (terms.style * grad_style).sum()
            return torch.autograd.grad(total, output, create_graph=True)[0], *(None,) * 5
        tapes, ctx.tapes = ctx.tapes, None
        if tapes is None:
            tapes = run(output, content, *ctx.arguments)[1]
        grad = torch.empty_like(output)
        passes = PASSES[backend]
        with backends.on_device(output), torch.autocast(output.device.type, enabled=False):
            for images in reversed(chunks(output)):
                share = len(output[images]) / len(output)
                tape = tapes.pop()
                gradient = _tap_gradient(passes, tape, share * grad_content, share * grad_style)
                grad[images] = backward_chain(tape.layers, convs, gradient, passes.passes)
                del tape, gradient
        return grad, *(None,) * 5


def _tap_gradient(
    passes: NativePasses, tape: Tape, grad_content: Tensor, grad_style: Tensor
) -> Callable[[int, Tensor, SavedLayer, Tensor | None], Tensor]:
    """The gradients of the terms at the taps, for :func:`backward_chain`."""

    def gradient(i: int, features: Tensor, layer: SavedLayer, above: Tensor | None) -> Tensor:
        target = tape.target.pop() if i == tape.content_layer else None
        style = tape.style.get(i)
        grad = None if style is None else grad_style[style.position]
        return passes.tap_gradient(features, layer, above, Tap(style, grad, target, grad_content))

    return gradient


# The operations


def _fused_features(backend: str) -> Implementation:
    def why_not(x: Tensor, convs: Sequence[FrozenConv], taps: Collection[int]) -> str | None:
        return _why_not_fused(x, convs, max(taps)) or WHY_NOT[backend](x, convs)

    def run(x: Tensor, convs: Sequence[FrozenConv], taps: Collection[int]) -> dict[int, Tensor]:
        ordered = sorted(taps)
        with torch.autocast(x.device.type, enabled=False):
            packed = [pack(conv, x.dtype) for conv in convs[: 1 + ordered[-1]]]
            features = _VGGFeatures.apply(x, packed, ordered, backend)
        return dict(zip(ordered, features))

    return Implementation(backend, run, why_not)


def _fused_loss(backend: str) -> Implementation:
    def why_not(
        output: Tensor, content: Tensor, convs: Sequence[FrozenConv], content_layer: int, grams: Mapping[int, Tensor]
    ) -> str | None:
        return _why_not_fused(output, convs, max(content_layer, *grams, 0)) or WHY_NOT[backend](output, convs)

    def run(
        output: Tensor, content: Tensor, convs: Sequence[FrozenConv], content_layer: int, grams: Mapping[int, Tensor]
    ) -> Terms:
        with torch.autocast(output.device.type, enabled=False):
            packed = [pack(conv, output.dtype) for conv in convs[: 1 + max(content_layer, *grams, 0)]]
            return Terms(*_VGGLoss.apply(output, content, packed, content_layer, dict(grams), backend))

    return Implementation(backend, run, why_not)


def _random_convs(images: Tensor) -> list[FrozenConv]:
    """VGG-16's convolutions up to relu2_2: the deeper ones are alike on all backends."""
    return [
        FrozenConv(
            images.new_empty(c_out, c_in, 3, 3).normal_(std=(2 / (9 * c_in)) ** 0.5), images.new_zeros(c_out), i == 2
        )
        for i, (c_in, c_out) in enumerate(pairwise((3, 64, 64, 128, 128)))
    ]


def _tuned_loss(images: Tensor) -> tuple[Any, ...]:
    grams = {i: images.new_zeros(1, c, c, dtype=torch.float32) for i, c in ((1, 64), (3, 128))}
    return images, images.detach().flip(3), _random_convs(images.detach()), 3, grams


SOURCES = (
    *COMMON_CPP_SOURCES,
    *VGG_CONV.sources,
    "csrc/vgg_loss*",
    "kernels/vgg_loss.py",
    "fastperc/ops/vgg_passes.py",
    "fastperc/ops/vgg_loss.py",
)

VGG_FEATURES = register(
    Operation(
        "vgg_features",
        "Loss network's features",
        (_fused_features("triton"), _fused_features("native"), Implementation("reference", reference.vgg_features)),
        TuningCases(
            lambda batch, size: [((batch, 3, size, size),)],
            lambda images: (images, _random_convs(images.detach()), (1, 3)),
        ),
        SOURCES,
    )
)

VGG_LOSS = register(
    Operation(
        "vgg_loss",
        "Loss network",
        (_fused_loss("triton"), _fused_loss("native"), Implementation("reference", plain_vgg_loss)),
        TuningCases(lambda batch, size: [((batch, 3, size, size),)], _tuned_loss),
        (*SOURCES, *GRAM_LOSS.sources),
    )
)
