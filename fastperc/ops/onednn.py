"""oneDNN's convolutions with packed weights, bias, skip and ReLU, by the operators that PyTorch's compiler uses.

oneDNN's ReLU turns NaN into 0.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from fastperc.ops.common import packed


def why_not(x: Tensor) -> str | None:
    """Why oneDNN cannot take ``x``, or ``None``."""
    if x.device.type != "cpu":
        return f"oneDNN runs on the CPU, not on {x.device.type} tensors"
    return _why_not_dtype(x.dtype)


@cache
def _why_not_dtype(dtype: torch.dtype) -> str | None:
    operators = torch.ops.mkldnn
    if not torch.backends.mkldnn.is_available() or not hasattr(operators, "_convolution_transpose_pointwise"):
        return "this PyTorch has no oneDNN"
    if dtype == torch.float32 or (dtype == torch.bfloat16 and operators._is_mkldnn_bf16_supported()):
        return None
    return f"oneDNN does not compute in {str(dtype).removeprefix('torch.')} on this processor"


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int = 1,
    padding: tuple[int, int] = (0, 0),
    relu: bool = False,
    skip: Tensor | None = None,
    arrange: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The convolution of ``x`` by ``arrange(weight)`` + ``bias`` + ``skip``, then a ReLU if ``relu``; channels-last.

    ``padding`` is (left and right, top and bottom), of zeros.
    """
    geometry = [padding[1], padding[0]], [stride, stride], [1, 1], 1

    def pack() -> tuple[Tensor, Tensor | None]:
        arranged = weight if arrange is None else arrange(weight)
        arranged = arranged.detach().to(x.dtype, memory_format=torch.channels_last)
        if x.numel():
            arranged = torch.ops.mkldnn._reorder_convolution_weight(arranged, *geometry, list(x.shape))
        return arranged, None if bias is None else bias.detach().to(x.dtype)

    others = () if bias is None else (bias,)
    w, b = packed(("onednn", x.dtype, arrange), pack, weight, *others)
    if skip is None:
        return torch.ops.mkldnn._convolution_pointwise(x, w, b, *geometry, "relu" if relu else "none", [], "")
    last = "relu" if relu else None
    return torch.ops.mkldnn._convolution_pointwise.binary(x, skip, w, b, *geometry, "add", 1.0, last, [], None)


def transposed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    padding: int,
    output_padding: int,
    relu: bool = False,
    arrange: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The ½-stride convolution of ``x`` by ``arrange(weight)`` [I, O, k, k] + ``bias``, then a ReLU if ``relu``;
    channels-last."""
    geometry = [padding] * 2, [output_padding] * 2, [2, 2], [1, 1], 1

    def pack() -> tuple[Tensor, Tensor]:
        arranged = weight if arrange is None else arrange(weight)
        arranged = arranged.detach().to(x.dtype, memory_format=torch.channels_last)
        if x.numel():
            arranged = torch.ops.mkldnn._reorder_convolution_transpose_weight(arranged, *geometry, list(x.shape))
        return arranged, bias.detach().to(x.dtype)

    w, b = packed(("onednn", x.dtype, arrange), pack, weight, bias)
    return torch.ops.mkldnn._convolution_transpose_pointwise(x, w, b, *geometry, "relu" if relu else "none", [], "")
