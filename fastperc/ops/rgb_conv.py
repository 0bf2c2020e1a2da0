"""The 9×9 convolutions at a network's two ends: from a picture, which is normalised on the way, and to one.

The head has three filters, too few for a matrix unit; so its horizontal taps become columns of the product, 27 of them,
and nine shifted additions make each pixel (csrc/rgb_conv.cpp and kernels/rgb_conv_head.py say how). ``rgb_conv`` is the
head in training, ``rgb_conv_stem`` and ``rgb_conv_head`` are the two of a frozen network.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastperc import _native, backends, reference
from fastperc.ops import onednn
from fastperc.ops.conv_bn_relu import conv_bn_relu, padded
from fastperc.ops.frozen import (
    channels_last,
    check,
    empty_like,
    in_dtype,
    native_unsupported,
    transformed,
    unsupported,
)
from fastperc.ops.image_io import image_io, scale_of
from fastperc.ops.instance_norm import triton_finish
from fastperc.ops.packing import packed
from fastperc.types import InstanceNorm, Padding, Window

OUTPUTS = ("tanh", "linear")
PIXELS_AT_ONCE = 1 << 18  # of the products on the CPU: so many that the rows which two share do not count


def rgb_conv(x: Tensor, weight: Tensor, bias: Tensor, padding: int, padding_mode: str = "zeros") -> Tensor:
    """A convolution to few channels, with gradients: [N, C, H, W] → [N, O, H', W'].

    Args:
        x: [N, C, H, W].
        weight, bias: [O, C, k, k] and [O], O much less than C.
        padding: pixels on each side.
        padding_mode: as ``nn.Conv2d``'s.
    """
    obstacle = columns_unsupported(x, weight, bias)
    if backends.choose("rgb_conv", x, weight, native=obstacle) == "reference":
        return reference.convolve(x, weight, bias, 1, (padding,) * 4, padding_mode)
    dtype = product_dtype(x)
    x, weight = x.to(dtype), weight.to(dtype)
    beyond = padding  # columns of zeros, which are no part of the product
    if padding_mode != "zeros":
        x, padding, beyond = reference.pad(x, (padding,) * 4, padding_mode), 0, 0
    products = F.conv2d(channels_last(x), channels_last(columns_of(weight)), padding=(padding, 0))
    return (_Fold.apply(products, weight.shape[3], beyond) + bias.view(-1, 1, 1)).to(dtype)


def product_dtype(x: Tensor) -> torch.dtype:
    """What a convolution of ``x`` computes in: autocast's dtype, or its own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def columns_unsupported(x: Tensor, *parameters: Tensor) -> str | None:
    """Why the taps of ``rgb_conv`` cannot be columns of a product, or ``None`` if they can."""
    if obstacle := transformed():
        return obstacle
    if torch.float64 in {one.dtype for one in (x, *parameters)}:
        return "oneDNN does not compute in float64"
    if x.numel() == 0:
        return "the tensor is empty"
    return onednn.unsupported(x.new_empty(0, dtype=product_dtype(x)))


class _Fold(torch.autograd.Function):
    """Column j of the product moved left by j, and all added up in float32 or wider: [N, k·O, H, W] →
    [N, O, H, W + 2·beyond − k + 1]."""

    @staticmethod
    def forward(products: Tensor, k: int, beyond: int) -> Tensor:
        width = products.shape[3] + 2 * beyond - k + 1
        columns = F.pad(products, (beyond, beyond)).unflatten(1, (k, -1))
        out = channels_last(reference.widen(columns[:, 0, ..., :width]))
        for j in range(1, k):
            out += columns[:, j, ..., j : j + width]
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int, int], output: Tensor) -> None:
        products, ctx.k, ctx.beyond = inputs
        ctx.dtype = products.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Unfold.apply(grad, ctx.k, ctx.beyond, ctx.dtype), None, None


class _Unfold(torch.autograd.Function):
    """The adjoint of :class:`_Fold`, in ``dtype``: each gradient goes to all columns that made its pixel."""

    @staticmethod
    def forward(grad: Tensor, k: int, beyond: int, dtype: torch.dtype) -> Tensor:
        n, channels, height, width = grad.shape
        width = width + k - 1 - 2 * beyond
        grad = grad.to(dtype)
        out = empty_like(grad, (n, k * channels, height, width))
        columns, wide = out.unflatten(1, (k, channels)), F.pad(grad, (k - 1, k - 1))
        for j in range(k):
            first = k - 1 - j + beyond
            columns[:, j] = wide[..., first : first + width]
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int, int, torch.dtype], output: Tensor) -> None:
        _, ctx.k, ctx.beyond, _ = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _Fold.apply(grad, ctx.k, ctx.beyond), None, None, None


def rgb_conv_stem(
    image: Tensor,
    weight: Tensor,
    bias: Tensor,
    window: Window,
    scale: float,
    shift: float,
    padding: Padding,
    padding_mode: str = "zeros",
    norm: InstanceNorm | None = None,
    relu: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """:func:`~fastperc.ops.image_io` and the first convolution, [N, 3, H, W] → [N, O, H', W'] in ``dtype``.

    Args:
        image, window, scale, shift: as :func:`~fastperc.ops.image_io` has them.
        weight, bias, padding, padding_mode, norm, relu: as :func:`~fastperc.ops.conv_bn_relu` has them; the padding is
            that of the normalised window.
        dtype: what is computed in.

    Raises:
        ValueError: shapes that do not fit.
    """
    check(image, weight, bias, 3)
    like = torch.empty(0, dtype=dtype, device=image.device)
    obstacle = unsupported(image, weight, bias, norm) or backends.triton_product_unsupported(like)
    if backends.choose("rgb_conv_stem", image, weight, triton=obstacle, native=None) != "triton":
        # In two steps, each of which chooses for itself.
        x = image_io(image, window, scale, shift, dtype)
        return conv_bn_relu(x, weight, bias, 1, padding, padding_mode, norm, relu)

    from fastperc.kernels import rgb_conv_stem as kernels

    kernel = weight.shape[2]
    rows, columns = window.height + sum(padding[2:]) - kernel + 1, window.width + sum(padding[:2]) - kernel + 1
    out = empty_like(like, (len(image), len(bias), rows, columns))
    weights = packed(("stem", dtype), lambda: kernels.pack(weight.detach().float()).to(dtype), weight)
    with backends.on_device(image):
        x = kernels.rgb_prepare(image, window, padding, padding_mode, scale_of(image, scale), shift, dtype)

    def fill(relu: bool, partials: Tensor | None) -> None:
        kernels.rgb_conv_stem_fwd(x, weights, bias.float(), out, relu, partials)

    return triton_finish(out, lambda: kernels.rgb_conv_stem_tiles(out), fill, norm, relu)


def rgb_conv_head(
    x: Tensor, weight: Tensor, bias: Tensor, padding: Padding, padding_mode: str, output: str, out: Tensor
) -> None:
    """The last convolution and what makes a picture of it.

    Args:
        x: [N, C, H, W].
        weight, bias: [3, C, k, k] and [3].
        padding, padding_mode: as :func:`~fastperc.ops.conv_bn_relu` has them.
        output: ``"tanh"``: 0.5 + 150/255 · tanh; ``"linear"``: over 255.
        out: [N, 3, H', W'] of any strides, filled with RGB in 0–1; if it is uint8 with levels, clamped and rounded to
            the nearest, where NaN becomes 0.

    Raises:
        ValueError: shapes that do not fit, or no such output.
    """
    check(x, weight, bias, weight.shape[1])
    kernel = weight.shape[2]
    expected = (len(x), 3, x.shape[2] + sum(padding[2:]) - kernel + 1, x.shape[3] + sum(padding[:2]) - kernel + 1)
    if output not in OUTPUTS or out.shape != expected or len(bias) != 3:
        raise ValueError(
            f"expected 3 filters, an output among {', '.join(OUTPUTS)} and a picture {list(expected)}, "
            f"got {len(bias)}, {output!r} and {list(out.shape)}"
        )
    obstacle = unsupported(x, weight, bias)
    backend = backends.choose(
        "rgb_conv_head",
        x,
        weight,
        triton=obstacle or backends.triton_product_unsupported(x),
        native=obstacle or onednn.unsupported(x) or native_unsupported(x),
    )
    if backend == "reference":
        weight = in_dtype(weight, x.dtype)
        return reference.rgb_conv_head(x, weight, bias, padding, padding_mode, output, out)
    x = channels_last(x)
    if backend == "native":
        return native_head(x, weight, bias, padding, padding_mode, output, out)

    from fastperc.kernels import rgb_conv_head as kernels
    from fastperc.types import Deferred

    weights = packed(("head", x.dtype), lambda: kernels.pack(weight.detach().float()).to(x.dtype), weight)
    with backends.on_device(x):
        kernels.rgb_conv_head_fwd(Deferred(x), weights, bias.float(), out, padding, padding_mode, output)


def native_head(
    x: Tensor, weight: Tensor, bias: Tensor, padding: Padding, padding_mode: str, output: str, out: Tensor
) -> None:
    """oneDNN's product, and a pass of C++; some rows of an image at a time, for the product is nine times the picture.

    Columns beyond the border are no part of the product: the pass leaves them out, or takes mirrored ones.
    """
    left, _, top, _ = padding
    height, kernel = x.shape[2], weight.shape[2]
    step = max(PIXELS_AT_ONCE // x.shape[3], 1)
    shifts = bias.float()
    for image, picture in zip(x, out):
        for first in range(0, out.shape[2], step):
            last = min(first + step, out.shape[2])
            low, high = first - top, last - top + kernel - 1  # the rows of x that these rows take
            rows = image[None, :, max(low, 0) : high]
            beyond = (0, 0, max(-low, 0), max(high - height, 0))
            rows, around = padded(channels_last(rows), beyond, padding_mode)
            products = onednn.convolution(rows, weight, None, 1, around, arrange=columns_of)
            _native.rgb_conv_head(products, shifts, picture[:, first:last], left, padding_mode == "reflect", output)


def columns_of(weight: Tensor) -> Tensor:
    """[O, C, k, k] → [k·O, C, k, 1]: a filter for each horizontal tap."""
    return weight.permute(3, 0, 1, 2).flatten(0, 1)[..., None]
