"""What the operations share: checks, reasons why only plain PyTorch can serve, memory layout, packed weights."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from fastperc import _native, reference
from fastperc.devices import computes_in
from fastperc.types import Activation, Epilogue, Geometry, Padding

T = TypeVar("T")
COMMON_SOURCES = ("fastperc/ops/common.py",)  # that every operation runs on
COMMON_CPP_SOURCES = (*COMMON_SOURCES, "csrc/dtypes.h", "csrc/parallel.h")  # that every one with C++ kernels runs on
COMMON_CUDA_SOURCES = ("csrc/launch.cuh", "csrc/device.cuh")  # that every one with CUDA kernels runs on


def check_shapes(x: Tensor, weight: Tensor, bias: Tensor, channels: int) -> None:
    """Raises a ``ValueError`` unless ``x`` has ``channels`` channels, and ``weight`` and ``bias`` fit a convolution."""
    if x.dim() != 4 or weight.dim() != 4 or x.shape[1] != channels or bias.dim() != 1:
        raise ValueError(
            f"expected x [N, I, H, W], weight [O, I, k, k] and bias [O], "
            f"got {list(x.shape)}, {list(weight.shape)} and {list(bias.shape)}"
        )


def why_not_here() -> str | None:
    """Why only plain PyTorch can serve any call here, or ``None``."""
    if torch.compiler.is_compiling():
        return "torch.compile fuses plain PyTorch itself"
    if torch.jit.is_tracing():
        return "torch.jit.trace can record plain PyTorch only"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "torch.func transforms plain PyTorch only"
    return None


def why_not_frozen(x: Tensor, *others: Tensor | None, epilogue: Epilogue = Epilogue()) -> str | None:
    """Why only plain PyTorch can serve a frozen network's operation on ``x`` and ``others``, or ``None``."""
    if reason := why_not_here():
        return reason
    tensors = [x, *others, epilogue.skip, *(epilogue.norm[:2] if epilogue.norm else ())]
    if epilogue.activation is not None:
        if epilogue.activation.name not in reference.ACTIVATIONS:
            return f"no kernel for the activation {epilogue.activation.name}"
        tensors.append(epilogue.activation.slopes)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return "these kernels give no gradients"
    return "the tensor is empty" if x.numel() == 0 else None


def why_not_cpp(x: Tensor) -> str | None:
    """Why no C++ kernel of a network's layers can take ``x``, or ``None``."""
    if x.device.type != "cpu" or x.dtype == torch.float64:
        return f"no C++ kernel for {str(x.dtype).removeprefix('torch.')} on {x.device.type}"
    return _native.why_not(x)


def why_not_compiled(x: Tensor) -> str | None:
    """Why no kernel that there is both in C++ and in CUDA can take ``x``, activations of a network, or ``None``."""
    if x.dtype == torch.float64:
        return f"no compiled kernel for float64 on {x.device.type}"
    return _native.why_not(x)


def why_not_fused(x: Tensor, weight: Tensor, bias: Tensor, geometry: Geometry, epilogue: Epilogue) -> str | None:
    """Why a C++ kernel in float32 that adds a skip of the output's shape cannot serve this call of ``conv_bn_relu``, or
    ``None``."""
    if epilogue.norm is not None:
        return "an instance norm follows"
    skip = epilogue.skip
    tensors = [x, weight, bias, *(t for t in (skip, epilogue.out) if t is not None)]
    if any(t.dtype != torch.float32 for t in tensors):
        return "the kernel computes in float32"
    return None if skip is None or skip.shape == geometry.output_shape(x, weight) else "the skip has another shape"


def storage_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a convolution of ``x`` returns: autocast's choice, or that of ``x``."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that convolutions of ``x`` compute in: as they return or, where that is slow, float32."""
    dtype = storage_dtype(x)
    return dtype if computes_in(dtype, x.device) else torch.float32


def without_slow_autocast(x: Tensor) -> AbstractContextManager[object]:
    """The block runs without autocast where that would choose a slow dtype."""
    if compute_dtype(x) == storage_dtype(x):
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def symmetric(padding: Padding) -> bool:
    """Whether ``padding`` is zeros, as many left as right and as many above as below."""
    left, right, top, bottom = padding.sides
    return padding.mode == "zeros" and left == right and top == bottom


def channels_last(x: Tensor) -> Tensor:
    """``x`` [N, C, H, W] dense in NHWC, copied if it is not."""
    return x.contiguous(memory_format=torch.channels_last)


def laid_out_as(x: Tensor, like: Tensor) -> Tensor:
    """``x`` dense in the memory format of ``like``, which is dense in NHWC or NCHW; copied if it is not."""
    return channels_last(x) if like.is_contiguous(memory_format=torch.channels_last) else x.contiguous()


def evenly_spaced(x: Tensor) -> Tensor:
    """``x`` [N, C, H, W], copied to NHWC unless it is a slice of the channels of such a map, or all of it."""
    return channels_last(x) if _native.pixel_step(x) is None else x


def copied_to(y: Tensor, out: Tensor | None) -> Tensor:
    """``out``, filled with ``y`` unless it is that; ``y`` itself without one."""
    return y if out is None or y is out else out.copy_(y)


def activate_(x: Tensor, activation: Activation | None) -> Tensor:
    """``x`` after ``activation``, in place."""
    if activation is None:
        return x
    return _IN_PLACE[activation.name](x, activation)


_IN_PLACE: dict[str, Callable[[Tensor, Activation], Tensor]] = {
    "relu": lambda x, _: x.relu_(),
    "leaky_relu": lambda x, activation: F.leaky_relu_(x, 0.01 if activation.slope is None else activation.slope),
    "prelu": lambda x, activation: x.copy_(reference.activate(x, activation)),  # PyTorch has it not in place
    "relu6": lambda x, _: F.hardtanh_(x, 0.0, 6.0),
    "silu": lambda x, _: F.silu(x, inplace=True),
    "sigmoid": lambda x, _: x.sigmoid_(),
    "tanh": lambda x, _: x.tanh_(),
}


def channels_adjacent(skip: Tensor | None) -> Tensor | None:
    """``skip``, copied unless the channels of a pixel are adjacent in memory."""
    return skip if skip is None or skip.stride(1) == 1 else channels_last(skip)


def empty_like(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Uninitialised memory of ``shape``, channels-last, with the dtype and device of ``x``."""
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def partials_of(out: Tensor, tiles: int, rows: int) -> Tensor:
    """Memory for what each of ``tiles`` of each image of ``out`` sums up."""
    return torch.empty(len(out), tiles, rows, out.shape[1], device=out.device)


def filled(x: Tensor, multiple: int) -> Tensor:
    """``x`` [O, ...], filled up with zeros to a multiple of ``multiple`` channels."""
    return F.pad(x, (*(0, 0) * (x.dim() - 1), 0, -len(x) % multiple)).contiguous()


def run_fused(
    x: Tensor,
    weight: Tensor,
    geometry: Geometry,
    epilogue: Epilogue,
    multiple: int,
    kernel: Callable[[Epilogue, Tensor], None],
) -> Tensor:
    """The output [N, O, H', W'] of a convolution of ``x`` by ``weight`` whose C++ kernel computes ``epilogue`` too.

    Args:
        multiple: of this many channels are the slopes of an activation; they are filled up with zeros.
        kernel: gets the epilogue as it computes it, and fills the output, its second argument. An activation that no
            C++ kernel computes is computed in place afterwards.
    """
    out, activation = epilogue.out, epilogue.activation
    if out is None or _native.pixel_step(out) is None:
        out = empty_like(x, geometry.output_shape(x, weight))
    is_fused = activation is None or activation.name in _native.PASS_ACTIVATIONS
    passed = activation if is_fused else None
    if passed is not None and passed.slopes is not None:
        slopes, channels = passed.slopes, len(weight)
        key = ("slopes", channels, multiple)
        wide = packed(key, lambda: filled(slopes.detach().float().expand(channels), multiple), slopes)
        passed = Activation(passed.name, slopes=wide)
    kernel(Epilogue(None, passed, channels_adjacent(epilogue.skip), out), out)
    return copied_to(out if is_fused else activate_(out, activation), epilogue.out)


def siblings(tensors: Sequence[Tensor | None]) -> list[Any]:
    """Views of ``tensors``, of which none is made of another.

    A backward that differentiates its forward again asks for the gradients to them: to the tensors themselves autograd
    would add what reaches one through another.
    """
    return [None if tensor is None else tensor.view_as(tensor) for tensor in tensors]


def in_dtype(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """``weight`` in ``dtype`` and channels-last memory; it stays differentiable."""
    if (torch.is_grad_enabled() and weight.requires_grad) or torch.compiler.is_compiling():
        return weight.to(dtype)
    return packed(
        ("dtype", dtype), lambda: weight.detach().to(dtype, memory_format=torch.channels_last, copy=True), weight
    )


_packed = WeakIdKeyDictionary()  # weight → {key: (the state it was packed in, the packed form)}


def packed(key: Hashable, pack: Callable[[], T], weight: Tensor, *others: Tensor) -> T:
    """What ``pack`` makes of ``weight`` and ``others``: computed once for each ``key``, again when one of them changes,
    and kept as long as ``weight`` lives."""
    state = tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in (weight, *others))
    forms = _packed.setdefault(weight, {})
    if forms.get(key, (None,))[0] != state:
        forms[key] = state, pack()
    return forms[key][1]
