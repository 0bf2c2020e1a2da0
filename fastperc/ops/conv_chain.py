"""Convolutions in a row, in training, each with its norm, ReLU and skip; what lies between them is never normalised in
memory, neither forward nor back.

    forward    each kernel normalises what it loads, and leaves its raw output and that output's statistics by tiles
    saved      the raw outputs, and a few numbers a channel
    backward   each kernel makes of what it loads the gradient before the norm, lets what it has computed through the
               ReLU of the layer below, and leaves the sums that the norm there wants

``fastperc.kernels.deferred`` draws it. Only what a skip adds is written out: the input of a residual block. Where
Triton's kernels cannot serve, the layers run one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastperc import backends, reference
from fastperc.collective import gathered
from fastperc.ops.frozen import channels_last, compute_dtype, empty_like
from fastperc.ops.layer import Layer, unsupported
from fastperc.ops.norm_relu import group_of, norm_relu
from fastperc.ops.subpixel_conv_bn_relu import as_transposed

if TYPE_CHECKING:
    from fastperc.types import Deferred


def conv_chain(x: Tensor, layers: Sequence[Layer]) -> Tensor:
    """``layers`` one after the other; running statistics are updated as the norms do themselves.

    Args:
        x: [N, C, H, W].
        layers: each takes what the one before gives; one without a norm may come last.

    Returns:
        [N, C', H', W'], channels-last where kernels ran.
    """
    obstacle = unsupported(x, layers)
    asked = obstacle is None or backends.forced() == "triton"
    if asked and backends.choose("conv_chain", x, triton=obstacle) == "triton":
        parameters = [parameter for layer in layers for parameter in layer.parameters]
        return _ConvChain.apply(x.to(compute_dtype(x)), tuple(layers), *parameters)
    before = x
    for layer in layers:
        y = layer.conv(F.interpolate(x, scale_factor=2, mode="nearest") if layer.upsample == "nearest" else x)
        skip = cropped(before, y) if layer.skip else None
        before = x
        x = y if layer.norm is None else norm_relu(y, layer.norm, layer.relu, skip)
    return x


def cropped(x: Tensor, like: Tensor) -> Tensor:
    """The middle of ``x``, as large as ``like``."""
    top, left = (x.shape[2] - like.shape[2]) // 2, (x.shape[3] - like.shape[3]) // 2
    return x[:, :, top : top + like.shape[2], left : left + like.shape[3]]


def composed(x: Tensor, layers: Sequence[Layer], parameters: Sequence[Tensor | None]) -> Tensor:
    """The chain as plain PyTorch, of which any number of gradients may be taken; it updates no running statistics."""
    before = x
    for layer, (weight, bias, norm_weight, norm_bias) in zip(layers, _by_layer(parameters)):
        if layer.upsample == "transposed":
            y = F.conv_transpose2d(x, weight.to(x.dtype), bias.to(x.dtype), 2, 1, 1)
        else:
            wide = F.interpolate(x, scale_factor=2, mode="nearest") if layer.upsample else x
            padding = (layer.padding,) * 4
            y = reference.convolve(wide, weight, bias, layer.stride, padding, "reflect" if layer.reflect else "zeros")
        skip, before = cropped(before, y) if layer.skip else None, x
        x = y
        if (norm := layer.norm) is not None:
            if layer.frozen:
                statistics = norm.running_mean, norm.running_var
                x = F.batch_norm(y, *statistics, norm_weight, norm_bias, False, 0.0, norm.eps)
            elif (group := group_of(norm)) is not None:
                x = reference.sync_norm_relu(y, norm_weight, norm_bias, norm.eps, False, group)[0]
            else:
                x = reference.norm_relu(y, norm_weight, norm_bias, norm.eps, False, layer.batch)
            x = x if skip is None else x + skip
            x = x.relu() if layer.relu else x
    return x


def _by_layer(parameters: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """The parameters of each layer, as :attr:`Layer.parameters` has them."""
    return (parameters[i : i + 4] for i in range(0, len(parameters), 4))


class _ConvChain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layers: tuple[Layer, ...], *parameters: Tensor | None) -> Tensor:
        made: list[tuple[Tensor, Tensor | None]] = []
        tracked = [layer.norm.num_batches_tracked for layer in layers if _updates(layer)]
        if tracked:
            torch._foreach_add_(tracked, 1)
        weights = list(_by_layer(parameters))

        def make(i: int, source: Deferred) -> tuple[Tensor, Tensor | None]:
            made.append(_forward(layers[i], source, *weights[i]))
            return made[-1]

        with backends.on_device(x), torch.autocast(x.device.type, enabled=False):
            *_, out = _inputs(x, layers, make)
        ctx.layers = layers
        ctx.save_for_backward(x, *parameters, *(t for pair in made for t in pair))
        return out.x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        layers, count = ctx.layers, 1 + 4 * len(ctx.layers)
        saved = ctx.saved_tensors  # once: torch.utils.checkpoint makes it anew each time
        x, *parameters = saved[:count]
        needed = [ctx.needs_input_grad[0], *ctx.needs_input_grad[2:]]
        if torch.is_grad_enabled():  # the gradient of this gradient may be asked for
            wanted = [t for t, need in zip((x, *parameters), needed) if need]
            y = composed(x, layers, parameters)
            found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True, materialize_grads=True))
            of_x, *others = (next(found) if need else None for need in needed)
            return of_x, None, *others
        kept = saved[count:]
        with backends.on_device(x), torch.autocast(x.device.type, enabled=False):
            of_x, *others = _backward(grad, x, layers, parameters, list(zip(kept[::2], kept[1::2])), needed)
        return of_x, None, *others


def _updates(layer: Layer) -> bool:
    return layer.batch and layer.norm.track_running_stats and layer.norm.training


def _inputs(
    x: Tensor, layers: Sequence[Layer], make: Callable[[int, Deferred], tuple[Tensor, Tensor | None]]
) -> Iterator[Deferred]:
    """What each layer loads, and at last what the chain gives; ``make(i, source)`` is layer i's raw output and its
    norm's coefficients. What a skip adds, or was added to, is written out."""
    from fastperc.types import Deferred

    node, before, skip = Deferred(x if layers[0].kind == "stem" else channels_last(x)), None, None
    for i, layer in enumerate(layers):
        if skip is not None or (node.coefficients is not None and any(after.skip for after in layers[i + 1 : i + 2])):
            node = Deferred(_settled(node, skip))
        yield node
        y, coefficients = make(i, node)
        skip = cropped(before.x, y) if layer.skip and before is not None else None
        node, before = Deferred(y, coefficients, layer.relu and coefficients is not None), node
    yield node if node.coefficients is None else Deferred(_settled(node, skip))


def _settled(node: Deferred, skip: Tensor | None) -> Tensor:
    from fastperc.kernels.instance_norm import instance_norm_fwd

    assert node.coefficients is not None
    out = torch.empty_like(node.x)
    instance_norm_fwd(node.x, node.coefficients, skip, node.relu, out)
    return out


def _forward(
    layer: Layer, source: Deferred, weight: Tensor, bias: Tensor, norm_weight: Any, norm_bias: Any
) -> tuple[Tensor, Tensor | None]:
    """A layer's raw output, and the coefficients of its norm."""
    from fastperc.kernels import conv_bn_relu, rgb_conv_head, rgb_conv_stem, subpixel_conv_bn_relu

    x, kind, around = source.x, layer.kind, (layer.padding,) * 4
    mode = "reflect" if layer.reflect else "zeros"
    rows, columns = layer.output_size(x.shape[2]), layer.output_size(x.shape[3])
    out = empty_like(x, (len(x), layer.conv.out_channels, rows, columns))
    bias, weight = bias.float(), weight.detach()
    if kind == "head":
        packed = rgb_conv_head.pack(weight).to(x.dtype)
        rgb_conv_head.rgb_conv_head_fwd(source, packed, bias, out, around, mode, None)
        return out, None
    measured = not layer.frozen
    if kind == "stem":
        partials = _partials(out, rgb_conv_stem.rgb_conv_stem_tiles(out), 3) if measured else None
        picture = rgb_conv_stem.rgb_prepare(x, (0, 0, *x.shape[2:]), around, mode, 1.0, 0.0, x.dtype)
        packed = rgb_conv_stem.pack(weight).to(x.dtype)
        rgb_conv_stem.rgb_conv_stem_fwd(picture, packed, bias, out, False, partials)
    elif kind == "conv":
        partials = _partials(out, conv_bn_relu.conv_bn_relu_tiles(source, out.shape), 3) if measured else None
        packed = weight.to(x.dtype, memory_format=torch.channels_last)
        conv_bn_relu.conv_bn_relu_fwd(source, packed, bias, None, out, layer.stride, around, mode, False, partials)
    else:
        tiles = subpixel_conv_bn_relu.subpixel_conv_bn_relu_tiles(source, out, kind)
        partials = _partials(out, tiles, 3) if measured else None
        packed = subpixel_conv_bn_relu.pack(weight, kind).to(x.dtype)
        subpixel_conv_bn_relu.subpixel_conv_bn_relu_fwd(source, packed, bias, out, kind, mode, False, partials)
    return out, _norm(layer, partials, norm_weight.float(), norm_bias.float())


def _partials(out: Tensor, tiles: int, rows: int) -> Tensor:
    return torch.empty(len(out), tiles, rows, out.shape[1], device=out.device)


def _norm(layer: Layer, partials: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
    """The coefficients of a layer's norm, of its output's statistics by tiles; updates the running ones."""
    from fastperc.kernels.instance_norm import RunningStatistics, norm_coefficients

    norm, running = layer.norm, None
    if layer.batch and norm.track_running_stats:
        running = RunningStatistics(norm.running_mean, norm.running_var, norm.momentum, norm.num_batches_tracked)
    if layer.batch and partials is not None:
        partials = partials.flatten(0, 1)[None]
        if (group := group_of(norm)) is not None:
            statistics = partials.new_empty(1, 3, len(weight))
            norm_coefficients(partials, weight, bias, norm.eps, statistics=statistics)
            partials = gathered(statistics[0], group)[None]
    return norm_coefficients(partials, weight, bias, norm.eps, running)


def _backward(
    grad: Tensor,
    x: Tensor,
    layers: Sequence[Layer],
    parameters: Sequence[Any],
    made: Sequence[tuple[Tensor, Tensor | None]],
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of ``x`` and ``parameters``, where they are ``needed``."""
    from fastperc.kernels.fold_gradient import fold_gradient, fold_gradient_tiles
    from fastperc.types import Deferred

    sources = list(islice(_inputs(x, layers, lambda i, source: made[i]), len(layers)))
    outputs = [Deferred(y, coefficients, layer.relu) for layer, (y, coefficients) in zip(layers, made)]
    weights = list(_by_layer(parameters))
    found: list[Tensor | None] = [None] * len(needed)
    deepest = next(i for i, need in enumerate(needed) if need)  # gradients go no further down than that

    # The gradient after the last layer's norm and ReLU; of a layer without a norm, of its output.
    of_y = grad.to(outputs[-1].x.dtype)
    partials: Tensor | None = None
    if layers[-1].norm is not None:
        out = torch.empty_like(outputs[-1].x)
        partials = _partials(out, fold_gradient_tiles(out), 2)
        fold_gradient(of_y, None, outputs[-1], out, (0, 0, 0, 0), False, partials)
        of_y = out
    skips: dict[int, Tensor] = {}  # the gradients that skips bring to a layer's input
    for i in reversed(range(len(layers))):
        layer, source, first = layers[i], sources[i], 1 + 4 * i
        if layer.skip:
            skips[i - 1] = _widened(of_y, sources[i - 1].x)
        if layer.norm is None:
            gradient = Deferred(of_y)
            if needed[first + 1]:
                found[first + 1] = of_y.sum((0, 2, 3), dtype=torch.float32)
        else:
            assert partials is not None
            gradient, found[first + 1 : first + 4] = _through_norm(layer, of_y, partials, outputs[i], weights[i])
        if needed[first]:
            found[first] = _weight_gradient(layer, source, gradient)
        if deepest >= first:
            break
        below = outputs[i - 1] if i else None
        of_y, partials = _data_gradient(layer, gradient, weights[i][0], skips.pop(i, None), below, source.x)
        if i == 0:
            found[0] = of_y
    wanted = (x, *parameters)
    return [g.to(t.dtype) if need and g is not None else None for g, t, need in zip(found, wanted, needed)]


def _widened(grad: Tensor, like: Tensor) -> Tensor:
    """The gradient of what :func:`cropped` took ``grad``'s part of."""
    left, top = (like.shape[3] - grad.shape[3]) // 2, (like.shape[2] - grad.shape[2]) // 2
    if not left and not top:
        return grad
    return channels_last(
        F.pad(grad, (left, like.shape[3] - grad.shape[3] - left, top, like.shape[2] - grad.shape[2] - top))
    )


def _through_norm(
    layer: Layer, of_y: Tensor, partials: Tensor, output: Deferred, weights: Sequence[Any]
) -> tuple[Deferred, tuple[Tensor, Tensor, Tensor]]:
    """The gradient of a layer's raw output, to be computed where it is loaded, from that after its norm; and those of
    the convolution's bias and of the norm's weight and bias."""
    from fastperc.kernels.instance_norm import gradient_coefficients
    from fastperc.types import Deferred

    bias, norm_weight = weights[1], weights[2]
    assert output.coefficients is not None
    scale = norm_weight.float()
    if layer.batch:
        partials = partials.flatten(0, 1)[None]
    coefficients, sums = gradient_coefficients(partials, scale, output.coefficients, layer.frozen)
    of_bias = torch.zeros_like(bias)  # the norm takes it off again
    if layer.frozen:
        of_bias = coefficients[0, 0] * sums[0, 0]
    elif (group := group_of(layer.norm)) is not None:
        coefficients, _ = gradient_coefficients(gathered(sums[0], group)[None], scale, output.coefficients, False)
    of_norm_bias, of_norm_weight = sums.sum(0)
    other = None if layer.frozen else output.x
    return Deferred(of_y, coefficients, other=other), (of_bias, of_norm_weight, of_norm_bias)


def _turned(weight: Tensor) -> Tensor:
    """By 180°, in and out exchanged: as gradients pass to the input."""
    return weight.flip(2, 3).transpose(0, 1)


def _picture(grad: Tensor, padding: int) -> Tensor:
    """The gradient [N, 3, H, W] of a layer to RGB as the wide kernels load it."""
    from fastperc.kernels.rgb_conv_stem import rgb_prepare

    return rgb_prepare(grad, (0, 0, *grad.shape[2:]), (padding,) * 4, "zeros", 1.0, 0.0, grad.dtype)


def _data_gradient(
    layer: Layer, gradient: Deferred, weight: Tensor, skip: Tensor | None, below: Deferred | None, x: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The gradient of a layer's input ``x``, + ``skip``, let through the ReLU of the activation ``below``, and its sums
    by tiles; of a plain x itself."""
    from fastperc.kernels import conv_bn_relu, rgb_conv_head, rgb_conv_stem, subpixel_conv_bn_relu
    from fastperc.kernels.fold_gradient import fold_gradient, fold_gradient_tiles

    kind, weight, dtype = layer.kind, weight.detach(), gradient.x.dtype
    border = 0 if not layer.reflect else 1 if kind == "nearest" else layer.padding  # of what the kernel gives
    into, added = (below, skip) if not border else (None, None)
    out = empty_like(gradient.x, (*x.shape[:2], x.shape[2] + 2 * border, x.shape[3] + 2 * border))
    around = layer.kernel - 1 - (0 if border else layer.padding)

    def sums(tiles: int) -> Tensor | None:
        return None if into is None else _partials(out, tiles, 2)

    if kind == "head":
        partials = sums(rgb_conv_stem.rgb_conv_stem_tiles(out))
        packed = rgb_conv_stem.pack(_turned(weight)).to(dtype)
        rgb_conv_stem.rgb_conv_head_bwd(_picture(gradient.x, around), packed, into, out, partials)
    elif kind == "stem":
        partials, packed = None, rgb_conv_head.pack(_turned(weight)).to(dtype)
        rgb_conv_head.rgb_conv_head_fwd(gradient, packed, None, out, (around,) * 4, "zeros", None)
    elif kind == "conv" and layer.stride == 2:
        partials = sums(subpixel_conv_bn_relu.strided_conv_bwd_tiles(gradient, out, border))
        packed = subpixel_conv_bn_relu.pack(weight, "transposed").to(dtype)
        subpixel_conv_bn_relu.strided_conv_bwd(gradient, packed, into, out, border, partials)
    else:
        stride = 1 if kind == "conv" else 2
        if kind == "conv":
            weight = _turned(weight)
        elif kind == "nearest":
            weight, around = as_transposed(weight), 3 if border else 1
        else:
            around = 1
        partials = sums(conv_bn_relu.conv_bn_relu_tiles(gradient, out.shape, into is not None))
        packed = weight.to(dtype, memory_format=torch.channels_last)
        conv_bn_relu.conv_bn_relu_bwd(gradient, packed, added, into, out, stride, (around,) * 4, partials)
    if not border:
        return out, partials
    folded = empty_like(out, x.shape)
    partials = None if below is None else _partials(folded, fold_gradient_tiles(folded), 2)
    fold_gradient(out, skip, below, folded, (border,) * 4, kind == "nearest", partials)
    return folded, partials


def _weight_gradient(layer: Layer, source: Deferred, gradient: Deferred) -> Tensor:
    """The gradient of a layer's weight, float32, in its shape."""
    from fastperc.kernels.rgb_conv_stem import rgb_prepare
    from fastperc.kernels.weight_gradient import Geometry, rgb_weight_gradient, weight_gradient

    kind, kernel, padding = layer.kind, layer.kernel, layer.padding
    mode = "reflect" if layer.reflect else "zeros"
    if kind == "stem":
        x = source.x
        picture = rgb_prepare(x, (0, 0, *x.shape[2:]), (padding,) * 4, mode, 1.0, 0.0, x.dtype)
        return rgb_weight_gradient(gradient, picture, kernel).permute(0, 3, 1, 2)
    if kind == "head":
        beyond = padding if layer.reflect else 0
        picture = _picture(gradient.x, kernel - 1 - padding + beyond)
        return rgb_weight_gradient(source, picture, kernel, beyond).flip(1, 2).permute(3, 0, 1, 2)
    taps = (kernel, kernel)
    if kind == "transposed":
        return weight_gradient(source, gradient, Geometry(taps, 1, 1, 2)).permute(0, 3, 1, 2)
    geometry = Geometry(taps, padding, padding, layer.stride, kind == "nearest", layer.reflect)
    return weight_gradient(gradient, source, geometry).permute(0, 3, 1, 2)
