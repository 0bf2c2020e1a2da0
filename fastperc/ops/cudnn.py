"""cuDNN's convolutions with bias, skip and ReLU, by the operators that PyTorch's frozen networks use.

cuDNN's ReLU may turn NaN into 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

PROBE_SIDE = 64  # pixels of the image by which cuDNN is asked whether it can compute


def why_not(x: Tensor, weight: Tensor, stride: int = 1, skip: bool = False) -> str | None:
    """Why cuDNN cannot convolve ``x`` by ``weight`` and end with a bias and a ReLU, or with a ``skip`` too, or
    ``None``.

    The first call for a device, dtype and shape of the weight computes a small image and waits for the GPU.
    """
    if x.device.type != "cuda":
        return f"cuDNN runs on GPUs, not on {x.device.type} tensors"
    if torch.version.hip:
        return "PyTorch for ROCm has MIOpen, not cuDNN"
    if not torch.backends.cudnn.is_available() or not torch.backends.cudnn.enabled:
        return "cuDNN is not available"
    if x.dtype == torch.float64:
        return "cuDNN fuses nothing in float64"
    kind = _Kind(x.device, x.dtype, weight.shape[1], weight.shape[0], tuple(weight.shape[2:]), stride, skip)
    if kind not in _reasons:
        if type(x) not in (Tensor, nn.Parameter) or torch.cuda.is_current_stream_capturing():
            return None  # it cannot be tried here: the tensor has no data, or a graph would record the trial
        _reasons[kind] = _try(kind)
    return _reasons[kind]


def convolution_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: int = 1,
    padding: tuple[int, int] = (0, 0),
    skip: Tensor | None = None,
) -> Tensor:
    """The convolution of ``x`` + ``bias`` + ``skip``, then a ReLU; all are channels-last.

    ``padding`` is (left and right, top and bottom), of zeros.
    """
    geometry = [stride, stride], [padding[1], padding[0]], [1, 1], 1
    if skip is None:
        return torch.cudnn_convolution_relu(x, weight, bias, *geometry)
    return torch.cudnn_convolution_add_relu(x, weight, skip, 1.0, bias, *geometry)


class _Kind(NamedTuple):
    """A kind of call, which cuDNN has an engine for or has not."""

    device: torch.device
    dtype: torch.dtype
    channels_in: int
    channels_out: int
    kernel: Sequence[int]
    stride: int
    skip: bool


_reasons: dict[_Kind, str | None] = {}  # why cuDNN cannot compute the kinds that were tried


@torch.no_grad()
def _try(kind: _Kind) -> str | None:
    """Why cuDNN cannot compute ``kind``, or ``None``.

    Without a skip, PyTorch gives cuDNN the output's memory as a skip with the factor 0. That memory may hold NaN, and
    0 · NaN is NaN: so it is filled with NaN first.
    """
    like: dict[str, Any] = dict(dtype=kind.dtype, device=kind.device)
    taps = kind.channels_in * kind.kernel[0] * kind.kernel[1]
    size = [(PROBE_SIDE - taps_across) // kind.stride + 1 for taps_across in kind.kernel]
    shape = (1, kind.channels_out, *size)
    layout = torch.channels_last
    x = torch.ones(1, kind.channels_in, PROBE_SIDE, PROBE_SIDE, **like).contiguous(memory_format=layout)
    weight = torch.full((kind.channels_out, kind.channels_in, *kind.kernel), 1 / taps, **like)
    weight, bias = weight.contiguous(memory_format=layout), torch.zeros(kind.channels_out, **like)
    skip = torch.zeros(shape, **like).contiguous(memory_format=layout) if kind.skip else None
    nan = torch.full(shape, torch.nan, **like)
    del nan  # the allocator gives the same memory to the next tensor of this size, the output
    try:
        y = convolution_relu(x, weight, bias, kind.stride, skip=skip)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        return f"cuDNN has no engine for this ({reason})"
    is_right = bool(((y - 1).abs() < 0.1).all())
    return None if is_right else "cuDNN reads the output's memory before it is written"
