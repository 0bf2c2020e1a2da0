"""A frozen network's last convolution, to three channels, with the scaling and the rounding that follow it.

Its horizontal taps are columns of the product, as in ``ops.rgb_conv``; csrc/rgb_conv.cpp and kernels/rgb_conv_head.py
say how they are added up. In float32 on a CPU Winograd's algorithm takes 25 products for an output where the definition
of a 9×9 convolution takes 81, and that of a 7×7 one 49: csrc/rgb_conv_winograd.cpp says how.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastperc import _native, backends, kernels, reference
from fastperc.backends import Implementation, Operation, TuningCases, first_two_arguments, register
from fastperc.ops import gpu_epilogue, onednn, winograd_9x9
from fastperc.ops.common import (
    COMMON_CPP_SOURCES,
    COMMON_CUDA_SOURCES,
    channels_last,
    check_shapes,
    in_dtype,
    packed,
    why_not_cpp,
    why_not_frozen,
)
from fastperc.ops.conv_bn_relu import padded
from fastperc.ops.rgb_conv import RGB_CONV, taps_as_filters
from fastperc.types import Geometry, Padding, same_sides

OUTPUTS = ("tanh", "linear", "plain")
PIXELS_AT_ONCE = 1 << 18  # of the products on the CPU: enough that the rows which two blocks share cost little


def rgb_conv_head(x: Tensor, weight: Tensor, bias: Tensor, padding: Padding, output: str, out: Tensor) -> None:
    """The last convolution, and the conversion of its output to a picture.

    Args:
        x: [N, C, H, W].
        weight, bias: [3, C, k, k] and [3].
        padding: as for :func:`~fastperc.ops.conv_bn_relu`.
        output: ``"tanh"``: 0.5 + 150/255 · tanh; ``"linear"``: over 255; ``"plain"``: the convolution itself.
        out: [N, 3, H', W'] of any strides, filled with RGB in 0–1; if it is uint8 with levels, clamped and rounded to
            the nearest, where NaN becomes 0. A plain output is floating-point, of any range.

    Raises:
        ValueError: shapes that do not fit, no such output, or levels of a plain output.
    """
    check_shapes(x, weight, bias, weight.shape[1])
    kernel, (left, right, top, bottom) = weight.shape[2], padding.sides
    expected = (len(x), 3, x.shape[2] + top + bottom - kernel + 1, x.shape[3] + left + right - kernel + 1)
    if output not in OUTPUTS or out.shape != expected or len(bias) != 3:
        raise ValueError(
            f"expected 3 filters, an output among {', '.join(OUTPUTS)} and a picture {list(expected)}, "
            f"got {len(bias)}, {output!r} and {list(out.shape)}"
        )
    if output == "plain" and out.dtype == torch.uint8:
        raise ValueError("a plain output has no levels: out must be floating-point")
    RGB_CONV_HEAD(x, weight, bias, padding, output, out)


def _why_not_border(padding: Padding) -> str | None:
    return "the border repeats pixels" if padding.mode not in ("zeros", "reflect") else None


def _why_not_triton(x: Tensor, weight: Tensor, bias: Tensor, padding: Padding, output: str, out: Tensor) -> str | None:
    return why_not_frozen(x, weight, bias) or _why_not_border(padding) or backends.why_not_triton_product(x)


def _triton(x: Tensor, weight: Tensor, bias: Tensor, padding: Padding, output: str, out: Tensor) -> None:
    head, x = kernels.rgb_conv_head, channels_last(x)
    weights = packed(("head", x.dtype), lambda: head.pack(weight.detach().float()).to(x.dtype), weight)
    with backends.on_device(x):
        head.rgb_conv_head_fwd(x, weights, bias.float(), out, padding, None if output == "plain" else output)


def _why_not_winograd(
    x: Tensor, weight: Tensor, bias: Tensor, padding: Padding, output: str, out: Tensor
) -> str | None:
    reason = why_not_frozen(x, weight, bias) or _why_not_border(padding)
    return reason or winograd_9x9.why_not(x, weight, bias, (9, 7))


def _why_slow_winograd(
    x: Tensor, weight: Tensor, bias: Tensor, padding: Padding, output: str, out: Tensor
) -> str | None:
    return winograd_9x9.why_slow(len(x), *out.shape[2:])


def _winograd(x: Tensor, weight: Tensor, bias: Tensor, padding: Padding, output: str, out: Tensor) -> None:
    def pack() -> Tensor:  # [25, C, panel]: the blocks of the kernel, and the filters, are columns
        columns = winograd_9x9.transformed(weight).permute(0, 3, 1, 2, 4).flatten(2)
        return F.pad(columns, (0, _native.WINOGRAD_PANEL - columns.shape[2])).contiguous()

    weights = packed("winograd", pack, weight)
    padding = winograd_9x9.with_ring(padding, weight)
    _native.rgb_conv_head_winograd(channels_last(x), weights, bias.contiguous(), padding, output, out)


def _why_not_native(x: Tensor, weight: Tensor, bias: Tensor, padding: Padding, output: str, out: Tensor) -> str | None:
    reason = why_not_frozen(x, weight, bias) or _why_not_border(padding)
    return reason or onednn.why_not(x) or why_not_cpp(x)


def _native_head(x: Tensor, weight: Tensor, bias: Tensor, padding: Padding, output: str, out: Tensor) -> None:
    """oneDNN's product, and a pass of C++; some rows of an image at a time, for the product is nine times the picture.

    Columns beyond the border are no part of the product: the pass leaves them out, or takes reflected ones.
    """
    left, _, top, _ = padding.sides
    x, height, kernel = channels_last(x), x.shape[2], weight.shape[2]
    step = max(PIXELS_AT_ONCE // x.shape[3], 1)
    shifts = bias.float()
    for image, picture in zip(x, out):
        for first in range(0, out.shape[2], step):
            last = min(first + step, out.shape[2])
            low, high = first - top, last - top + kernel - 1  # the rows of x that these rows read
            rows = image[None, :, max(low, 0) : high]
            border = Padding((0, 0, max(-low, 0), max(high - height, 0)), padding.mode)
            rows, zeros = padded(channels_last(rows), border)
            products = onednn.convolution(rows, weight, None, Geometry(padding=zeros), arrange=taps_as_filters)
            _native.rgb_conv_head(products, shifts, picture[:, first:last], left, padding.mode == "reflect", output)


def _why_not_picture(x: Tensor, weight: Tensor, bias: Tensor, padding: Padding, output: str, out: Tensor) -> str | None:
    return why_not_frozen(x, weight, bias) or gpu_epilogue.why_not(x)


def _picture(x: Tensor, weight: Tensor, bias: Tensor, padding: Padding, output: str, out: Tensor) -> None:
    """The library's convolution without a bias, and a CUDA pass that makes its output a picture."""
    y = reference.convolve(channels_last(x), in_dtype(weight, x.dtype), None, 1, padding)
    _native.picture(y, bias.detach().float().contiguous(), output, out)


def _plain(x: Tensor, weight: Tensor, bias: Tensor, padding: Padding, output: str, out: Tensor) -> None:
    reference.rgb_conv_head(x, in_dtype(weight, x.dtype), bias, padding, output, out)


def _tuned_call(x: Tensor, weight: Tensor) -> tuple[object, ...]:
    return x, weight, weight.new_zeros(3), same_sides(4), "tanh", x.new_empty(len(x), 3, *x.shape[2:])


RGB_CONV_HEAD = register(
    Operation(
        "rgb_conv_head",
        "9×9 conv to RGB",
        (
            Implementation("triton", _triton, _why_not_triton),
            Implementation("native", _winograd, _why_not_winograd, _why_slow_winograd, "winograd"),
            Implementation("native", _native_head, _why_not_native, label="onednn"),
            Implementation("native", _picture, _why_not_picture, label="epilogue"),
            Implementation("reference", _plain),
        ),
        TuningCases(lambda batch, size: [((batch, 32, size, size), (3, 32, 9, 9))], _tuned_call),
        (
            *COMMON_CPP_SOURCES,
            *RGB_CONV.sources,
            *COMMON_CUDA_SOURCES,
            "csrc/image_io*",
            "csrc/rgb_conv*",
            "kernels/rgb_conv_head.py",
            "csrc/conv3x3_tile.h",
            "fastperc/ops/gpu_epilogue.py",
            "fastperc/ops/rgb_conv_head.py",
            "fastperc/ops/winograd_9x9.py",
        ),
        first_two_arguments,
        frozen=True,
    )
)
