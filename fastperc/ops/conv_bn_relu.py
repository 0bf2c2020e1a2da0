"""A frozen network's convolution with all that follows it: a batch norm folded into its weights, or an instance norm; a
skip; ReLU.

``"triton"`` is the fused kernel; ``"native"`` is a convolution by Winograd or a library's with what that can fuse:
oneDNN's on the CPU, cuDNN's on a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastperc import backends, reference
from fastperc.ops import onednn
from fastperc.ops.conv3x3 import slower, winograd
from fastperc.ops.conv3x3 import unsupported as winograd_unsupported
from fastperc.ops.frozen import (
    channels_last,
    check,
    empty_like,
    in_dtype,
    native_unsupported,
    side_by_side,
    unsupported,
)
from fastperc.ops.instance_norm import native_instance_norm, triton_finish
from fastperc.types import InstanceNorm, Padding


def conv_bn_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: int = 1,
    padding: Padding = (0, 0, 0, 0),
    padding_mode: str = "zeros",
    norm: InstanceNorm | None = None,
    relu: bool = True,
    skip: Tensor | None = None,
) -> Tensor:
    """relu(norm(conv(``x``)) + ``skip``).

    Args:
        x: [N, I, H, W]; float32, float16, bfloat16 or float64; best in channels-last memory.
        weight: [O, I, k, k], in float32 or ``x``'s dtype; a batch norm is folded into it beforehand.
        bias: [O].
        stride: 1 or 2.
        padding: (left, right, top, bottom) in pixels.
        padding_mode: ``"zeros"`` or ``"reflect"``.
        norm: an instance norm, by weight [O], bias [O] and eps.
        relu: whether a ReLU comes last.
        skip: [N, O, H', W'], added before it.

    Returns:
        [N, O, H', W'] in ``x``'s dtype.

    Raises:
        ValueError: shapes that do not fit.
    """
    check(x, weight, bias, weight.shape[1])
    if padding_mode == "zeros":
        padding = evened(padding, x, weight.shape[2], stride)
    obstacle = unsupported(x, weight, bias, norm, skip)
    backend = backends.choose(
        "conv_bn_relu",
        x,
        weight,
        triton=obstacle or backends.triton_product_unsupported(x),
        native=obstacle or library_unsupported(x, padding, padding_mode, norm, relu),
    )
    if backend == "triton":
        return triton_conv_bn_relu(x, weight, bias, stride, padding, padding_mode, norm, relu, side_by_side(skip))
    if backend == "reference":
        return reference.conv_bn_relu(
            x, in_dtype(weight, x.dtype), bias, stride, padding, padding_mode, norm, relu, skip
        )
    x = channels_last(x)
    if x.device.type == "cuda":
        return cudnn_conv_relu(x, weight, bias, stride, padding, skip)
    x, around = padded(x, padding, padding_mode)
    if norm is None:
        return native_convolution(x, weight, bias, stride, around, relu, skip)
    y = native_convolution(x, weight, bias, stride, around)
    return native_instance_norm(y, norm, relu, skip, y)


def native_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: int,
    around: tuple[int, int],
    relu: bool = False,
    skip: Tensor | None = None,
) -> Tensor:
    """relu?(conv(``x``) + ``bias`` + ``skip``) on a CPU: by Winograd where that was measured faster, else oneDNN's."""
    padding = around[0]
    even = stride == 1 and around[1] == padding
    if not even or winograd_unsupported(x, weight, bias, padding) or slower(x, padding):
        return onednn.convolution(x, weight, bias, stride, around, relu, skip)
    return winograd(x, weight, bias, padding, relu, skip=skip)


def library_unsupported(
    x: Tensor, padding: Padding, padding_mode: str, norm: InstanceNorm | None, relu: bool
) -> str | None:
    """Why no library's fused convolution can take this call, or ``None`` if one can."""
    if x.device.type == "cuda":
        fusible = relu and norm is None and padding_mode == "zeros" and symmetric(padding)
        if not torch.backends.cudnn.is_available() or x.dtype == torch.float64:
            return "cuDNN is not there, or not for this dtype"
        return None if fusible else "cuDNN fuses a bias, a skip and a ReLU, no less and no more"
    return onednn.unsupported(x) or (norm and native_unsupported(x))


def symmetric(padding: Padding) -> bool:
    return padding[0] == padding[1] and padding[2] == padding[3]


def evened(padding: Padding, x: Tensor, kernel: int, stride: int) -> Padding:
    """``padding`` of zeros with as many on either side, where a stride of 2 leaves what that adds unread."""
    left, right, top, bottom = padding
    height, width = x.shape[2:]
    same_width = (width + 2 * left - kernel) // stride == (width + left + right - kernel) // stride
    same_height = (height + 2 * top - kernel) // stride == (height + top + bottom - kernel) // stride
    return (left, left, top, top) if same_width and same_height else padding


def padded(x: Tensor, padding: Padding, mode: str) -> tuple[Tensor, tuple[int, int]]:
    """``x``, and how many zeros a library is to add to it (left and right, above and below); for other paddings a copy
    with all of it."""
    if mode == "zeros" and symmetric(padding):
        return x, (padding[0], padding[2])
    return channels_last(reference.pad(x, padding, mode)), (0, 0)


def cudnn_conv_relu(
    x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: Padding, skip: Tensor | None
) -> Tensor:
    """relu(conv(``x``) + ``bias`` + ``skip``) in one call."""
    weight, bias = in_dtype(weight, x.dtype), bias.to(x.dtype)
    geometry = [stride, stride], [padding[2], padding[0]], [1, 1], 1
    if skip is None:
        return torch.cudnn_convolution_relu(x, weight, bias, *geometry)
    return torch.cudnn_convolution_add_relu(x, weight, channels_last(skip), 1.0, bias, *geometry)


def triton_conv_bn_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: int,
    padding: Padding,
    padding_mode: str,
    norm: InstanceNorm | None,
    relu: bool,
    skip: Tensor | None,
) -> Tensor:
    from fastperc.kernels import conv_bn_relu as kernels
    from fastperc.types import Deferred

    n, _, height, width = x.shape
    left, right, top, bottom = padding
    out_channels, _, kernel, _ = weight.shape
    rows, columns = ((size - kernel) // stride + 1 for size in (height + top + bottom, width + left + right))
    x, weight = channels_last(x), in_dtype(weight, x.dtype)
    out = empty_like(x, (n, out_channels, rows, columns))

    def fill(relu: bool, partials: Tensor | None) -> None:
        added = skip if partials is None else None  # else after the norm
        arguments = stride, padding, padding_mode, relu, partials
        kernels.conv_bn_relu_fwd(Deferred(x), weight, bias.float(), added, out, *arguments)

    def tiles() -> int:
        return kernels.conv_bn_relu_tiles(Deferred(x), out.shape)

    return triton_finish(out, tiles, fill, norm, relu, skip)
