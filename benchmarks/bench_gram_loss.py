"""The style loss: Gram matrices of feature maps against their targets, all layers in one call."""

from __future__ import annotations

import torch
from costs import gram_loss
from harness import DEVICE, DTYPE, DTYPES, Case, runs
from networks import features, style_shapes
from torch import Tensor

from fastperc import ops, reference

STYLE = style_shapes("relu4_3", 4, 256)
LAYERS = {
    "cpu": {"4x64x256x256": STYLE[:1], "4x128x128x128": STYLE[1:2]},
    "cuda": {"4x3x256x256, relu1_2 to relu4_3": STYLE},
}


def inputs(shapes: list[tuple[int, ...]]) -> tuple[Tensor, ...]:
    """Feature maps, then the Gram matrices of as many others."""
    targets = [reference.gram_matrix(features(1, *shape[1:])) for shape in shapes]
    return *(features(*shape, requires_grad=True) for shape in shapes), *targets


def plain(*tensors: Tensor) -> Tensor:
    layers = len(tensors) // 2
    return torch.stack([reference.gram_loss(x, target) for x, target in zip(tensors[:layers], tensors[layers:])])


def fused(*tensors: Tensor) -> Tensor:
    layers = len(tensors) // 2
    return ops.gram_loss(tensors[:layers], tensors[layers:])


CASES = [
    Case(
        "gram_loss",
        "forward+backward",
        f"{name}, {layout}",
        DTYPE,
        inputs=lambda shapes=shapes: inputs(shapes),
        reference=plain,
        fused=fused,
        costs=lambda shapes=shapes: [cost for s in shapes for cost in gram_loss(s, DTYPES[DTYPE].itemsize)],
        channels_last=layout == "NHWC",
        tolerance={"fp32": (1e-5, 1e-5), "bf16": (1e-2, 1e-2)}[DTYPE],
    )
    for name, shapes in LAYERS[DEVICE].items()
    for layout in {"cpu": ("NCHW", "NHWC"), "cuda": ("NHWC",)}[DEVICE]
]


@runs(CASES)
def test_gram_loss(measure, case, provider):
    measure(case, provider)
