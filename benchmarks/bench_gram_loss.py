"""The style loss: Gram matrices of feature maps against their targets, all layers in one call."""

from __future__ import annotations

import torch
from costs import gram_loss
from harness import DEVICE, DTYPE, DTYPES, Case, Measure, runs
from networks import features, style_shapes
from providers import Provider
from torch import Tensor

from fastperc import ops, reference

Shapes = list[tuple[int, ...]]

STYLE = style_shapes("relu4_3", 4, 256)
LAYERS: dict[str, Shapes] = {
    "cpu": {"4x64x256x256": STYLE[:1], "4x128x128x128": STYLE[1:2]},
    "cuda": {"4x3x256x256, relu1_2 to relu4_3": STYLE},
}[DEVICE]
LAYOUTS = {"cpu": ("NCHW", "NHWC"), "cuda": ("NHWC",)}[DEVICE]
TOLERANCE = {"fp32": (1e-5, 1e-5), "bf16": (1e-2, 1e-2)}[DTYPE]


def inputs(shapes: Shapes) -> tuple[Tensor, ...]:
    """Feature maps of ``shapes``, then a target Gram matrix for each."""
    targets = [reference.gram_matrix(features(1, *shape[1:])) for shape in shapes]
    return *(features(*shape, requires_grad=True) for shape in shapes), *targets


def reference_loss(*tensors: Tensor) -> Tensor:
    """The loss of each layer [layers]; arguments as :func:`inputs` returns them."""
    layers = len(tensors) // 2
    return torch.stack([reference.gram_loss(x, target) for x, target in zip(tensors[:layers], tensors[layers:])])


def fused_loss(*tensors: Tensor) -> Tensor:
    """As :func:`reference_loss`."""
    layers = len(tensors) // 2
    return ops.gram_loss(tensors[:layers], tensors[layers:])


def make_case(name: str, shapes: Shapes, layout: str) -> Case:
    """Losses and gradients of feature maps of ``shapes`` in ``layout``."""
    return Case(
        "gram_loss",
        "forward+backward",
        f"{name}, {layout}",
        DTYPE,
        inputs=lambda: inputs(shapes),
        reference=reference_loss,
        fused=fused_loss,
        costs=lambda: [cost for shape in shapes for cost in gram_loss(shape, DTYPES[DTYPE].itemsize)],
        channels_last=layout == "NHWC",
        tolerance=TOLERANCE,
    )


CASES = [make_case(name, shapes, layout) for name, shapes in LAYERS.items() for layout in LAYOUTS]


@runs(CASES)
def test_gram_loss(measure: Measure, case: Case, provider: Provider) -> None:
    measure(case, provider)
