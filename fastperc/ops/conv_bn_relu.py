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
from fastperc.ops import cudnn, onednn, pointwise_conv
from fastperc.ops.common import (
    channels_adjacent,
    channels_last,
    check_shapes,
    copied_to,
    empty_like,
    evenly_spaced,
    in_dtype,
    symmetric,
    why_not_cpp,
    why_not_frozen,
)
from fastperc.ops.conv3x3 import CONV3X3, WIDEST_PADDING, why_not_winograd, why_slow_winograd, winograd
from fastperc.ops.instance_norm import INSTANCE_NORM, native_instance_norm, triton_finish
from fastperc.types import Epilogue, Padding, Sides, same_sides

CACHED_BYTES = 2 << 20  # transformed weights that stay in a core's cache
FLOPS_A_BYTE = 16  # that the CPU multiplies while it reads a byte of transformed weights, which are read once


def conv_bn_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: int = 1,
    padding: Padding = Padding(),
    epilogue: Epilogue = Epilogue(),
    dilation: int = 1,
    groups: int = 1,
) -> Tensor:
    """activation(norm(conv(``x``)) + skip).

    Args:
        x: [N, I, H, W]; float32, float16, bfloat16 or float64; best in channels-last memory, or a slice of the
            channels of a map in that.
        weight: [O, I / groups, k, k], in float32 or ``x``'s dtype; a batch norm is folded into it beforehand.
        bias: [O].
        stride: 1 or 2.
        padding: of zeros, reflected, or of the nearest pixels.
        epilogue: an instance norm, a skip [N, O, H', W'], an activation of :class:`~fastperc.types.Activation`, and
            ``out`` [N, O, H', W'] in ``x``'s dtype. That may be other channels of the map that ``x`` is a slice of.
        dilation: pixels from a tap to the next.
        groups: of channels, each convolved with its own filters.

    Returns:
        [N, O, H', W'] in ``x``'s dtype: ``out``, if there is one.

    Raises:
        ValueError: shapes that do not fit, or no such activation.
    """
    check_shapes(x, weight, bias, weight.shape[1] * groups)
    if epilogue.out is not None:
        _check_out(epilogue.out, x, weight, stride, padding, dilation)
    if padding.mode == "zeros" and not symmetric(padding):
        kernel = (dilation * (weight.shape[2] - 1) + 1, dilation * (weight.shape[3] - 1) + 1)
        padding = Padding(_even_sides(padding.sides, x, kernel, stride))
    return CONV_BN_RELU(x, weight, bias, stride, padding, epilogue, dilation, groups)


def _check_out(out: Tensor, x: Tensor, weight: Tensor, stride: int, padding: Padding, dilation: int) -> None:
    """Raises a ``ValueError`` unless ``out`` fits the convolution."""
    left, right, top, bottom = padding.sides
    rows, columns = (
        (size - dilation * (taps - 1) - 1) // stride + 1
        for size, taps in zip((x.shape[2] + top + bottom, x.shape[3] + left + right), weight.shape[2:])
    )
    shape = (len(x), len(weight), rows, columns)
    if out.shape != shape or out.dtype != x.dtype:
        raise ValueError(f"expected an out of {list(shape)} in {x.dtype}, got {list(out.shape)} in {out.dtype}")


def _even_sides(sides: Sides, x: Tensor, kernel: tuple[int, int], stride: int) -> Sides:
    """``sides`` with as many zeros on either side, where a stride of 2 does not read what that adds."""
    left, right, top, bottom = sides
    height, width = x.shape[2:]
    same_width = (width + 2 * left - kernel[1]) // stride == (width + left + right - kernel[1]) // stride
    same_height = (height + 2 * top - kernel[0]) // stride == (height + top + bottom - kernel[0]) // stride
    return (left, left, top, top) if same_width and same_height else sides


def padded(x: Tensor, padding: Padding) -> tuple[Tensor, tuple[int, int]]:
    """``x``, and the zeros that a library adds to it (left and right, top and bottom); ``x`` is copied with its border
    where a library cannot add that."""
    if symmetric(padding):
        return x, (padding.sides[0], padding.sides[2])
    return channels_last(reference.pad(x, padding)), (0, 0)


def _why_not_spread(dilation: int, groups: int) -> str | None:
    """Why a kernel without them cannot serve this dilation and these groups, or ``None``."""
    return None if dilation == groups == 1 else "dilated and grouped convolutions are left to the library"


def _why_not_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: int,
    padding: Padding,
    epilogue: Epilogue,
    dilation: int = 1,
    groups: int = 1,
) -> str | None:
    if reason := why_not_frozen(x, weight, bias, epilogue=epilogue) or _why_not_spread(dilation, groups):
        return reason
    if padding.mode == "replicate" or weight.shape[2] != weight.shape[3]:
        return "the kernel is not square, or the border repeats pixels"
    return backends.why_not_triton_product(x)


def _triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: int,
    padding: Padding,
    epilogue: Epilogue,
    dilation: int = 1,
    groups: int = 1,
) -> Tensor:
    left, right, top, bottom = padding.sides
    n, _, height, width = x.shape
    channels, _, kernel, _ = weight.shape
    rows, columns = ((size - kernel) // stride + 1 for size in (height + top + bottom, width + left + right))
    x, weight = channels_last(x), in_dtype(weight, x.dtype)
    out = empty_like(x, (n, channels, rows, columns))

    def fill(epilogue: Epilogue, partials: Tensor | None) -> None:
        kernels.conv_bn_relu.conv_bn_relu_fwd(x, weight, bias.float(), out, stride, padding, epilogue, partials)

    def tiles() -> int:
        return kernels.conv_bn_relu.conv_bn_relu_tiles(x, out.shape)

    return triton_finish(out, tiles, fill, epilogue._replace(skip=channels_adjacent(epilogue.skip)))


def _why_not_winograd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: int,
    padding: Padding,
    epilogue: Epilogue,
    dilation: int = 1,
    groups: int = 1,
) -> str | None:
    if reason := why_not_frozen(x, weight, bias, epilogue=epilogue) or _why_not_spread(dilation, groups):
        return reason
    left, _, top, _ = padding.sides
    if stride != 1 or (symmetric(padding) and (left != top or left > WIDEST_PADDING)):
        return "the convolution has a stride, or a padding that is wide or differs between rows and columns"
    return why_not_winograd(x, weight, bias)


def _why_slow_winograd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: int,
    padding: Padding,
    epilogue: Epilogue,
    dilation: int = 1,
    groups: int = 1,
) -> str | None:
    left, right, top, bottom = padding.sides
    return why_slow_winograd(len(x) * (x.shape[2] + top + bottom - 2) * (x.shape[3] + left + right - 2))


def _why_slow_winograd_4x4(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: int,
    padding: Padding,
    epilogue: Epilogue,
    dilation: int = 1,
    groups: int = 1,
) -> str | None:
    """Why tiles of 4×4 pixels are expected to be slower than those of 2×2."""
    if reason := _why_slow_winograd(x, weight, bias, stride, padding, epilogue):
        return reason
    left, right, top, bottom = padding.sides
    height, width = x.shape[2] + top + bottom - 2, x.shape[3] + left + right - 2
    products = {tile: len(x) * -(-height // tile) * -(-width // tile) * (tile + 2) ** 2 for tile in (2, 4)}
    if products[4] > 0.9 * products[2]:
        return "tiles of 4×4 waste too much at the border"
    # For each filter: two operations a product, and 36 transformed weights of four bytes instead of 16.
    if 4 * 36 * weight.shape[0] * weight.shape[1] <= CACHED_BYTES:
        return None
    is_small = 2 * (products[2] - products[4]) < FLOPS_A_BYTE * 4 * (36 - 16)
    return "reading more transformed weights takes longer than the products saved" if is_small else None


def _winograd(tile: int) -> Callable[..., Tensor]:
    """The convolution by tiles of ``tile`` × ``tile`` pixels."""

    def run(
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        stride: int,
        padding: Padding,
        epilogue: Epilogue,
        dilation: int = 1,
        groups: int = 1,
    ) -> Tensor:
        x, (zeros, _) = padded(evenly_spaced(x), padding)
        if epilogue.norm is None:
            return winograd(x, weight, bias, zeros, epilogue=epilogue, tile=tile)
        y = winograd(x, weight, bias, zeros, tile=tile)
        return native_instance_norm(y, epilogue, y)

    return run


def _why_not_onednn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: int,
    padding: Padding,
    epilogue: Epilogue,
    dilation: int = 1,
    groups: int = 1,
) -> str | None:
    reason = why_not_frozen(x, weight, bias, epilogue=epilogue) or onednn.why_not(x)
    return reason or (why_not_cpp(x) if epilogue.norm else None)


def _onednn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: int,
    padding: Padding,
    epilogue: Epilogue,
    dilation: int = 1,
    groups: int = 1,
) -> Tensor:
    x, zeros = padded(channels_last(x), padding)
    geometry = onednn.Geometry(stride, zeros, dilation, groups)
    if epilogue.norm is None:
        return copied_to(onednn.convolution(x, weight, bias, geometry, epilogue), epilogue.out)
    y = onednn.convolution(x, weight, bias, geometry)
    return native_instance_norm(y, epilogue, y)


def _why_not_cudnn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: int,
    padding: Padding,
    epilogue: Epilogue,
    dilation: int = 1,
    groups: int = 1,
) -> str | None:
    if reason := why_not_frozen(x, weight, bias, epilogue=epilogue) or _why_not_spread(dilation, groups):
        return reason
    activation = epilogue.activation
    if epilogue.norm is not None or activation is None or activation.name != "relu" or not symmetric(padding):
        return "cuDNN fuses a bias, a skip and a ReLU, no less and no more"
    return cudnn.why_not(x, weight, stride, epilogue.skip is not None)


def _cudnn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: int,
    padding: Padding,
    epilogue: Epilogue,
    dilation: int = 1,
    groups: int = 1,
) -> Tensor:
    x, zeros = padded(channels_last(x), padding)
    skip = None if epilogue.skip is None else channels_last(epilogue.skip)
    y = cudnn.convolution_relu(x, in_dtype(weight, x.dtype), bias.to(x.dtype), stride, zeros, skip)
    return copied_to(y, epilogue.out)


def _plain(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: int,
    padding: Padding,
    epilogue: Epilogue,
    dilation: int = 1,
    groups: int = 1,
) -> Tensor:
    y = reference.conv_bn_relu(x, in_dtype(weight, x.dtype), bias, stride, padding, epilogue, dilation, groups)
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
    return x, weight, weight.new_zeros(weight.shape[0]), stride, same_sides(1), Epilogue()


CONV_BN_RELU = register(
    Operation(
        "conv_bn_relu",
        "Conv, norm, ReLU",
        (
            Implementation("triton", _triton, _why_not_triton),
            Implementation("native", _winograd(4), _why_not_winograd, _why_slow_winograd_4x4, "winograd_4x4"),
            Implementation("native", _winograd(2), _why_not_winograd, _why_slow_winograd, "winograd"),
            Implementation("native", pointwise_conv.run, pointwise_conv.why_not, pointwise_conv.why_slow, "pointwise"),
            Implementation("native", _onednn, _why_not_onednn, label="onednn"),
            Implementation("native", _cudnn, _why_not_cudnn, label="cudnn"),
            Implementation("reference", _plain),
        ),
        TuningCases(_tuned_shapes, _tuned_call),
        (
            *CONV3X3.sources,
            *INSTANCE_NORM.sources,
            "fastperc/ops/conv_bn_relu.py",
            *pointwise_conv.SOURCES,
            "fastperc/ops/onednn.py",
            "fastperc/ops/cudnn.py",
            "kernels/conv_bn_relu.py",
            "kernels/configs.py",
        ),
        first_two_arguments,
        frozen=True,
    )
)
