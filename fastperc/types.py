"""Small tuples that operations, networks and the engine share."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class FrozenConv(NamedTuple):
    """A 3×3 convolution of a fixed network, followed by ReLU."""

    weight: Tensor  # [O, I, 3, 3]
    bias: Tensor  # [O]
    pooled: bool  # whether a 2×2 max pooling stands before it


class InstanceNorm(NamedTuple):
    """The normalisation of each channel of each image by its own mean and variance."""

    weight: Tensor  # [C]
    bias: Tensor  # [C]
    eps: float


Padding = tuple[int, int, int, int]  # left, right, top, bottom, as ``F.pad`` has them


class Window(NamedTuple):
    """A rectangle of an image, in pixels; beyond the image's border lie mirrored pixels."""

    top: int
    left: int
    height: int
    width: int


class Deferred(NamedTuple):
    """relu?(coefficients[:, 0] · x + coefficients[:, 1] + coefficients[:, 2] · other), to be computed where it is
    loaded; without coefficients ``x`` itself."""

    x: Tensor  # [N, C, H, W], channels innermost
    coefficients: Tensor | None = None  # [N or 1, rows, C] fp32
    relu: bool = False
    other: Tensor | None = None  # as x

    @property
    def arguments(self) -> tuple[Any, ...]:
        """``x_ptr``, ``other_ptr``, ``coefficients_ptr`` and ``coefficients_stride`` of a kernel."""
        return self.x, self.other, self.coefficients, stride_of(self.coefficients)


def stride_of(coefficients: Tensor | None) -> int:
    """Elements from an image's coefficients to the next one's: none if all share them."""
    return 0 if coefficients is None or len(coefficients) == 1 else coefficients.stride(0)
