"""The only caller of the compiled module: says what it supports, and passes it pointers, stream and device.

Where a function fills a tensor, the caller has allocated it. "Channels-last" means dense in that memory format.
"""

from __future__ import annotations

import math
import os
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastperc.types import Padding, Window

try:
    from fastperc import _C

    _missing, _has_cuda = None, bool(_C.build_info()["cuda"])  # once: torch.compile cannot trace a call of _C
except ImportError as error:  # installed without a compiler, or broken
    _C, _has_cuda = None, False  # type: ignore[assignment]
    _missing = f"the compiled module fastperc._C cannot be imported ({error})"
    warnings.warn(
        "fastperc has no compiled kernels: networks and losses run in plain PyTorch, up to three times slower on a "
        "CPU; install a C++ compiler and Python's headers, then fastperc again",
        stacklevel=1,
    )

DTYPES = {torch.float32: "float32", torch.float64: "float64", torch.float16: "float16", torch.bfloat16: "bfloat16"}
Sides = tuple[Tensor | None, Tensor | None]
WINOGRAD_PANEL = 32  # winograd_panel in csrc/conv3x3.h


def why_not(x: Tensor) -> str | None:
    """Why no compiled kernel can serve ``x``, or ``None`` if one can."""
    if _missing:
        return _missing
    if x.dtype not in DTYPES:
        return f"no kernel for {x.dtype}"
    if x.device.type == "cpu" or (x.device.type == "cuda" and _has_cuda and not torch.version.hip):
        return None
    return f"no compiled kernel for {x.device.type} tensors in this build"


def build_info() -> dict[str, Any]:
    """The compiler and the CUDA version that built the module, or ``missing``: why there is no module."""
    return {"missing": _missing} if _missing else {**_C.build_info()}


def reuse_freed_memory(block: int, kept: int) -> None:
    """Makes malloc serve up to ``block`` bytes from freed memory, and keep up to ``kept`` bytes of it in the process.

    Does nothing if the environment already configures malloc by MALLOC_MMAP_THRESHOLD_.
    """
    if not _missing and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        _C.reuse_freed_memory(block, kept)


class RowLayout(NamedTuple):
    """An image as rows of consecutive elements, as ``RowShape`` and ``RowStrides`` in csrc/tv_loss.h describe it."""

    tensor: Tensor
    shape: tuple[int, int, int, int, int]  # outer, inner, rows, length, step
    strides: tuple[int, int, int]  # of outer, inner and rows, in elements


def is_channels_last(x: Tensor) -> bool:
    """Whether ``x`` [N, C, H, W] has the channels of a pixel next to each other, and more than one of them."""
    return x.stride(1) == 1 and x.stride(3) == x.shape[1] and x.shape[1] > 1


def row_layout(x: Tensor) -> RowLayout:
    """``x`` [N, C, H, W] as rows of consecutive elements; copied first if neither its columns nor its channels are."""
    if not is_channels_last(x) and x.stride(3) != 1:
        x = x.contiguous()
    n, c, h, w = x.shape
    if is_channels_last(x):
        return RowLayout(x, (n, 1, h, w * c, c), (x.stride(0), 0, x.stride(2)))
    return RowLayout(x, (n, c, h, w, 1), (x.stride(0), x.stride(1), x.stride(2)))


def tv_loss_fwd(x: Tensor, grad: Tensor | None, loss: Tensor, norm: str) -> None:
    """Fills ``loss`` with the total variation of ``x`` and, unless it is ``None``, ``grad`` with the gradient.

    Args:
        x: [N, C, H, W], of a dtype in ``DTYPES``, on the CPU or a CUDA device.
        grad: of the shape, dtype and memory format of ``x``.
        loss: a scalar, float64 for float64, else float32.
        norm: ``"l2"`` or ``"l1"``.
    """
    rows = row_layout(x)
    x = rows.tensor
    out = rows if grad is None else row_layout(grad)
    assert out.shape == rows.shape, "grad must have the memory format of x"
    grad_ptr = 0 if grad is None else grad.data_ptr()
    common = (DTYPES[x.dtype], norm, rows.shape, rows.strides, out.strides)
    if x.device.type == "cpu":
        _C.tv_loss_fwd_cpu(x.data_ptr(), grad_ptr, loss.data_ptr(), *common, torch.get_num_threads())
        return
    with torch.cuda.device(x.device):
        partials = loss.new_empty(_C.tv_loss_partials(rows.shape))
        stream = torch.cuda.current_stream().cuda_stream
        _C.tv_loss_fwd_cuda(x.data_ptr(), grad_ptr, loss.data_ptr(), partials.data_ptr(), *common, stream)


def _image_shape(x: Tensor) -> tuple[int, int, int, int]:
    """The shape of ``x``, channels-last, in the kernels' order: images, rows, columns, channels."""
    assert x.is_contiguous(memory_format=torch.channels_last)
    n, c, h, w = x.shape
    return n, h, w, c


def relu_mask_fwd(x: Tensor, bits: Tensor) -> None:
    """Sets one bit for each positive element of ``x``, in memory order; ``bits``: uint8 [numel / 8, rounded up]."""
    _C.relu_mask_fwd_cpu(x.data_ptr(), bits.data_ptr(), DTYPES[x.dtype], x.numel(), torch.get_num_threads())


def relu_mask_bwd(grad: Tensor, bits: Tensor) -> None:
    """Zeroes ``grad``, of the memory format of ``x``, where the bit from :func:`relu_mask_fwd` is not set."""
    _C.relu_mask_bwd_cpu(grad.data_ptr(), bits.data_ptr(), DTYPES[grad.dtype], grad.numel(), torch.get_num_threads())


def relu_pool_fwd(x: Tensor, pooled: Tensor, winners: Tensor) -> None:
    """Fills ``pooled`` with the maxima over 2×2 windows of ``x`` and ``winners`` with their positions in the windows.

    Args:
        x: the output of a ReLU [N, C, H, W], channels-last.
        pooled: [N, C, H / 2, W / 2], channels-last, of the dtype of ``x``.
        winners: uint8 [n, H / 2, W / 2, C], for the first n images.
    """
    shape, threads = _image_shape(x), torch.get_num_threads()
    pointers = (x.data_ptr(), pooled.data_ptr(), winners.data_ptr())
    _C.relu_pool_fwd_cpu(*pointers, DTYPES[x.dtype], shape, winners.shape[0], threads)


def relu_pool_bwd(grad_pooled: Tensor, winners: Tensor, grad: Tensor) -> None:
    """Fills ``grad`` with ``grad_pooled`` where a pixel is the positive maximum of its window, else with 0."""
    shape, threads = _image_shape(grad), torch.get_num_threads()
    pointers = (grad_pooled.data_ptr(), winners.data_ptr(), grad.data_ptr())
    _C.relu_pool_bwd_cpu(*pointers, DTYPES[grad.dtype], shape, threads)


def lpips_distance(
    features: tuple[Tensor, Tensor],
    weight: Tensor,
    distances: Tensor | None = None,
    incoming: Tensor | None = None,
    gradients: Sides = (None, None),
    inverses: Sides = (None, None),
    after_relu: bool = False,
) -> None:
    """Fills what is given of the distances between two feature maps and their gradients; see csrc/lpips_distance.h.

    Args:
        features: [N, C, H, W] both, whose pixels are evenly spaced in memory.
        weight: [C], in float64 for float64, else in float32, as all but ``gradients``; contiguous.
        distances: [N, 1, H, W], contiguous.
        incoming: the gradient of the distances, as ``distances``; without it the gradients are the units.
        gradients: of both features, of their shape and dtype, whose pixels are evenly spaced; they may be the features.
        inverses: 1 / (norm + eps) of both features, as ``distances``.
        after_relu: whether the features are the output of a ReLU, which the gradients pass too.
    """
    tensors = (*features, weight, incoming, distances, *gradients, *inverses)
    _C.lpips_distance_cpu(
        tuple(0 if x is None else x.data_ptr() for x in tensors),  # type: ignore[arg-type]
        tuple((0, 0, 0) if x is None else _pixel_strides(x) for x in (*features, *gradients)),  # type: ignore[arg-type]
        after_relu,
        DTYPES[features[0].dtype],
        (len(features[0]), features[0].shape[2:].numel(), features[0].shape[1]),
        torch.get_num_threads(),
    )


def _pixel_strides(x: Tensor) -> tuple[int, int, int]:
    """Elements from one image, pixel and channel of ``x`` [N, C, H, W] to the next."""
    row, column = x.stride()[2:]
    assert x.shape[2] == 1 or x.shape[3] == 1 or row == x.shape[3] * column, "the pixels are not evenly spaced"
    return x.stride(0), row if x.shape[3] == 1 else column, x.stride(1)


def image_io(image: Tensor, window: Window, scale: float, shift: float, out: Tensor) -> None:
    """Fills ``out`` with ``scale`` · ``image`` + ``shift`` in the ``window``; past its border the image is reflected.

    Args:
        image: [N, 3, H, W], uint8 or floating-point.
        out: [N, 3, height, width] of the window, channels-last, floating-point.
    """
    _C.image_io_cpu(
        image.data_ptr(),
        out.data_ptr(),
        _dtype_name(image.dtype),
        DTYPES[out.dtype],
        len(image),
        (image.shape[2], image.shape[3], *window),
        _strides(image),
        scale,
        shift,
        torch.get_num_threads(),
    )


def rgb_conv_head(products: Tensor, bias: Tensor, out: Tensor, left: int, reflect: bool, output: str) -> None:
    """Fills ``out`` with the picture made of the partial products of the last convolution; see csrc/rgb_conv.h.

    Args:
        products: [1, k·3, H, columns] of a k×k convolution, channels-last, float32 or bfloat16.
        bias: float32 [3].
        out: [3, H, W], uint8 or floating-point.
        left: the padding on the left.
        reflect: whether the border reflects the image; otherwise it is zeros.
        output: of the network, ``"tanh"`` or ``"linear"``.
    """
    _, channels, height, columns = products.shape
    _C.rgb_conv_head_cpu(
        products.data_ptr(),
        bias.data_ptr(),
        out.data_ptr(),
        DTYPES[products.dtype],
        _dtype_name(out.dtype),
        output,
        (height, columns, channels // 3, left, out.shape[2]),
        reflect,
        _strides(out[None]),
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
        output: of the network, ``"tanh"`` or ``"linear"``.
        out: [N, 3, H', W'], uint8 or floating-point.
    """
    _C.rgb_conv_head_winograd_cpu(
        x.data_ptr(),
        weights.data_ptr(),
        bias.data_ptr(),
        out.data_ptr(),
        _dtype_name(out.dtype),
        output,
        _rgb_conv_shape(x, out, padding),
        padding.mode == "reflect",
        _strides(out),
        torch.get_num_threads(),
    )


def _rgb_conv_shape(x: Tensor, out: Tensor, padding: Padding) -> tuple[int, int, int, int, int, int, int, int, int]:
    """``RGBConvShape`` of csrc/rgb_conv.h."""
    (n, c, h, w), (_, o, rows, columns) = x.shape, out.shape
    return n, h, w, c, rows, columns, o, padding.sides[0], padding.sides[2]


def channel_mean_m2(x: Tensor) -> Tensor:
    """The mean and Σ (x - mean)² of each channel of each image of ``x``, channels-last: float64 [N, 2, C]."""
    statistics = torch.empty(len(x), 2, x.shape[1], dtype=torch.float64)
    pointers = x.data_ptr(), statistics.data_ptr()
    _C.channel_statistics_cpu(*pointers, DTYPES[x.dtype], _image_shape(x), torch.get_num_threads())
    return statistics


def scale_shift(x: Tensor, scale: Tensor, shift: Tensor, skip: Tensor | None, relu: bool, out: Tensor) -> None:
    """Fills ``out`` with ``x`` · ``scale`` + ``shift`` + ``skip``, after a ReLU if ``relu``.

    Args:
        x: [N, C, H, W], channels-last.
        scale, shift: float32 [N, C].
        skip: [N, C, H, W] whose channels have stride 1, or ``None``.
        out: of the shape, dtype and strides of ``x``; may be ``x``.
    """
    assert out.stride() == x.stride() and (skip is None or skip.stride(1) == 1 or skip.shape[1] == 1)
    _C.scale_shift_cpu(
        x.data_ptr(),
        scale.data_ptr(),
        shift.data_ptr(),
        0 if skip is None else skip.data_ptr(),
        out.data_ptr(),
        DTYPES[x.dtype],
        _image_shape(x),
        (0, 0, 0, 0) if skip is None else _strides(skip),
        relu,
        torch.get_num_threads(),
    )


def norm_gradient_sums(x: Tensor, grad: Tensor, norm: tuple[Tensor, Tensor, Tensor], relu: bool) -> Tensor:
    """The sums Σ g and Σ g · (``x`` - mean) over each channel of each image: float64 [N, 2, C].

    g is ``grad`` or, if ``relu``, ``grad`` where x · scale + shift is positive and 0 elsewhere.

    Args:
        x, grad: [N, C, H, W], channels-last.
        norm: mean, scale and shift, float32 [N, C] each.
    """
    sums = torch.empty(len(x), 2, x.shape[1], dtype=torch.float64)
    pointers = x.data_ptr(), grad.data_ptr(), _pointers(norm), sums.data_ptr()
    _C.norm_gradient_sums_cpu(*pointers, DTYPES[x.dtype], _image_shape(x), relu, torch.get_num_threads())
    return sums


def norm_gradient(
    x: Tensor, grad: Tensor, norm: tuple[Tensor, Tensor, Tensor], factors: Tensor, relu: bool, out: Tensor
) -> None:
    """Fills ``out`` with g · ``factors[:, 0]`` + (``x`` - mean) · ``factors[:, 1]`` + ``factors[:, 2]``.

    ``factors`` is float32 [N, 3, C]. g and the other arguments are those of :func:`norm_gradient_sums`.
    """
    pointers = x.data_ptr(), grad.data_ptr(), _pointers(norm), factors.data_ptr(), out.data_ptr()
    _C.norm_gradient_cpu(*pointers, DTYPES[x.dtype], _image_shape(x), relu, torch.get_num_threads())


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
    (o, i), strides, first = weight.shape[:2], _strides(weight), weight.data_ptr()
    if data_gradient:  # negative strides from the last tap on
        stride_o, stride_i, stride_row, stride_column = strides
        first += 2 * (stride_row + stride_column) * weight.itemsize
        (o, i), strides = (i, o), (stride_i, stride_o, -stride_row, -stride_column)
    transformed = weight.new_empty(o // WINOGRAD_PANEL, (tile + 2) ** 2, i, WINOGRAD_PANEL)
    _C.winograd_weights_cpu(first, transformed.data_ptr(), i, o, strides, tile, torch.get_num_threads())
    return transformed


def winograd_conv(
    x: Tensor, weights: Tensor, bias: Tensor | None, padding: int, skip: Tensor | None, relu: bool, out: Tensor
) -> None:
    """Fills ``out`` with a 3×3 convolution of ``x`` + ``bias`` + ``skip``, after a ReLU if ``relu``. All are float32.

    Args:
        x: [N, I, H, W], channels-last.
        weights: the result of :func:`winograd_weights`, whose size tells the tile.
        bias: [O], or ``None``.
        padding: zeros on each side.
        skip: of the shape of ``out``, with channels of stride 1, or ``None``.
        out: [N, O, H + 2·padding - 2, W + 2·padding - 2], channels-last.
    """
    assert skip is None or (skip.shape == out.shape and skip.stride(1) == 1 and skip.dtype == out.dtype)
    _C.winograd_conv_cpu(
        x.data_ptr(),
        weights.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        0 if skip is None else skip.data_ptr(),
        out.data_ptr(),
        _winograd_shape(x, out, padding, math.isqrt(weights.shape[1]) - 2),
        (0, 0, 0, 0) if skip is None else _strides(skip),
        relu,
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
    pointers = x.data_ptr(), grad.data_ptr(), weight.data_ptr(), 0 if bias is None else bias.data_ptr()
    shape, strides = _winograd_shape(x, grad, padding, 2), _strides(weight)
    _C.winograd_weight_gradient_cpu(*pointers, shape, strides, torch.get_num_threads())


def _winograd_shape(x: Tensor, y: Tensor, padding: int, tile: int) -> tuple[int, int, int, int, int, int, int]:
    """``WinogradShape`` in csrc/conv3x3.h of the convolution from ``x`` to ``y``."""
    (n, h, w, i), (_, rows, columns, o) = _image_shape(x), _image_shape(y)
    assert (rows, columns) == (h + 2 * padding - 2, w + 2 * padding - 2)
    assert i % WINOGRAD_PANEL == 0 and o % WINOGRAD_PANEL == 0
    return n, h, w, i, o, padding, tile


def _pointers(norm: tuple[Tensor, Tensor, Tensor]) -> tuple[int, int, int]:
    mean, scale, shift = norm
    return mean.data_ptr(), scale.data_ptr(), shift.data_ptr()


def _strides(x: Tensor) -> tuple[int, int, int, int]:
    n, c, h, w = x.stride()
    return n, c, h, w


def _dtype_name(dtype: torch.dtype) -> str:
    return "uint8" if dtype == torch.uint8 else DTYPES[dtype]
