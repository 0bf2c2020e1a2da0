"""A frozen network's first convolution, 9×9 from a picture, which is scaled on the way.

In float32 on a CPU Winograd's algorithm takes 25 products for an output where the definition takes 81:
csrc/rgb_conv_winograd.cpp says how.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastperc import _native, backends, kernels
from fastperc.backends import Implementation, Operation, TuningCases, first_two_arguments, register
from fastperc.ops import winograd_9x9
from fastperc.ops.common import activate_, check_shapes, copied_to, empty_like, packed, why_not_frozen
from fastperc.ops.conv_bn_relu import CONV_BN_RELU, conv_bn_relu
from fastperc.ops.image_io import IMAGE_IO, image_io, pixel_range
from fastperc.ops.instance_norm import native_instance_norm, triton_finish
from fastperc.types import Epilogue, Geometry, Padding, Window, same_sides

InputRange = tuple[float, float]


def rgb_conv_stem(
    image: Tensor,
    weight: Tensor,
    bias: Tensor,
    window: Window,
    input_range: InputRange,
    padding: Padding,
    epilogue: Epilogue = Epilogue(),
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """:func:`~fastperc.ops.image_io` and the first convolution, [N, 3, H, W] → [N, O, H', W'] in ``dtype``.

    Args:
        image, window, input_range: as for :func:`~fastperc.ops.image_io`.
        weight, bias, padding, epilogue: as for :func:`~fastperc.ops.conv_bn_relu`; the padding is that of the scaled
            window.
        dtype: of the computation and the result.

    Raises:
        ValueError: shapes that do not fit.
    """
    check_shapes(image, weight, bias, 3)
    return RGB_CONV_STEM(image, weight, bias, window, input_range, padding, epilogue, dtype)


def _why_not_triton(image: Tensor, weight: Tensor, bias: Tensor, *others: Any) -> str | None:
    *_, epilogue, dtype = others
    like = torch.empty(0, dtype=dtype, device=image.device)
    return why_not_frozen(image, weight, bias, epilogue=epilogue) or backends.why_not_triton_product(like)


def _triton(
    image: Tensor,
    weight: Tensor,
    bias: Tensor,
    window: Window,
    input_range: InputRange,
    padding: Padding,
    epilogue: Epilogue,
    dtype: torch.dtype,
) -> Tensor:
    stem, kernel = kernels.rgb_conv_stem, weight.shape[2]
    left, right, top, bottom = padding.sides
    rows, columns = window.height + top + bottom - kernel + 1, window.width + left + right - kernel + 1
    out = empty_like(torch.empty(0, dtype=dtype, device=image.device), (len(image), len(bias), rows, columns))
    weights = packed(("stem", dtype), lambda: stem.pack(weight.detach().float()).to(dtype), weight)
    with backends.on_device(image):
        x = stem.rgb_prepare(image, window, padding, pixel_range(image, input_range), dtype)

    def fill(epilogue: Epilogue, partials: Tensor | None) -> None:
        stem.rgb_conv_stem_fwd(x, weights, bias.float(), out, epilogue.activation, partials)

    return triton_finish(out, lambda: stem.rgb_conv_stem_tiles(out), fill, epilogue)


def _why_not_winograd(
    image: Tensor,
    weight: Tensor,
    bias: Tensor,
    window: Window,
    input_range: InputRange,
    padding: Padding,
    epilogue: Epilogue,
    dtype: torch.dtype,
) -> str | None:
    x = image.new_empty((1, 3, 1, 1), dtype=dtype)  # what image_io makes of it
    return why_not_frozen(image, weight, bias, epilogue=epilogue) or winograd_9x9.why_not(x, weight, bias)


def _why_slow_winograd(
    image: Tensor, weight: Tensor, bias: Tensor, window: Window, input_range: InputRange, padding: Padding, *others: Any
) -> str | None:
    return winograd_9x9.why_slow(len(image), *winograd_9x9.output_size(window.height, window.width, padding))


def _winograd(
    image: Tensor,
    weight: Tensor,
    bias: Tensor,
    window: Window,
    input_range: InputRange,
    padding: Padding,
    epilogue: Epilogue,
    dtype: torch.dtype,
) -> Tensor:
    x = image_io(image, window, input_range, dtype)
    rows, columns = winograd_9x9.output_size(window.height, window.width, padding)
    out = empty_like(x, (len(x), len(bias), rows, columns))

    def pack() -> Tensor:  # [O / panel, 25, 27, panel]
        panel = _native.WINOGRAD_PANEL if len(bias) % _native.WINOGRAD_PANEL == 0 else winograd_9x9.CHANNELS
        return winograd_9x9.transformed(weight).flatten(1, 3).unflatten(2, (-1, panel)).permute(2, 0, 1, 3).contiguous()

    activation = epilogue.activation if epilogue.norm is None else None
    relu = activation is not None and activation.name == "relu"
    _native.rgb_conv_stem_winograd(x, packed("winograd", pack, weight), bias.contiguous(), padding, relu, out)
    if epilogue.norm is not None:
        return native_instance_norm(out, epilogue, out)
    return copied_to(out if relu else activate_(out, activation), epilogue.out)


def _in_two_steps(
    image: Tensor,
    weight: Tensor,
    bias: Tensor,
    window: Window,
    input_range: InputRange,
    padding: Padding,
    epilogue: Epilogue,
    dtype: torch.dtype,
) -> Tensor:
    return conv_bn_relu(image_io(image, window, input_range, dtype), weight, bias, Geometry(padding=padding), epilogue)


def _tuned_call(image: Tensor, weight: Tensor) -> tuple[Any, ...]:
    window, bias = Window(0, 0, *image.shape[2:]), weight.new_zeros(weight.shape[0])
    return image, weight, bias, window, (2.0, -1.0), same_sides(4), Epilogue(), weight.dtype


RGB_CONV_STEM = register(
    Operation(
        "rgb_conv_stem",
        "9×9 conv from RGB",
        (
            Implementation("triton", _triton, _why_not_triton),
            Implementation("native", _winograd, _why_not_winograd, _why_slow_winograd, "winograd"),
            Implementation(None, _in_two_steps),
        ),
        TuningCases(lambda batch, size: [((batch, 3, size, size), (32, 3, 9, 9))], _tuned_call),
        (
            *IMAGE_IO.sources,
            *CONV_BN_RELU.sources,
            "csrc/rgb_conv*",
            "kernels/rgb_conv_stem.py",
            "fastperc/ops/rgb_conv_stem.py",
            "fastperc/ops/winograd_9x9.py",
        ),
        first_two_arguments,
        frozen=True,
    )
)
