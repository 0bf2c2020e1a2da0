"""Convolutions on a CPU: Winograd's algorithm, and the two ends of a network."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from fastperc._native.module import _C, DTYPES, activation_arguments, dtype_name, pixel_step, strides_of
from fastperc._native.prepared import ConvConstants, convolve
from fastperc.types import Activation, Epilogue, Geometry, Padding

WINOGRAD_PANEL = 32  # winograd_panel in csrc/conv3x3.h
STEM_PANEL = 32  # stem_panel in csrc/stem_conv.h
DEPTHWISE_PANEL = 16  # depthwise_panel in csrc/depthwise_conv.h


def winograd_lanes() -> int:
    """How many floats a vector register holds in :func:`winograd_conv`: 16 with AVX-512, 8 with AVX2, else fewer."""
    return _C.winograd_lanes()


def winograd_weights(weight: Tensor, data_gradient: bool, tile: int) -> Tensor:
    """The transform of ``weight`` that :func:`winograd_conv` takes: [O / 32, (tile + 2)², I, 32].

    Args:
        weight: float32 [O, I, 3, 3]; O and I are multiples of 32.
        data_gradient: whether to transform the weights of the gradient's convolution instead: turned by 180°, with
            input and output channels exchanged. The result is then [I / 32, (tile + 2)², O, 32].
        tile: 2 or 4, the pixels of the output that a tile has a side.
    """
    (o, i), strides, first = weight.shape[:2], strides_of(weight), weight.data_ptr()
    if data_gradient:  # negative strides from the last tap on
        stride_o, stride_i, stride_row, stride_column = strides
        first += 2 * (stride_row + stride_column) * weight.itemsize
        (o, i), strides = (i, o), (stride_i, stride_o, -stride_row, -stride_column)
    transformed = weight.new_empty(o // WINOGRAD_PANEL, (tile + 2) ** 2, i, WINOGRAD_PANEL)
    _C.winograd_weights_cpu(first, transformed.data_ptr(), i, o, strides, tile, torch.get_num_threads())
    return transformed


def winograd_conv(
    x: Tensor,
    weights: Tensor,
    bias: Tensor | None,
    padding: int,
    skip: Tensor | None,
    activation: Activation | None,
    out: Tensor,
) -> None:
    """Fills ``out`` with ``activation`` of a 3×3 convolution of ``x`` + ``bias`` + ``skip``. All are float32.

    Args:
        x: [N, I, H, W] whose pixels are evenly spaced, as :func:`pixel_step` has it.
        weights: the result of :func:`winograd_weights`, whose size tells the tile.
        bias: [O], or ``None``.
        padding: zeros on each side.
        skip: of the shape of ``out``, with channels of stride 1, or ``None``.
        activation: one of ``PASS_ACTIVATIONS``, or ``None``.
        out: [N, O, H + 2·padding - 2, W + 2·padding - 2] whose pixels are evenly spaced. It may be other channels of
            the map that ``x`` is a slice of.
    """
    kind, slopes = activation_arguments(activation, out.shape[1])
    assert skip is None or (skip.shape == out.shape and skip.stride(1) == 1 and skip.dtype == out.dtype)
    _C.winograd_conv_cpu(
        x.data_ptr(),
        weights.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        0 if skip is None else skip.data_ptr(),
        out.data_ptr(),
        _winograd_shape(x, out, padding, math.isqrt(weights.shape[1]) - 2),
        (0, 0, 0, 0) if skip is None else strides_of(skip),
        kind,
        0 if slopes is None else slopes.data_ptr(),
        torch.get_num_threads(),
    )


def winograd_weight_gradient(x: Tensor, grad: Tensor, padding: int, weight: Tensor, bias: Tensor | None) -> None:
    """Fills ``weight`` and, unless it is ``None``, ``bias`` with their gradients. All are float32.

    Args:
        x: the input of the convolution [N, I, H, W], channels-last.
        grad: the gradient of its output [N, O, H', W'], channels-last.
        padding: zeros on each side of ``x``.
        weight: [O, I, 3, 3], of any strides.
        bias: [O], or ``None``.
    """
    assert pixel_step(grad) == grad.shape[1], "the gradient is a slice of a larger map"
    pointers = x.data_ptr(), grad.data_ptr(), weight.data_ptr(), 0 if bias is None else bias.data_ptr()
    shape, strides = _winograd_shape(x, grad, padding, 2), strides_of(weight)
    _C.winograd_weight_gradient_cpu(*pointers, shape, strides, torch.get_num_threads())


def _winograd_shape(
    x: Tensor, y: Tensor, padding: int, tile: int
) -> tuple[int, int, int, int, int, int, int, int, int]:
    """``WinogradShape`` in csrc/conv3x3.h of the convolution from ``x`` to ``y``."""
    (n, i, h, w), (_, o, rows, columns) = x.shape, y.shape
    x_step, y_step = pixel_step(x), pixel_step(y)
    assert x_step is not None and y_step is not None, "the pixels are not evenly spaced"
    assert (rows, columns) == (h + 2 * padding - 2, w + 2 * padding - 2)
    assert i % WINOGRAD_PANEL == 0 and o % WINOGRAD_PANEL == 0
    return n, h, w, i, o, padding, tile, x_step, y_step


@cache
def pointwise_panels() -> tuple[int, int]:
    """How the weights of :func:`pointwise_conv` are packed on this processor: floats in a register, and registers in a
    panel."""
    return _C.pointwise_panels()


def pointwise_conv(
    x: Tensor,
    weights: Tensor,
    bias: Tensor,
    kernel: tuple[int, int],
    geometry: Geometry,
    epilogue: Epilogue,
    out: Tensor,
) -> None:
    """Fills ``out`` with activation(the convolution of ``x`` + ``bias`` + skip). All are float32.

    Args:
        x: [N, I, H, W] whose pixels are evenly spaced, as :func:`pixel_step` has it.
        weights: packed as csrc/pointwise_conv.h says.
        bias: [O], filled up with zeros to a multiple of the floats in a register; so are the slopes of the activation.
        kernel: its rows and columns.
        geometry: of the convolution; its padding adds zeros, and there is one group.
        epilogue: without a norm; the channels of its skip have stride 1, and its activation is ``None`` or one of
            ``PASS_ACTIVATIONS``.
        out: [N, O, H', W'] whose pixels are evenly spaced. It may be other channels of the map that ``x`` is a slice
            of.
    """
    kind, slopes = activation_arguments(epilogue.activation, len(bias))
    skip = epilogue.skip
    (n, i, h, w), (_, o, rows, columns) = x.shape, out.shape
    left, _, top, _ = geometry.padding.sides
    x_step, out_step = pixel_step(x), pixel_step(out)
    assert x_step is not None and out_step is not None, "the pixels are not evenly spaced"
    maps = n, h, w, i, o, geometry.stride, x_step, out_step, rows, columns
    shape = *maps, *kernel, left, top, geometry.dilation
    convolve("pointwise_conv", x, skip, out, ConvConstants(weights, bias, kind, slopes, shape))


def depthwise_conv(
    x: Tensor,
    weights: Tensor,
    bias: Tensor,
    geometry: Geometry,
    skip: Tensor | None,
    activation: Activation | None,
    out: Tensor,
) -> None:
    """Fills ``out`` with ``activation`` of a depthwise convolution of ``x`` + ``bias`` + ``skip``. All are float32.

    Args:
        x: [N, C, H, W] whose pixels are evenly spaced, as :func:`pixel_step` has it.
        weights: packed as csrc/depthwise_conv.h says.
        bias: [C], filled up with zeros to a multiple of a panel; so are the slopes of the activation.
        geometry: a stride of 1 or 2, and zeros beyond the border, on no side more than the kernel is wide.
        skip: of the shape of ``out``, with channels of stride 1, or ``None``.
        activation: one of ``PASS_ACTIVATIONS``, or ``None``.
        out: [N, C, H', W'] whose pixels are evenly spaced. It may be other channels of the map that ``x`` is a slice
            of.
    """
    kind, slopes = activation_arguments(activation, len(bias))
    (n, c, h, w), (_, _, rows, columns) = x.shape, out.shape
    left, _, top, _ = geometry.padding.sides
    kernel = math.isqrt(weights.shape[1])
    x_step, out_step = pixel_step(x), pixel_step(out)
    assert x_step is not None and out_step is not None, "the pixels are not evenly spaced"
    shape = n, h, w, c, kernel, geometry.stride, left, top, rows, columns, x_step, out_step
    convolve("depthwise_conv", x, skip, out, ConvConstants(weights, bias, kind, slopes, shape))


def stem_conv(
    x: Tensor,
    weights: Tensor,
    bias: Tensor,
    kernel: int,
    geometry: Geometry,
    epilogue: Epilogue,
) -> None:
    """Fills ``epilogue.out`` with a convolution of ``x`` from few channels + ``bias``, with skip and activation.

    Args:
        x: float32 [N, I, H, W] whose pixels are evenly spaced, as :func:`pixel_step` has it.
        weights: packed as csrc/stem_conv.h says.
        bias: [O], filled up with zeros to a multiple of half a panel; so are the slopes of the activation.
        kernel: how many pixels wide and high it is.
        geometry: a stride, and zeros beyond the border.
        epilogue: a skip with channels of stride 1, or ``None``; an activation of ``PASS_ACTIVATIONS``, or ``None``;
            ``out`` float32 [N, O, H', W'] whose pixels are evenly spaced.
    """
    skip, out = epilogue.skip, epilogue.out
    assert out is not None
    kind, slopes = activation_arguments(epilogue.activation, len(bias))
    (n, i, h, w), (_, o, rows, columns) = x.shape, out.shape
    left, _, top, _ = geometry.padding.sides
    x_step, out_step = pixel_step(x), pixel_step(out)
    assert x_step is not None and out_step is not None, "the pixels are not evenly spaced"
    shape = n, h, w, i, o, kernel, geometry.stride, left, top, rows, columns, x_step, out_step
    convolve("stem_conv", x, skip, out, ConvConstants(weights, bias, kind, slopes, shape))


def rgb_conv_head(products: Tensor, bias: Tensor, out: Tensor, left: int, reflect: bool, output: str) -> None:
    """Fills ``out`` with the picture made of the partial products of the last convolution; see csrc/rgb_conv.h.

    Args:
        products: [1, k·3, H, columns] of a k×k convolution, channels-last, float32 or bfloat16.
        bias: float32 [3].
        out: [3, H, W], uint8 or floating-point.
        left: the padding on the left.
        reflect: whether the border reflects the image; otherwise it is zeros.
        output: of the network, ``"tanh"``, ``"linear"`` or ``"plain"``.
    """
    _, channels, height, columns = products.shape
    _C.rgb_conv_head_cpu(
        products.data_ptr(),
        bias.data_ptr(),
        out.data_ptr(),
        DTYPES[products.dtype],
        dtype_name(out.dtype),
        output,
        (height, columns, channels // 3, left, out.shape[2]),
        reflect,
        strides_of(out[None]),
        torch.get_num_threads(),
    )


def rgb_conv_stem_winograd(x: Tensor, weights: Tensor, bias: Tensor, padding: Padding, relu: bool, out: Tensor) -> None:
    """Fills ``out`` with a 9×9 convolution of ``x`` + ``bias``, after a ReLU if ``relu``. All are float32.

    Args:
        x: [N, 3, H, W], channels-last.
        weights: as in csrc/kernels.h.
        bias: [O].
        padding: of ``x``.
        out: [N, O, H', W'], channels-last.
    """
    _C.rgb_conv_stem_winograd_cpu(
        x.data_ptr(),
        weights.data_ptr(),
        bias.data_ptr(),
        out.data_ptr(),
        _rgb_conv_shape(x, out, padding),
        padding.mode == "reflect",
        relu,
        torch.get_num_threads(),
    )


def rgb_conv_head_winograd(
    x: Tensor, weights: Tensor, bias: Tensor, padding: Padding, output: str, out: Tensor
) -> None:
    """Fills ``out`` with the picture that a 9×9 convolution of ``x`` + ``bias`` makes.

    Args:
        x: float32 [N, C, H, W], channels-last.
        weights: float32, as in csrc/kernels.h.
        bias: float32 [3].
        padding: of ``x``.
        output: of the network, ``"tanh"``, ``"linear"`` or ``"plain"``.
        out: [N, 3, H', W'], uint8 or floating-point.
    """
    _C.rgb_conv_head_winograd_cpu(
        x.data_ptr(),
        weights.data_ptr(),
        bias.data_ptr(),
        out.data_ptr(),
        dtype_name(out.dtype),
        output,
        _rgb_conv_shape(x, out, padding),
        padding.mode == "reflect",
        strides_of(out),
        torch.get_num_threads(),
    )


def _rgb_conv_shape(x: Tensor, out: Tensor, padding: Padding) -> tuple[int, int, int, int, int, int, int, int, int]:
    """``RGBConvShape`` of csrc/rgb_conv.h."""
    (n, c, h, w), (_, o, rows, columns) = x.shape, out.shape
    return n, h, w, c, rows, columns, o, padding.sides[0], padding.sides[2]
