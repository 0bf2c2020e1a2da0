"""A frozen network's ×2 upsampling convolution with the norm and the ReLU that follow: the ½-stride convolution, or
nearest-neighbour upsampling and a convolution, which are one thing with other weights.

    each pixel, with its neighbours, becomes four; along one axis, from the weights w₀ w₁ w₂ of the 3×3 kernel:
                  first of two                  second of two
    transposed    w₁·x[i]                       w₂·x[i] + w₀·x[i+1]
    nearest       w₀·x[i-1] + (w₁+w₂)·x[i]      (w₀+w₁)·x[i] + w₂·x[i+1]
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastperc import backends, reference
from fastperc.ops import onednn
from fastperc.ops.frozen import channels_last, check, empty_like, in_dtype, native_unsupported, unsupported
from fastperc.ops.instance_norm import native_instance_norm, triton_finish, triton_instance_norm
from fastperc.ops.packing import packed
from fastperc.types import InstanceNorm, Padding

UPSAMPLE = ("transposed", "nearest")


def subpixel_conv_bn_relu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    upsample: str = "transposed",
    padding: Padding = (1, 1, 1, 1),
    padding_mode: str = "zeros",
    norm: InstanceNorm | None = None,
    relu: bool = True,
) -> Tensor:
    """[N, I, H, W] → [N, O, 2H, 2W]; :func:`fastperc.reference.subpixel_conv_bn_relu` is the formula.

    Args:
        x: [N, I, H, W]; float32, float16, bfloat16 or float64; best in channels-last memory.
        weight: [I, O, 3, 3] for ``"transposed"``, [O, I, 3, 3] for ``"nearest"``; a batch norm is folded into it.
        bias: [O].
        upsample: ``"transposed"`` or ``"nearest"``.
        padding: (left, right, top, bottom), each 1, or 0 where the outermost pixels of ``x`` are neighbours only.
        padding_mode: ``"zeros"`` or, for ``"nearest"``, ``"reflect"``.
        norm: an instance norm, by weight [O], bias [O] and eps.
        relu: whether a ReLU comes last.

    Returns:
        [N, O, 2·(H + top + bottom - 2), 2·(W + left + right - 2)] in ``x``'s dtype.

    Raises:
        ValueError: shapes that do not fit, or no such way to upsample.
    """
    if upsample not in UPSAMPLE:
        raise ValueError(f"upsample must be 'transposed' or 'nearest', got {upsample!r}")
    check(x, weight, bias, weight.shape[0 if upsample == "transposed" else 1])
    obstacle = unsupported(x, weight, bias, norm)
    backend = backends.choose(
        "subpixel_conv_bn_relu",
        x,
        weight,
        triton=obstacle or backends.triton_product_unsupported(x),
        native=obstacle or onednn.unsupported(x) or (norm and native_unsupported(x)),
    )
    if backend == "triton":
        return triton_subpixel(x, weight, bias, upsample, padding, padding_mode, norm, relu)
    if backend == "reference":
        weight = in_dtype(weight, x.dtype)
        return reference.subpixel_conv_bn_relu(x, weight, bias, upsample, padding, padding_mode, norm, relu)
    y = onednn_subpixel(channels_last(x), weight, bias, upsample, padding, padding_mode, relu and norm is None)
    return y if norm is None else native_instance_norm(y, norm, relu, None, y)


def onednn_subpixel(
    x: Tensor, weight: Tensor, bias: Tensor, upsample: str, padding: Padding, padding_mode: str, relu: bool
) -> Tensor:
    """As one ½-stride convolution, of 3×3 or, for ``"nearest"``, of 4×4."""
    if upsample == "nearest":
        x = channels_last(reference.pad(x, padding, "zeros" if padding_mode == "zeros" else "replicate"))
        return onednn.transposed(x, weight, bias, 3, 0, relu, as_transposed)
    return channels_last(inner(onednn.transposed(x, weight, bias, 1, 1, relu), padding))


def inner(y: Tensor, padding: Padding) -> Tensor:
    """The part of ``y``, upsampled with zeros beyond each border, that ``padding`` asks for."""
    left, right, top, bottom = (2 - 2 * side for side in padding)
    return y[:, :, top : y.shape[2] - bottom, left : y.shape[3] - right]


def as_transposed(weight: Tensor) -> Tensor:
    """The ½-stride convolution [I, O, 4, 4] that does as nearest-neighbour upsampling and ``weight`` [O, I, 3, 3]."""
    sums = weight.new_tensor([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]])
    return torch.einsum("ak,bl,oikl->ioab", sums, sums, weight)


def triton_subpixel(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    upsample: str,
    padding: Padding,
    padding_mode: str,
    norm: InstanceNorm | None,
    relu: bool,
) -> Tensor:
    """The Triton kernel, on all of ``x``; what only neighbours give is cut off."""
    from fastperc.kernels import subpixel_conv_bn_relu as kernels
    from fastperc.types import Deferred

    x = channels_last(x)
    n, _, height, width = x.shape
    out = empty_like(x, (n, len(bias), 2 * height, 2 * width))
    weights = packed(
        ("triton", x.dtype, upsample), lambda: kernels.pack(weight.detach().float(), upsample).to(x.dtype), weight
    )

    def fill(relu: bool, partials: Tensor | None) -> None:
        kernels.subpixel_conv_bn_relu_fwd(
            Deferred(x), weights, bias.float(), out, upsample, padding_mode, relu, partials
        )

    def tiles() -> int:
        return kernels.subpixel_conv_bn_relu_tiles(Deferred(x), out, upsample)

    if norm is None or padding == (1, 1, 1, 1):
        return inner(triton_finish(out, tiles, fill, norm, relu), padding)
    # The kernel's statistics would be of more than is given back.
    out = channels_last(inner(triton_finish(out, tiles, fill, None, False), padding))
    return triton_instance_norm(out, norm, relu, None)
