"""The epilogue of a frozen network's convolution on a GPU, after a library's convolution without a bias: bias, skip and
activation in one CUDA pass over its output, where cuDNN itself fuses less."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastperc import _native
from fastperc.ops.common import activate_, channels_last, copied_to, why_not_compiled
from fastperc.ops.instance_norm import native_instance_norm
from fastperc.types import NO_EPILOGUE, Epilogue


def why_not(x: Tensor, shape: Sequence[int] = (), epilogue: Epilogue = NO_EPILOGUE) -> str | None:
    """Why a CUDA pass cannot finish a convolution of ``x``, whose output has this ``shape``, or ``None``."""
    if not _native.on_gpu(x):
        return f"the CUDA kernel runs on GPUs, not on {x.device.type} tensors"
    if reason := why_not_compiled(x):
        return reason
    skip = epilogue.skip
    if skip is not None and (tuple(skip.shape), skip.dtype) != (tuple(shape), x.dtype):
        return "the skip has another shape or dtype"
    return None


def why_slow(epilogue: Epilogue) -> str | None:
    """Why a library that adds the bias itself needs no more passes, or ``None``."""
    activation = epilogue.activation
    is_fused = activation is not None and activation.name in _native.PASS_ACTIVATIONS
    return None if epilogue.norm or epilogue.skip is not None or is_fused else "there is only a bias to add"


def finish(y: Tensor, bias: Tensor, epilogue: Epilogue) -> Tensor:
    """activation(norm(``y`` + ``bias``) + skip) of a convolution's output ``y`` [N, O, H', W'], which it overwrites."""
    y, activation = channels_last(y), epilogue.activation
    if epilogue.norm is not None:  # which subtracts a bias
        return native_instance_norm(y, epilogue, y)
    is_fused = activation is None or activation.name in _native.PASS_ACTIVATIONS
    passed = activation if is_fused else None
    _native.scale_shift(y, None, bias.detach().float().contiguous(), epilogue.skip, passed, y, batch=True)
    return copied_to(y if is_fused else activate_(y, activation), epilogue.out)
