"""Small tuples that operations, networks and the engine share."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class FrozenConv(NamedTuple):
    """A 3×3 convolution of a fixed network, followed by ReLU."""

    weight: Tensor  # [O, I, 3, 3]
    bias: Tensor  # [O]
    pooled: bool  # whether a 2×2 pooling stands before it
    averages: bool = False  # whether the network's poolings take averages, not maxima


TAP_KINDS = ("conv", "relu", "pool")  # in the order in which they follow each other


class Tap(NamedTuple):
    """A place in a fixed network whose maps are wanted: a convolution's output, its ReLU, or the pooling after that."""

    conv: int  # index of the convolution
    kind: str = "relu"  # of TAP_KINDS

    @property
    def place(self) -> int:
        """Its number among all taps, in the order of the network."""
        return len(TAP_KINDS) * self.conv + TAP_KINDS.index(self.kind)


class InstanceNorm(NamedTuple):
    """The normalisation of each channel of each image by its own mean and variance."""

    weight: Tensor  # [C]
    bias: Tensor  # [C]
    eps: float


Sides = tuple[int, int, int, int]  # left, right, top, bottom, as ``F.pad`` has them


class Padding(NamedTuple):
    """The border that a convolution adds to its input."""

    sides: Sides = (0, 0, 0, 0)  # pixels
    mode: str = "zeros"  # or "reflect", or "replicate"

    @property
    def reflects(self) -> bool:
        """Whether it has reflected pixels."""
        return self.mode == "reflect" and any(self.sides)


def same_sides(pixels: int, mode: str = "zeros") -> Padding:
    """A border of ``pixels`` on each side."""
    return Padding((pixels,) * 4, mode)


class Geometry(NamedTuple):
    """How a convolution moves over its input."""

    stride: int = 1  # pixels
    padding: Padding = Padding()
    dilation: int = 1  # pixels from a tap to the next
    groups: int = 1  # of channels, each convolved with its own filters

    def output_shape(self, x: Tensor, weight: Tensor) -> tuple[int, int, int, int]:
        """Of the convolution of ``x`` [N, I, H, W] by ``weight`` [O, I / groups, k, k]."""
        left, right, top, bottom = self.padding.sides
        rows, columns = (
            (size - self.dilation * (taps - 1) - 1) // self.stride + 1
            for size, taps in zip((x.shape[2] + top + bottom, x.shape[3] + left + right), weight.shape[2:])
        )
        return len(x), len(weight), rows, columns


class Activation(NamedTuple):
    """An elementwise function, by name. Compare names, not tuples: of two tensors ``==`` is another tensor."""

    name: str  # "relu", "leaky_relu", "prelu", "relu6", "silu", "sigmoid" or "tanh"
    slope: float | None = None  # of the negative side of leaky_relu
    slopes: Tensor | None = None  # of the negative side of prelu, [C] or [1]


RELU = Activation("relu")


class Epilogue(NamedTuple):
    """What follows a convolution: activation(norm(y) + skip)."""

    norm: InstanceNorm | None = None  # a batch norm is folded into the weights
    activation: Activation | None = RELU
    skip: Tensor | None = None  # [N, O, H', W'], as the output
    out: Tensor | None = None  # where the result goes, [N, O, H', W'] with adjacent channels; default: new memory


NO_EPILOGUE = Epilogue(activation=None)


class Window(NamedTuple):
    """A rectangle of an image, in pixels; beyond the image's border lie mirrored pixels."""

    top: int
    left: int
    height: int
    width: int


class Deferred(NamedTuple):
    """relu?(coefficients[:, 0] · x + coefficients[:, 1] + coefficients[:, 2] · other), computed when it is needed;
    without coefficients ``x`` itself."""

    x: Tensor  # [N, C, H, W], channels innermost
    coefficients: Tensor | None = None  # [N or 1, rows, C] fp32
    relu: bool = False
    other: Tensor | None = None  # as x


class Destination(NamedTuple):
    """Where a kernel's result goes."""

    out: Tensor  # [N, O, H, W], channels innermost
    partials: Tensor | None  # [N, tiles, rows, O] fp32: what each tile sums up for a norm
    saved: Deferred | None = None  # the activation whose gradient the result is

    @property
    def saved_arguments(self) -> tuple[Any, ...]:
        """``saved_ptr`` and ``saved_coefficients_ptr`` of a kernel."""
        return (None, None) if self.saved is None else (self.saved.x, self.saved.coefficients)

    @property
    def saved_stride(self) -> int:
        """``saved_coefficients_stride`` of a kernel."""
        return 0 if self.saved is None else stride_of(self.saved.coefficients)

    @property
    def saved_relu(self) -> bool:
        """Whether the gradient passes the ReLU of ``saved``."""
        return self.saved is not None and self.saved.relu


def stride_of(coefficients: Tensor | None) -> int:
    """Elements from an image's coefficients to the next one's: none if all share them."""
    return 0 if coefficients is None or len(coefficients) == 1 else coefficients.stride(0)
