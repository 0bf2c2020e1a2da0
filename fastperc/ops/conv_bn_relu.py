"""A frozen network's convolution with its epilogue: the batch norm folded into the weights, or an instance norm; a
skip; an activation.

In training ``modules.ConvBNReLU`` is a layer of ``ops.conv_chain``; ``ops/kinds.py`` has its forward and gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastperc import backends, kernels, reference
from fastperc.backends import Implementation, Operation, TuningCases, first_two_arguments, register
from fastperc.ops import cudnn, depthwise_conv, gpu_epilogue, onednn, pointwise_conv, stem_conv
from fastperc.ops.common import (
    channels_adjacent,
    channels_last,
    check_shapes,
    copied_to,
    empty_like,
    evenly_spaced,
    in_dtype,
    symmetric,
    why_not_compiled,
    why_not_frozen,
)
from fastperc.ops.conv3x3 import CONV3X3, WIDEST_PADDING, why_not_winograd, why_slow_winograd, winograd
from fastperc.ops.instance_norm import INSTANCE_NORM, native_instance_norm, triton_finish
from fastperc.types import Epilogue, Geometry, Padding, Sides, same_sides

FLOPS_A_BYTE = 4  # that tiles of 4×4 must save for each byte of transformed weights that they read more
FEWEST_PIXELS = 48  # of the output; with fewer, a kernel that reads the weights as they are is faster


def conv_bn_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    geometry: Geometry = Geometry(),
    epilogue: Epilogue = Epilogue(),
) -> Tensor:
    """activation(norm(conv(``x``)) + skip).

    Args:
        x: [N, I, H, W]; float32, float16, bfloat16 or float64; best in channels-last memory, or a slice of the
            channels of a map in that.
        weight: [O, I / groups, k, k], in float32 or ``x``'s dtype; a batch norm is folded into it beforehand.
        bias: [O].
        geometry: a stride of 1 or 2, and any padding, dilation and groups.
        epilogue: an instance norm, a skip [N, O, H', W'], an activation of :class:`~fastperc.types.Activation`, and
            ``out`` [N, O, H', W'] in ``x``'s dtype. That may be other channels of the map that ``x`` is a slice of.

    Returns:
        [N, O, H', W'] in ``x``'s dtype: ``out``, if there is one.

    Raises:
        ValueError: shapes that do not fit, or no such activation.
    """
    check_shapes(x, weight, bias, weight.shape[1] * geometry.groups)
    if epilogue.out is not None:
        _check_out(epilogue.out, x, weight, geometry)
    if geometry.padding.mode == "zeros" and not symmetric(geometry.padding):
        geometry = geometry._replace(padding=Padding(_even_sides(x, weight, geometry)))
    return CONV_BN_RELU(x, weight, bias, geometry, epilogue)


def _check_out(out: Tensor, x: Tensor, weight: Tensor, geometry: Geometry) -> None:
    """Raises a ``ValueError`` unless ``out`` fits the convolution."""
    shape = geometry.output_shape(x, weight)
    if out.shape != shape or out.dtype != x.dtype:
        raise ValueError(f"expected an out of {list(shape)} in {x.dtype}, got {list(out.shape)} in {out.dtype}")


def _even_sides(x: Tensor, weight: Tensor, geometry: Geometry) -> Sides:
    """The padding with as many zeros on either side, where a stride of 2 does not read what that adds."""
    left, _, top, _ = geometry.padding.sides
    even = (left, left, top, top)
    is_same = geometry.output_shape(x, weight) == geometry._replace(padding=Padding(even)).output_shape(x, weight)
    return even if is_same else geometry.padding.sides


def padded(x: Tensor, padding: Padding) -> tuple[Tensor, Padding]:
    """``x``, and the zeros that a library adds to it, as many left as right and as many above as below; ``x`` is copied
    with its border where a library cannot add that."""
    return (x, padding) if symmetric(padding) else (channels_last(reference.pad(x, padding)), Padding())


def _why_not_spread(geometry: Geometry) -> str | None:
    """Why a kernel without them cannot serve this dilation and these groups, or ``None``."""
    is_spread = geometry.dilation != 1 or geometry.groups != 1
    return "dilated and grouped convolutions are left to the library" if is_spread else None


def _why_not_triton(x: Tensor, weight: Tensor, bias: Tensor, geometry: Geometry, epilogue: Epilogue) -> str | None:
    if reason := why_not_frozen(x, weight, bias, epilogue=epilogue) or _why_not_spread(geometry):
        return reason
    if geometry.padding.mode == "replicate" or weight.shape[2] != weight.shape[3]:
        return "the kernel is not square, or the border repeats pixels"
    return backends.why_not_triton_product(x)


def _triton(x: Tensor, weight: Tensor, bias: Tensor, geometry: Geometry, epilogue: Epilogue) -> Tensor:
    stride, padding, _, _ = geometry
    x, weight = channels_last(x), in_dtype(weight, x.dtype)
    out = empty_like(x, geometry.output_shape(x, weight))

    def fill(epilogue: Epilogue, partials: Tensor | None) -> None:
        kernels.conv_bn_relu.conv_bn_relu_fwd(x, weight, bias.float(), out, stride, padding, epilogue, partials)

    def tiles() -> int:
        return kernels.conv_bn_relu.conv_bn_relu_tiles(x, out.shape)

    return triton_finish(out, tiles, fill, epilogue._replace(skip=channels_adjacent(epilogue.skip)))


def _why_not_winograd(x: Tensor, weight: Tensor, bias: Tensor, geometry: Geometry, epilogue: Epilogue) -> str | None:
    if reason := why_not_frozen(x, weight, bias, epilogue=epilogue) or _why_not_spread(geometry):
        return reason
    padding, (left, _, top, _) = geometry.padding, geometry.padding.sides
    if geometry.stride != 1 or (symmetric(padding) and (left != top or left > WIDEST_PADDING)):
        return "the convolution has a stride, or a padding that is wide or differs between rows and columns"
    return why_not_winograd(x, weight, bias)


def _why_slow_winograd(x: Tensor, weight: Tensor, bias: Tensor, geometry: Geometry, epilogue: Epilogue) -> str | None:
    images, _, height, width = geometry.output_shape(x, weight)
    return why_slow_winograd(images * height * width, FEWEST_PIXELS)


def _why_slow_winograd_4x4(
    x: Tensor, weight: Tensor, bias: Tensor, geometry: Geometry, epilogue: Epilogue
) -> str | None:
    """Why tiles of 4×4 pixels are expected to be slower than those of 2×2."""
    if reason := _why_slow_winograd(x, weight, bias, geometry, epilogue):
        return reason
    images, _, height, width = geometry.output_shape(x, weight)

    def products_of(tile: int) -> int:  # for each filter; the kernel multiplies four tiles at once
        tiles = images * -(-height // tile) * -(-width // tile)
        return -(-tiles // 4) * 4 * (tile + 2) ** 2

    products = {tile: products_of(tile) for tile in (2, 4)}
    if products[4] > 0.9 * products[2]:
        return "tiles of 4×4 waste too much at the border"
    # For each filter: two operations a product, and 36 transformed weights of four bytes instead of 16.
    is_small = 2 * (products[2] - products[4]) < FLOPS_A_BYTE * 4 * (36 - 16)
    return "reading more transformed weights takes longer than the products saved" if is_small else None


def _winograd(tile: int) -> Callable[..., Tensor]:
    """The convolution by tiles of ``tile`` × ``tile`` pixels."""

    def run(x: Tensor, weight: Tensor, bias: Tensor, geometry: Geometry, epilogue: Epilogue) -> Tensor:
        x, padding = padded(evenly_spaced(x), geometry.padding)
        zeros = padding.sides[0]
        if epilogue.norm is None:
            return winograd(x, weight, bias, zeros, epilogue=epilogue, tile=tile)
        y = winograd(x, weight, bias, zeros, tile=tile)
        return native_instance_norm(y, epilogue, y)

    return run


def _why_not_onednn(x: Tensor, weight: Tensor, bias: Tensor, geometry: Geometry, epilogue: Epilogue) -> str | None:
    reason = why_not_frozen(x, weight, bias, epilogue=epilogue) or onednn.why_not(x)
    return reason or (why_not_compiled(x) if epilogue.norm else None)


def _onednn(x: Tensor, weight: Tensor, bias: Tensor, geometry: Geometry, epilogue: Epilogue) -> Tensor:
    x, padding = padded(channels_last(x), geometry.padding)
    geometry = geometry._replace(padding=padding)
    if epilogue.norm is None:
        return copied_to(onednn.convolution(x, weight, bias, geometry, epilogue), epilogue.out)
    y = onednn.convolution(x, weight, bias, geometry)
    return native_instance_norm(y, epilogue, y)


def _why_not_cudnn(x: Tensor, weight: Tensor, bias: Tensor, geometry: Geometry, epilogue: Epilogue) -> str | None:
    if reason := why_not_frozen(x, weight, bias, epilogue=epilogue) or _why_not_spread(geometry):
        return reason
    activation = epilogue.activation
    is_bias_relu = epilogue.norm is None and activation is not None and activation.name == "relu"
    if not is_bias_relu or not symmetric(geometry.padding):
        return "cuDNN fuses a bias, a skip and a ReLU, no less and no more"
    return cudnn.why_not(x, weight, geometry.stride, epilogue.skip is not None)


def _cudnn(x: Tensor, weight: Tensor, bias: Tensor, geometry: Geometry, epilogue: Epilogue) -> Tensor:
    x, padding = padded(channels_last(x), geometry.padding)
    zeros = (padding.sides[0], padding.sides[2])
    skip = None if epilogue.skip is None else channels_last(epilogue.skip)
    y = cudnn.convolution_relu(x, in_dtype(weight, x.dtype), bias.to(x.dtype), geometry.stride, zeros, skip)
    return copied_to(y, epilogue.out)


def _why_not_epilogue(x: Tensor, weight: Tensor, bias: Tensor, geometry: Geometry, epilogue: Epilogue) -> str | None:
    shape = geometry.output_shape(x, weight)
    return why_not_frozen(x, weight, bias, epilogue=epilogue) or gpu_epilogue.why_not(x, shape, epilogue)


def _why_slow_epilogue(x: Tensor, weight: Tensor, bias: Tensor, geometry: Geometry, epilogue: Epilogue) -> str | None:
    return gpu_epilogue.why_slow(epilogue)


def _epilogue(x: Tensor, weight: Tensor, bias: Tensor, geometry: Geometry, epilogue: Epilogue) -> Tensor:
    y = reference.convolve(channels_last(x), in_dtype(weight, x.dtype), None, *geometry)
    return gpu_epilogue.finish(y, bias, epilogue)


def _plain(x: Tensor, weight: Tensor, bias: Tensor, geometry: Geometry, epilogue: Epilogue) -> Tensor:
    y = reference.conv_bn_relu(x, in_dtype(weight, x.dtype), bias, geometry, epilogue)
    return copied_to(y, epilogue.out)


def _tuned_shapes(batch: int, size: int) -> list[tuple[tuple[int, ...], ...]]:
    """Input and weight of the style network's convolutions between its ends."""
    half, quarter = size // 2, size // 4
    return [
        ((batch, 32, size, size), (64, 32, 3, 3)),
        ((batch, 64, half, half), (128, 64, 3, 3)),
        ((batch, 128, quarter, quarter), (128, 128, 3, 3)),
    ]


def _tuned_call(x: Tensor, weight: Tensor) -> tuple[Any, ...]:
    stride = 1 if weight.shape[0] == weight.shape[1] else 2
    return x, weight, weight.new_zeros(weight.shape[0]), Geometry(stride, same_sides(1)), Epilogue()


CONV_BN_RELU = register(
    Operation(
        "conv_bn_relu",
        "Conv, norm, ReLU",
        (
            Implementation("triton", _triton, _why_not_triton),
            Implementation("native", _winograd(4), _why_not_winograd, _why_slow_winograd_4x4, "winograd_4x4"),
            Implementation("native", _winograd(2), _why_not_winograd, _why_slow_winograd, "winograd"),
            Implementation("native", pointwise_conv.run, pointwise_conv.why_not, pointwise_conv.why_slow, "pointwise"),
            Implementation("native", depthwise_conv.run, depthwise_conv.why_not, depthwise_conv.why_slow, "depthwise"),
            Implementation("native", stem_conv.run, stem_conv.why_not, stem_conv.why_slow, "stem"),
            Implementation(
                "native", pointwise_conv.run, pointwise_conv.why_not_direct, pointwise_conv.why_slow_direct, "direct"
            ),
            Implementation("native", _onednn, _why_not_onednn, label="onednn"),
            Implementation("native", _cudnn, _why_not_cudnn, label="cudnn"),
            Implementation("native", _epilogue, _why_not_epilogue, _why_slow_epilogue, "epilogue"),
            Implementation("reference", _plain),
        ),
        TuningCases(_tuned_shapes, _tuned_call),
        (
            *CONV3X3.sources,
            *INSTANCE_NORM.sources,
            "fastperc/ops/conv_bn_relu.py",
            *pointwise_conv.SOURCES,
            *depthwise_conv.SOURCES,
            *stem_conv.SOURCES,
            "fastperc/ops/onednn.py",
            "fastperc/ops/cudnn.py",
            "fastperc/ops/gpu_epilogue.py",
            "kernels/conv_bn_relu.py",
            "kernels/configs.py",
        ),
        first_two_arguments,
        frozen=True,
    )
)
