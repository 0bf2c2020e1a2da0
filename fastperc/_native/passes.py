"""Passes over tensors: losses, poolings, images."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastperc._native.module import (
    _C,
    DTYPES,
    dtype_name,
    image_shape,
    is_channels_last,
    on_gpu,
    stream_of,
    strides_of,
)
from fastperc.types import Window

Sides = tuple[Tensor | None, Tensor | None]


class RowLayout(NamedTuple):
    """An image as rows of consecutive elements, as ``RowShape`` and ``RowStrides`` in csrc/tv_loss.h describe it."""

    tensor: Tensor
    shape: tuple[int, int, int, int, int]  # outer, inner, rows, length, step
    strides: tuple[int, int, int]  # of outer, inner and rows, in elements


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
    if not on_gpu(x):
        _C.tv_loss_fwd_cpu(x.data_ptr(), grad_ptr, loss.data_ptr(), *common, torch.get_num_threads())
        return
    with stream_of(x) as stream:
        partials = loss.new_empty(_C.tv_loss_partials(rows.shape))
        _C.tv_loss_fwd_cuda(x.data_ptr(), grad_ptr, loss.data_ptr(), partials.data_ptr(), *common, stream)


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
    shape, threads = image_shape(x), torch.get_num_threads()
    pointers = (x.data_ptr(), pooled.data_ptr(), winners.data_ptr())
    _C.relu_pool_fwd_cpu(*pointers, DTYPES[x.dtype], shape, winners.shape[0], threads)


def relu_pool_bwd(grad_pooled: Tensor, winners: Tensor, grad: Tensor) -> None:
    """Fills ``grad`` with ``grad_pooled`` where a pixel is the positive maximum of its window, else with 0."""
    shape, threads = image_shape(grad), torch.get_num_threads()
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
    dtypes = dtype_name(image.dtype), DTYPES[out.dtype]
    common = (*dtypes, len(image), (image.shape[2], image.shape[3], *window), strides_of(image), scale, shift)
    if on_gpu(image):
        with stream_of(image) as stream:
            _C.image_io_cuda(image.data_ptr(), out.data_ptr(), *common, stream)
    else:
        _C.image_io_cpu(image.data_ptr(), out.data_ptr(), *common, torch.get_num_threads())


def picture(y: Tensor, bias: Tensor, output: str, out: Tensor) -> None:
    """Fills ``out`` with the picture that ``y`` + ``bias`` is, the output of a network's last convolution; on a GPU.

    Args:
        y: [N, 3, H, W] of any strides, not float64.
        bias: float32 [3], contiguous.
        output: ``"tanh"``, ``"linear"`` or ``"plain"``.
        out: [N, 3, H, W] of any strides, uint8 or floating-point.
    """
    n, _, h, w = y.shape
    with stream_of(y) as stream:
        _C.picture_cuda(
            y.data_ptr(),
            bias.data_ptr(),
            out.data_ptr(),
            DTYPES[y.dtype],
            dtype_name(out.dtype),
            output,
            (n, h, w),
            strides_of(y),
            strides_of(out),
            stream,
        )
