"""VGG-16 as a fixed loss network: its features, and the content and style terms of an image under it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastperc import _native, backends, reference
from fastperc.ops.frozen import compute_dtype
from fastperc.ops.gram_loss import gram_loss
from fastperc.ops.gram_loss import triton_unsupported as gram_loss_by_triton
from fastperc.ops.vgg_chain import Layer, Packed, backward_chain, forward_chain, kernels_of, pack, unpool
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
        convs: the network. Gradients flow to ``x`` alone.
        taps: indices into ``convs``.
    """
    x = x.to(compute_dtype(x))
    backend = choose(x, convs, taps)
    if backend == "reference":
        return reference.vgg_features(x, convs, taps)
    ordered = sorted(taps)
    with torch.autocast(x.device.type, enabled=False):
        packed = [pack(conv, x.dtype) for conv in convs[: 1 + ordered[-1]]]
        features = _VGGFeatures.apply(x, packed, ordered, backend)
    return dict(zip(ordered, features))


def vgg_loss(
    output: Tensor,
    content: Tensor,
    convs: Sequence[FrozenConv],
    content_layer: int,
    grams: Mapping[int, Tensor],
) -> Terms:
    """The content and style terms of ``output`` (paper, equations 2 and 4).

    Args:
        output, content: [N, C, H, W], normalised as the weights expect it. Gradients flow to ``output`` alone.
        convs: the network.
        content_layer: index into ``convs`` of the layer where ``output`` is to resemble ``content``.
        grams: the style's Gram matrices [1, C, C], by index into ``convs``.

    Raises:
        ValueError: images of different shapes.
    """
    if output.shape != content.shape:
        raise ValueError(f"content must have the output's shape {list(output.shape)}, got {list(content.shape)}")
    dtype = compute_dtype(output)
    output, content = output.to(dtype), content.detach().to(dtype)
    backend = choose(output, convs, {content_layer, *grams})
    if backend == "reference":
        return composed(output, content, convs, content_layer, grams)
    with torch.autocast(output.device.type, enabled=False):
        packed = [pack(conv, dtype) for conv in convs[: 1 + max(content_layer, *grams, 0)]]
        return Terms(*_VGGLoss.apply(output, content, packed, content_layer, dict(grams), backend))


def composed(
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


def choose(x: Tensor, convs: Sequence[FrozenConv], taps: Collection[int]) -> str:
    """The backend for images ``x``: plain PyTorch where autograd or the compiler must see inside."""
    obstacle = None
    if torch.compiler.is_compiling():
        obstacle = "torch.compile fuses plain PyTorch itself"
    elif any(conv.weight.requires_grad or conv.bias.requires_grad for conv in convs):
        obstacle = "the loss network's weights want gradients"
    elif x.shape[0] == 0:
        obstacle = "the batch is empty"
    elif min(x.shape[2:]) >> sum(conv.pooled for conv in convs[: 1 + max(taps)]) == 0:
        obstacle = "the image is smaller than the poolings"
    return backends.choose(
        "vgg_loss",
        x,
        triton=obstacle or triton_obstacle(x, convs),
        native=obstacle or native_unsupported(x),
    )


def triton_obstacle(x: Tensor, convs: Sequence[FrozenConv]) -> str | None:
    """Why the Triton kernels cannot take images like ``x``, or ``None`` if they can."""
    if any(conv.bias.shape[0] not in (16, 32) and conv.bias.shape[0] % 64 for conv in convs):
        return "its blocks are of 16, 32 or 64 channels"
    return backends.triton_unsupported(x)


def native_unsupported(x: Tensor) -> str | None:
    """Why the C++ kernels cannot take images like ``x``, or ``None`` if they can."""
    return _native.unsupported(x) if x.device.type == "cpu" else f"no C++ kernel for {x.device.type} tensors"


def chunks(x: Tensor) -> list[slice]:
    """The images to take through the chain together: on a GPU all of them; on a CPU, where one is work enough, one."""
    step = len(x) if x.device.type == "cuda" else 1
    return [slice(i, i + step) for i in range(0, len(x), step)]


class _VGGFeatures(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, convs: Sequence[Packed], taps: Sequence[int], backend: str) -> Any:
        with backends.on_device(x):
            layers, _ = forward_chain(x, len(x), convs, taps, -1, kernels_of(backend))
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
        kernels = kernels_of(ctx.backend)
        layers = list(ctx.layers)
        for i, kept in zip(ctx.taps, features):
            layers[i] = layers[i]._replace(features=kept)

        def tap_grad(i: int, features: Tensor, layer: Layer, above: Tensor | None) -> Tensor:
            if above is not None and layer.winners is not None:
                above = unpool(above, layer, kernels)
            if above is None:
                total = given.get(i, torch.zeros_like(features))
            else:
                total = above.add_(given[i]) if i in given else above
            return torch.ops.aten.threshold_backward(total, features, 0)

        with backends.on_device(x):
            return backward_chain(layers, ctx.convs, tap_grad, kernels), None, None, None


class Style(NamedTuple):
    """What the backward of one layer's style term needs; see :func:`fastperc.ops.gram_loss.gram_loss_fwd`."""

    delta: Tensor
    scale: Tensor  # [1]
    place: int  # among the style's layers
    backend: str


class Tape(NamedTuple):
    """What the backward of the terms of some images needs."""

    layers: list[Layer]
    target: list[Tensor]  # the content's activations at the content layer; gone once used
    style: dict[int, Style]


def forward_both(
    output: Tensor, content: Tensor, convs: Sequence[Packed], taps: Collection[int], content_layer: int, kernels: Any
) -> tuple[list[Layer], Tensor]:
    """The layers of ``output``, and ``content`` as it is at its layer: as one batch where that fills a GPU."""
    if output.device.type == "cuda":
        return forward_chain(torch.cat([output, content]), len(output), convs, taps, content_layer, kernels)
    _, target = forward_chain(content, 0, convs[: content_layer + 1], (), content_layer, kernels)
    layers, _ = forward_chain(output, len(output), convs, taps, -1, kernels)
    return layers, target


def run(
    output: Tensor,
    content: Tensor,
    convs: Sequence[Packed],
    content_layer: int,
    grams: Mapping[int, Tensor],
    backend: str,
) -> tuple[Terms, list[Tape]]:
    """The terms and, image by image or for all at once, what their backward needs."""
    kernels = kernels_of(backend)
    gram_backend = "triton" if backend == "triton" and gram_loss_by_triton(output) is None else "native"
    wide = torch.promote_types(output.dtype, torch.float32)
    targets = [gram.to(output.device, wide) for gram in grams.values()]
    sums = Terms(*(output.new_zeros(size, dtype=wide) for size in ((), (len(grams),), ())))
    if output.device.type == "cuda":
        sums.content.copy_(0 * output.sum(dtype=wide))  # NaN stays visible, whatever cuDNN's ReLU makes of it
    tapes = []
    with backends.on_device(output):
        for images in chunks(output):
            taps = {content_layer, *grams}
            layers, target = forward_both(output[images], content[images], convs, taps, content_layer, kernels)
            share = len(target) / len(output)
            kept = {i: layer.features for i, layer in enumerate(layers) if layer.features is not None}
            difference, square = compare(kept[content_layer], target, backend)
            sums.content.add_(difference, alpha=share)
            sums.target_square.add_(square, alpha=share)
            style = {}
            if grams:
                features = [kept[i] for i in grams]
                losses, scales, *deltas = torch.ops.fastperc.gram_loss_fwd(features, targets, gram_backend)
                sums.style.add_(losses, alpha=share)
                for place, (i, delta) in enumerate(zip(grams, deltas)):
                    style[i] = Style(delta, scales[place : place + 1], place, gram_backend)
            tapes.append(Tape(layers, [target], style))
    return sums, tapes


def compare(features: Tensor, target: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """The means of (features − target)² and of target²."""
    if backend == "triton":
        difference, square = kernels_of(backend).content_fwd(features, target) / target.numel()
        return difference, square
    features, target = reference.widen(features), reference.widen(target)
    # Not by mse_loss, which takes memory twice, nor vector_norm, which adds up millions of float32 one after the other.
    return (features - target).square_().mean(), target.square().mean()


class Slopes:
    """The gradients of the terms at the layers that they are made of, for :func:`backward_chain`."""

    def __init__(self, tape: Tape, grad_content: Tensor, grad_style: Tensor, content_layer: int, backend: str) -> None:
        self.tape, self.content_layer, self.backend = tape, content_layer, backend
        self.grad_content, self.grad_style = grad_content, grad_style

    def __call__(self, i: int, x: Tensor, layer: Layer, above: Tensor | None) -> Tensor:
        target = self.tape.target.pop() if i == self.content_layer else None
        style = self.tape.style.get(i)
        kernels = kernels_of(self.backend)
        if self.backend == "triton" and (style is None or style.backend == "triton"):
            grad = torch.empty_like(x) if above is None or layer.winners is not None else above
            delta, scale, grad_style = None, None, None
            if style is not None:
                delta, scale, grad_style = style.delta, style.scale, self.grad_style[style.place]
            kernels.tap_bwd(x, above, layer.winners, delta, scale, target, grad_style, self.grad_content, grad)
            return grad

        if above is None:
            grad = torch.zeros_like(x)
        else:
            grad = above if layer.winners is None else unpool(above, layer, kernels)
        if style is not None:
            slope = style.delta * (self.grad_style[style.place] * (4 / x.numel()))
            if grad.dtype == slope.dtype:
                grad.flatten(2).baddbmm_(slope, x.flatten(2))
            else:
                grad += torch.bmm(slope, reference.widen(x).flatten(2)).view_as(x)
        if target is not None:
            grad -= target.sub_(x).mul_(self.grad_content * (2 / x.numel()))  # in place: nothing else wants it now
        return torch.ops.aten.threshold_backward.grad_input(grad, x, 0, grad_input=grad)


class _VGGLoss(torch.autograd.Function):
    """What the forward keeps belongs to the first backward, which frees it as it goes; a further one makes it anew."""

    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        content: Tensor,
        convs: Sequence[Packed],
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
            terms = composed(output, content, convs, content_layer, grams)
            total = terms.content * grad_content + (terms.style * grad_style).sum()
            return torch.autograd.grad(total, output, create_graph=True)[0], *(None,) * 5
        tapes, ctx.tapes = ctx.tapes, None
        if tapes is None:
            tapes = run(output, content, *ctx.arguments)[1]
        grad = torch.empty_like(output)
        with backends.on_device(output):
            for images in reversed(chunks(output)):
                share = len(output[images]) / len(output)
                tape = tapes.pop()
                slopes = Slopes(tape, share * grad_content, share * grad_style, content_layer, backend)
                grad[images] = backward_chain(tape.layers, convs, slopes, kernels_of(backend))
                del tape, slopes
        return grad, *(None,) * 5
