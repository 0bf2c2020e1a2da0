"""oneDNN's convolutions with packed weights, bias, skip and activation, by the operators that PyTorch's compiler uses.

oneDNN's ReLU turns NaN into 0.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from fastperc.ops.common import activate_, packed
from fastperc.types import NO_EPILOGUE, Activation, Epilogue, Geometry


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


def _fused(activation: Activation | None) -> tuple[str, list[float]] | None:
    """oneDNN's name for ``activation`` and its numbers, or ``None``: oneDNN does not compute it."""
    if activation is None:
        return "none", []
    if activation.name == "leaky_relu":
        return "leaky_relu", [0.01 if activation.slope is None else activation.slope]
    return _NAMES.get(activation.name)


_NAMES: dict[str, tuple[str, list[float]]] = {
    "relu": ("relu", []),
    "relu6": ("hardtanh", [0.0, 6.0]),
    "silu": ("swish", []),
    "sigmoid": ("sigmoid", []),
    "tanh": ("tanh", []),
}


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry = Geometry(),
    epilogue: Epilogue = NO_EPILOGUE,
    arrange: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """activation(the convolution of ``x`` by ``arrange(weight)`` + ``bias`` + skip); channels-last.

    ``geometry`` adds zeros, as many left as right and as many above as below. ``epilogue`` has no norm, and its ``out``
    stays unused.
    """
    stride, ((left, _, top, _), _), dilation, groups = geometry
    sizes = [top, left], [stride, stride], [dilation, dilation], groups

    def pack() -> tuple[Tensor, Tensor | None]:
        arranged = weight if arrange is None else arrange(weight)
        arranged = arranged.detach().to(x.dtype, memory_format=torch.channels_last)
        if x.numel():
            arranged = torch.ops.mkldnn._reorder_convolution_weight(arranged, *sizes, list(x.shape))
        return arranged, None if bias is None else bias.detach().to(x.dtype)

    others = () if bias is None else (bias,)
    w, b = packed(("onednn", x.dtype, arrange), pack, weight, *others)
    activation, skip = epilogue.activation, epilogue.skip
    if skip is None:
        fused = _fused(activation)
        name, numbers = fused or ("none", [])
        y = torch.ops.mkldnn._convolution_pointwise(x, w, b, *sizes, name, numbers, "")
        return y if fused else activate_(y, activation)
    if groups > 1:  # PyTorch fuses no skip into grouped convolutions
        y = torch.ops.mkldnn._convolution_pointwise(x, w, b, *sizes, "none", [], "")
        return activate_(y.add_(skip), activation)
    relu = activation is not None and activation.name == "relu"
    last = "relu" if relu else None
    y = torch.ops.mkldnn._convolution_pointwise.binary(x, skip, w, b, *sizes, "add", 1.0, last, [], None)
    return y if relu else activate_(y, activation)


def transposed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    padding: int,
    output_padding: int,
    activation: Activation | None = None,
    arrange: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """``activation`` of the ½-stride convolution of ``x`` by ``arrange(weight)`` [I, O, k, k] + ``bias``;
    channels-last."""
    geometry = [padding] * 2, [output_padding] * 2, [2, 2], [1, 1], 1

    def pack() -> tuple[Tensor, Tensor]:
        arranged = weight if arrange is None else arrange(weight)
        arranged = arranged.detach().to(x.dtype, memory_format=torch.channels_last)
        if x.numel():
            arranged = torch.ops.mkldnn._reorder_convolution_transpose_weight(arranged, *geometry, list(x.shape))
        return arranged, bias.detach().to(x.dtype)

    w, b = packed(("onednn", x.dtype, arrange), pack, weight, bias)
    fused = _fused(activation)
    name, numbers = fused or ("none", [])
    y = torch.ops.mkldnn._convolution_transpose_pointwise(x, w, b, *geometry, name, numbers, "")
    return y if fused else activate_(y, activation)
