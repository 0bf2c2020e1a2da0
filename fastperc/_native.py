"""The only door to the compiled module: what it can take, and pointers, stream and device handed over once."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastperc.types import Window

try:
    from fastperc import _C

    _missing = None
except ImportError as error:  # a checkout that was never built, or a module built for another Python
    _C = None  # type: ignore[assignment]
    _missing = f"fastperc._C is not there ({error}); run `pip install .`"

DTYPES = {torch.float32: "float32", torch.float64: "float64", torch.float16: "float16", torch.bfloat16: "bfloat16"}
WINOGRAD_PANEL = 32  # as csrc/conv3x3.h has it


def unsupported(x: Tensor) -> str | None:
    """Why no compiled kernel can take ``x``, or ``None`` if one can."""
    if _missing:
        return _missing
    if x.dtype not in DTYPES:
        return f"no kernel for {x.dtype}"
    if x.device.type == "cpu" or (x.device.type == "cuda" and _C.build_info()["cuda"] and not torch.version.hip):
        return None
    return f"no compiled kernel for {x.device.type} tensors in this build"


def build_info() -> dict[str, Any]:
    """What the module was built with, or why there is none."""
    return {"missing": _missing} if _missing else {**_C.build_info()}


def reuse_freed_memory(block: int, kept: int) -> None:
    """Has the process take memory for up to ``block`` bytes from what it freed before, and keep up to ``kept`` bytes of
    that; unless somebody has told its allocator otherwise."""
    if not _missing and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        _C.reuse_freed_memory(block, kept)


class _Rows(NamedTuple):
    """An image as rows of consecutive elements; csrc/tv_loss.h has the meaning of each number."""

    tensor: Tensor
    shape: tuple[int, int, int, int, int]
    strides: tuple[int, int, int]


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels of a pixel of ``x`` [N, C, H, W] lie together, and its columns do not."""
    return x.stride(1) == 1 and x.stride(3) == x.shape[1] and x.shape[1] > 1


def _rows(x: Tensor) -> _Rows:
    if not is_channels_last(x) and x.stride(3) != 1:
        x = x.contiguous()
    n, c, h, w = x.shape
    if is_channels_last(x):
        return _Rows(x, (n, 1, h, w * c, c), (x.stride(0), 0, x.stride(2)))
    return _Rows(x, (n, c, h, w, 1), (x.stride(0), x.stride(1), x.stride(2)))


def tv_loss_fwd(x: Tensor, grad: Tensor | None, loss: Tensor, norm: str) -> None:
    """Fills ``loss`` (a scalar) and, unless it is ``None``, ``grad`` (laid out as ``x`` is, dense) in one pass."""
    rows = _rows(x)
    x = rows.tensor
    out = rows if grad is None else _rows(grad)
    assert out.shape == rows.shape, "grad must be laid out as x"
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
    """The shape of ``x`` [N, C, H, W], dense in channels-last order, as the kernels read it."""
    assert x.is_contiguous(memory_format=torch.channels_last)
    n, c, h, w = x.shape
    return n, h, w, c


def relu_mask_fwd(x: Tensor, bits: Tensor) -> None:
    """Fills ``bits`` (uint8, numel / 8 rounded up) with whether each element of ``x`` is positive, as they lie."""
    _C.relu_mask_fwd_cpu(x.data_ptr(), bits.data_ptr(), DTYPES[x.dtype], x.numel(), torch.get_num_threads())


def relu_mask_bwd(grad: Tensor, bits: Tensor) -> None:
    """Zeroes ``grad``, laid out as ``x`` was, where its bit is not set."""
    _C.relu_mask_bwd_cpu(grad.data_ptr(), bits.data_ptr(), DTYPES[grad.dtype], grad.numel(), torch.get_num_threads())


def relu_pool_fwd(x: Tensor, pooled: Tensor, winners: Tensor) -> None:
    """Fills ``pooled`` with the maxima over 2×2 windows of ``x``, channels-last, and ``winners`` (uint8, for its first
    images) with where each came from."""
    shape, threads = _image_shape(x), torch.get_num_threads()
    pointers = (x.data_ptr(), pooled.data_ptr(), winners.data_ptr())
    _C.relu_pool_fwd_cpu(*pointers, DTYPES[x.dtype], shape, winners.shape[0], threads)


def relu_pool_bwd(grad_pooled: Tensor, winners: Tensor, grad: Tensor) -> None:
    """Fills ``grad`` with ``grad_pooled`` where a pixel is its window's winner and positive, else with 0."""
    shape, threads = _image_shape(grad), torch.get_num_threads()
    pointers = (grad_pooled.data_ptr(), winners.data_ptr(), grad.data_ptr())
    _C.relu_pool_bwd_cpu(*pointers, DTYPES[grad.dtype], shape, threads)


def image_io(image: Tensor, window: Window, scale: float, shift: float, out: Tensor) -> None:
    """Fills ``out`` [N, 3, height, width], channels-last, with the ``window`` of ``image`` [N, 3, H, W], times
    ``scale``, plus ``shift``."""
    _C.image_io_cpu(
        image.data_ptr(),
        out.data_ptr(),
        _pixels(image.dtype),
        DTYPES[out.dtype],
        len(image),
        (image.shape[2], image.shape[3], *window),
        _strides(image),
        scale,
        shift,
        torch.get_num_threads(),
    )


def rgb_conv_head(products: Tensor, bias: Tensor, out: Tensor, left: int, reflect: bool, output: str) -> None:
    """Fills ``out`` [3, H, W] with the picture that ``products`` [1, k·3, H, columns], channels-last, float32 or
    bfloat16, and ``bias`` [3], float32, make; see csrc/rgb_conv.h."""
    _, channels, height, columns = products.shape
    _C.rgb_conv_head_cpu(
        products.data_ptr(),
        bias.data_ptr(),
        out.data_ptr(),
        DTYPES[products.dtype],
        _pixels(out.dtype),
        output,
        (height, columns, channels // 3, left, out.shape[2]),
        reflect,
        _strides(out[None]),
        torch.get_num_threads(),
    )


def channel_statistics(x: Tensor) -> Tensor:
    """The mean of each channel of each image of ``x``, channels-last, and its Σ (x - mean)²: float64 [N, 2, C]."""
    statistics = torch.empty(len(x), 2, x.shape[1], dtype=torch.float64)
    pointers = x.data_ptr(), statistics.data_ptr()
    _C.channel_statistics_cpu(*pointers, DTYPES[x.dtype], _image_shape(x), torch.get_num_threads())
    return statistics


def scale_shift(x: Tensor, scale: Tensor, shift: Tensor, skip: Tensor | None, relu: bool, out: Tensor) -> None:
    """Fills ``out``, which may be ``x``, with relu(``x`` · ``scale`` [N, C] + ``shift`` [N, C] + ``skip``); ``x`` and
    ``out`` are channels-last, a pixel's channels in ``skip`` lie together."""
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
    """Σ g and Σ g · (``x`` - mean) over each channel of each image, float64 [N, 2, C], g being ``grad`` where
    relu(x · scale + shift) was positive; ``norm`` is mean, scale and shift, float32 [N, C]. Both are channels-last."""
    sums = torch.empty(len(x), 2, x.shape[1], dtype=torch.float64)
    pointers = x.data_ptr(), grad.data_ptr(), _norm(norm), sums.data_ptr()
    _C.norm_gradient_sums_cpu(*pointers, DTYPES[x.dtype], _image_shape(x), relu, torch.get_num_threads())
    return sums


def norm_gradient(
    x: Tensor, grad: Tensor, norm: tuple[Tensor, Tensor, Tensor], factors: Tensor, relu: bool, out: Tensor
) -> None:
    """Fills ``out`` with g · ``factors[:, 0]`` + (``x`` - mean) · ``factors[:, 1]`` + ``factors[:, 2]``, float32
    [N, 3, C]; the rest as :func:`norm_gradient_sums` has it."""
    pointers = x.data_ptr(), grad.data_ptr(), _norm(norm), factors.data_ptr(), out.data_ptr()
    _C.norm_gradient_cpu(*pointers, DTYPES[x.dtype], _image_shape(x), relu, torch.get_num_threads())


def winograd_lanes() -> int:
    """The floats in a register that the convolutions below compute with: 16 with AVX-512, 8 with AVX2, else fewer."""
    return _C.winograd_lanes()


def winograd_weights(weight: Tensor, turned: bool) -> Tensor:
    """``weight`` [O, I, 3, 3], float32, as :func:`winograd_conv` takes it: [O / 32, 16, I, 32]. ``turned`` by 180°, in
    and out exchanged, it is [I / 32, 16, O, 32]. O and I are multiples of 32."""
    (o, i), strides, first = weight.shape[:2], _strides(weight), weight.data_ptr()
    if turned:
        to_o, to_i, to_row, to_column = strides
        first += 2 * (to_row + to_column) * weight.itemsize
        (o, i), strides = (i, o), (to_i, to_o, -to_row, -to_column)
    transformed = weight.new_empty(o // WINOGRAD_PANEL, 16, i, WINOGRAD_PANEL)
    _C.winograd_weights_cpu(first, transformed.data_ptr(), i, o, strides, torch.get_num_threads())
    return transformed


def winograd_conv(
    x: Tensor, weights: Tensor, bias: Tensor | None, padding: int, skip: Tensor | None, relu: bool, out: Tensor
) -> None:
    """Fills ``out`` with relu?(the 3×3 convolution of ``x``, plus ``bias``, plus ``skip``); all float32, ``x`` and
    ``out`` channels-last, a pixel's channels in ``skip`` together, ``weights`` as :func:`winograd_weights` makes
    them."""
    assert skip is None or (skip.shape == out.shape and skip.stride(1) == 1 and skip.dtype == out.dtype)
    _C.winograd_conv_cpu(
        x.data_ptr(),
        weights.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        0 if skip is None else skip.data_ptr(),
        out.data_ptr(),
        _winograd_shape(x, out, padding),
        (0, 0, 0, 0) if skip is None else _strides(skip),
        relu,
        torch.get_num_threads(),
    )


def winograd_weight_gradient(x: Tensor, grad: Tensor, padding: int, weight: Tensor, bias: Tensor | None) -> None:
    """Fills ``weight`` [O, I, 3, 3] and, unless it is ``None``, ``bias`` [O] with their gradients, ``grad`` being that
    of the convolution's output; float32, ``x`` and ``grad`` channels-last."""
    pointers = x.data_ptr(), grad.data_ptr(), weight.data_ptr(), 0 if bias is None else bias.data_ptr()
    shape, strides = _winograd_shape(x, grad, padding), _strides(weight)
    _C.winograd_weight_gradient_cpu(*pointers, shape, strides, torch.get_num_threads())


def _winograd_shape(x: Tensor, y: Tensor, padding: int) -> tuple[int, int, int, int, int, int]:
    (n, h, w, i), (_, rows, columns, o) = _image_shape(x), _image_shape(y)
    assert (rows, columns) == (h + 2 * padding - 2, w + 2 * padding - 2)
    assert i % WINOGRAD_PANEL == 0 and o % WINOGRAD_PANEL == 0
    return n, h, w, i, o, padding


def _norm(norm: tuple[Tensor, Tensor, Tensor]) -> tuple[int, int, int]:
    mean, scale, shift = norm
    return mean.data_ptr(), scale.data_ptr(), shift.data_ptr()


def _strides(x: Tensor) -> tuple[int, int, int, int]:
    n, c, h, w = x.stride()
    return n, c, h, w


def _pixels(dtype: torch.dtype) -> str:
    return "uint8" if dtype == torch.uint8 else DTYPES[dtype]
