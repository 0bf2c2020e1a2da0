"""What a call in a traced network may compute, as far as fastperc has layers for it."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, fx

from fastperc.types import Activation, Padding


class Conv(NamedTuple):
    """A convolution, or a transposed one."""

    weight: Tensor  # [O, I / groups, k, k], transposed [I, O / groups, k, k]
    bias: Tensor | None  # [O]
    stride: tuple[int, int]  # down, across; likewise in the other pairs
    padding: Padding
    dilation: tuple[int, int]
    groups: int
    transposed: bool = False
    output_padding: tuple[int, int] = (0, 0)

    @property
    def channels(self) -> int:
        """Of the output."""
        return self.weight.shape[1] * self.groups if self.transposed else self.weight.shape[0]


class Norm(NamedTuple):
    """A batch norm by its running statistics, or an instance norm, which has none."""

    weight: Tensor | None  # [C]
    bias: Tensor | None  # [C]
    mean: Tensor | None  # [C]
    variance: Tensor | None  # [C]
    eps: float
    batch: bool = False  # whether it takes the statistics of the batch, as a batch norm in training does


class Add(NamedTuple):
    """The sum of the first input and ``factor`` · the second."""

    factor: float = 1.0


class Scale(NamedTuple):
    """The product with a number."""

    factor: float


class Upsample(NamedTuple):
    """Nearest-neighbour upsampling to twice the size."""


class PixelShuffle(NamedTuple):
    """[N, C · factor², H, W] → [N, C, factor · H, factor · W]."""

    factor: int


class Concatenation(NamedTuple):
    """The inputs, one after the other along the channels."""


class Same(NamedTuple):
    """The input itself, as a dropout in evaluation gives it."""


Known = Conv | Norm | Activation | Add | Scale | Padding | Upsample | PixelShuffle | Concatenation | Same


class Call(NamedTuple):
    """A known call, and the nodes of the tensors that it reads."""

    known: Known
    inputs: tuple[fx.Node, ...]


class Unknown(Exception):
    """The call is another kind than its name says."""


def require(condition: bool) -> None:
    """Raises ``Unknown`` unless ``condition``."""
    if not condition:
        raise Unknown


def pair(value: Any) -> tuple[int, int]:
    """Of a size for both axes, or of one each."""
    first, second = (value, value) if isinstance(value, int) else (value * 2 if len(value) == 1 else value)
    require(isinstance(first, int) and isinstance(second, int))
    return first, second


def zero_padding(padding: Any, kernel: tuple[int, int], dilation: tuple[int, int], mode: str = "zeros") -> Padding:
    """The padding of a convolution, which may be ``"same"`` or ``"valid"``."""
    if padding == "valid":
        return Padding()
    if padding == "same":
        (rows, columns) = (d * (k - 1) for d, k in zip(dilation, kernel))
        return Padding((columns // 2, columns - columns // 2, rows // 2, rows - rows // 2), mode)
    rows, columns = pair(padding)
    return Padding((columns, columns, rows, rows), mode)
