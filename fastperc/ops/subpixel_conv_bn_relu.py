"""A frozen network's ×2 upsampling convolution with its epilogue: the ½-stride (transposed) convolution, or
nearest-neighbour upsampling and a convolution. Both are one computation with different weights.

    each pixel, with its neighbours, becomes four; along one axis, from the weights w₀ w₁ w₂ of the 3×3 kernel:
                  first of two                  second of two
    transposed    w₁·x[i]                       w₂·x[i] + w₀·x[i+1]
    nearest       w₀·x[i-1] + (w₁+w₂)·x[i]      (w₀+w₁)·x[i] + w₂·x[i+1]

In training ``modules.SubpixelConvBNReLU`` is a layer of ``ops.conv_chain``; ``ops/kinds.py`` has its forward and
gradients.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastperc import backends, kernels, reference
from fastperc.backends import Implementation, Operation, TuningCases, first_two_arguments, register
from fastperc.ops import gpu_epilogue, onednn
from fastperc.ops.common import (
    channels_last,
    check_shapes,
    copied_to,
    empty_like,
    in_dtype,
    packed,
    why_not_compiled,
    why_not_frozen,
)
from fastperc.ops.conv_bn_relu import CONV_BN_RELU
from fastperc.ops.instance_norm import native_instance_norm, triton_finish, triton_instance_norm
from fastperc.types import NO_EPILOGUE, Epilogue, Padding, Sides, same_sides

UPSAMPLE = ("transposed", "nearest")


def subpixel_conv_bn_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    upsample: str = "transposed",
    padding: Padding = Padding((1, 1, 1, 1)),
    epilogue: Epilogue = Epilogue(),
) -> Tensor:
    """[N, I, H, W] → [N, O, 2H, 2W]; :func:`fastperc.reference.subpixel_conv_bn_relu` is the formula.

    Args:
        x: [N, I, H, W]; float32, float16, bfloat16 or float64; best in channels-last memory.
        weight: [I, O, 3, 3] for ``"transposed"``, [O, I, 3, 3] for ``"nearest"``; a batch norm is folded into it.
        bias: [O].
        upsample: ``"transposed"`` or ``"nearest"``.
        padding: each side 1, or 0 where the outermost pixels of ``x`` serve as neighbours only; of zeros or, for
            ``"nearest"``, reflected.
        epilogue: an instance norm and an activation; no skip.

    Returns:
        [N, O, 2·(H + top + bottom - 2), 2·(W + left + right - 2)] in ``x``'s dtype.

    Raises:
        ValueError: shapes that do not fit, no such way to upsample, or a skip.
    """
    if upsample not in UPSAMPLE:
        raise ValueError(f"upsample must be 'transposed' or 'nearest', got {upsample!r}")
    if epilogue.skip is not None:
        raise ValueError("an upsampling convolution has no skip; add it afterwards")
    check_shapes(x, weight, bias, weight.shape[0 if upsample == "transposed" else 1])
    return SUBPIXEL_CONV_BN_RELU(x, weight, bias, upsample, padding, epilogue)


def as_transposed(weight: Tensor) -> Tensor:
    """The ½-stride convolution [I, O, 4, 4] that equals nearest-neighbour upsampling and ``weight`` [O, I, 3, 3]."""
    for axis in (2, 3):
        first, middle, last = weight.unbind(axis)
        weight = torch.stack((last, middle + last, first + middle, first), axis)
    return weight.transpose(0, 1)


def _without_border(y: Tensor, sides: Sides) -> Tensor:
    """The part of ``y``, upsampled with zeros beyond each border, that ``sides`` of a padding ask for."""
    left, right, top, bottom = (2 - 2 * side for side in sides)
    return y[:, :, top : y.shape[2] - bottom, left : y.shape[3] - right]


def _why_not_triton(
    x: Tensor, weight: Tensor, bias: Tensor, upsample: str, padding: Padding, epilogue: Epilogue
) -> str | None:
    return why_not_frozen(x, weight, bias, epilogue=epilogue) or backends.why_not_triton_product(x)


def _triton(x: Tensor, weight: Tensor, bias: Tensor, upsample: str, padding: Padding, epilogue: Epilogue) -> Tensor:
    """The kernel, on all of ``x``; the output of pixels that serve as neighbours only is cut off."""
    subpixel = kernels.subpixel_conv_bn_relu
    x = channels_last(x)
    n, _, height, width = x.shape
    out = empty_like(x, (n, len(bias), 2 * height, 2 * width))
    weights = packed(
        ("triton", x.dtype, upsample), lambda: subpixel.pack(weight.detach().float(), upsample).to(x.dtype), weight
    )

    def fill(epilogue: Epilogue, partials: Tensor | None) -> None:
        last = epilogue.activation
        subpixel.subpixel_conv_bn_relu_fwd(x, weights, bias.float(), out, upsample, padding.mode, last, partials)

    def tiles() -> int:
        return subpixel.subpixel_conv_bn_relu_tiles(x, out, upsample)

    if epilogue.norm is None or padding.sides == (1, 1, 1, 1):
        y = triton_finish(out, tiles, fill, epilogue._replace(out=None))
        return copied_to(_without_border(y, padding.sides), epilogue.out)
    # The kernel's statistics would include what is cut off.
    out = channels_last(_without_border(triton_finish(out, tiles, fill, NO_EPILOGUE), padding.sides))
    return triton_instance_norm(out, epilogue)


def _why_not_native(
    x: Tensor, weight: Tensor, bias: Tensor, upsample: str, padding: Padding, epilogue: Epilogue
) -> str | None:
    reason = why_not_frozen(x, weight, bias, epilogue=epilogue) or onednn.why_not(x)
    return reason or (why_not_compiled(x) if epilogue.norm else None)


def _native(x: Tensor, weight: Tensor, bias: Tensor, upsample: str, padding: Padding, epilogue: Epilogue) -> Tensor:
    """oneDNN's ½-stride convolution, of 3×3 or, for ``"nearest"``, of 4×4."""
    x, activation = channels_last(x), epilogue.activation if epilogue.norm is None else None
    if upsample == "nearest":
        mode = "zeros" if padding.mode == "zeros" else "replicate"
        x = channels_last(reference.pad(x, Padding(padding.sides, mode)))
        y = onednn.transposed(x, weight, bias, 3, 0, activation, as_transposed)
    else:
        y = channels_last(_without_border(onednn.transposed(x, weight, bias, 1, 1, activation), padding.sides))
    return copied_to(y, epilogue.out) if epilogue.norm is None else native_instance_norm(y, epilogue, y)


def _why_not_epilogue(
    x: Tensor, weight: Tensor, bias: Tensor, upsample: str, padding: Padding, epilogue: Epilogue
) -> str | None:
    return why_not_frozen(x, weight, bias, epilogue=epilogue) or gpu_epilogue.why_not(x)


def _why_slow_epilogue(
    x: Tensor, weight: Tensor, bias: Tensor, upsample: str, padding: Padding, epilogue: Epilogue
) -> str | None:
    return gpu_epilogue.why_slow(epilogue)


def _epilogue(x: Tensor, weight: Tensor, bias: Tensor, upsample: str, padding: Padding, epilogue: Epilogue) -> Tensor:
    """The library's convolution, and the pass of ``ops.gpu_epilogue``."""
    x, weight = channels_last(x), in_dtype(weight, x.dtype)
    if upsample == "transposed":
        y = _without_border(F.conv_transpose2d(x, weight, None, 2, 1, 1), padding.sides)
    else:
        y = reference.subpixel_conv_bn_relu(x, weight, None, upsample, padding, NO_EPILOGUE)
    return gpu_epilogue.finish(y, bias, epilogue)


def _plain(x: Tensor, weight: Tensor, bias: Tensor, upsample: str, padding: Padding, epilogue: Epilogue) -> Tensor:
    y = reference.subpixel_conv_bn_relu(x, in_dtype(weight, x.dtype), bias, upsample, padding, epilogue)
    return copied_to(y, epilogue.out)


def _tuned_shapes(batch: int, size: int) -> list[tuple[tuple[int, ...], ...]]:
    """Input and weight of the style network's ½-stride convolutions."""
    half, quarter = size // 2, size // 4
    return [((batch, 128, quarter, quarter), (128, 64, 3, 3)), ((batch, 64, half, half), (64, 32, 3, 3))]


SUBPIXEL_CONV_BN_RELU = register(
    Operation(
        "subpixel_conv_bn_relu",
        "½-stride conv, norm, ReLU",
        (
            Implementation("triton", _triton, _why_not_triton),
            Implementation("native", _native, _why_not_native),
            Implementation("native", _epilogue, _why_not_epilogue, _why_slow_epilogue, "epilogue"),
            Implementation("reference", _plain),
        ),
        TuningCases(
            _tuned_shapes,
            lambda x, weight: (x, weight, weight.new_zeros(weight.shape[1]), "transposed", same_sides(1), Epilogue()),
        ),
        (*CONV_BN_RELU.sources, "kernels/subpixel_conv_bn_relu.py", "fastperc/ops/subpixel_conv_bn_relu.py"),
        first_two_arguments,
        frozen=True,
    )
)
