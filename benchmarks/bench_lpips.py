"""LPIPS: VGG-16 of two images down to relu5_3, their distance, and the gradient of the first."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import torch
from costs import Cost
from harness import DEVICE, PRODUCTS, Case, Measure, runs
from networks import forward, image
from providers import Provider

from fastperc import LPIPS
from fastperc.losses.lpips import LAYERS
from fastperc.models.vgg import CONVOLUTIONS, TORCHVISION_INDEX

# (batch, side)
SHAPES = {"cpu": [(1, 256), (4, 256)], "cuda": [(8, 512)]}
DTYPE = {"cpu": "fp32", "cuda": "amp"}[DEVICE]
TOLERANCE = {"fp32": (1e-5, 5e-3), "amp": (1e-2, 0.3)}[DTYPE]  # rounding switches some ReLUs


@cache
def weight_files() -> tuple[Path, Path]:
    """Files of random weights: VGG-16's under torchvision's names, scaled so that activations keep their size, and the
    channels' under lpips' names."""
    generator, folder = torch.Generator().manual_seed(1), Path(mkdtemp())
    tensors = {}
    for name, c_in, c_out in CONVOLUTIONS:
        key = f"features.{TORCHVISION_INDEX[name]}"
        tensors[f"{key}.weight"] = torch.randn(c_out, c_in, 3, 3, generator=generator) * (2 / (9 * c_in)) ** 0.5
        tensors[f"{key}.bias"] = torch.randn(c_out, generator=generator) * 0.01
    channels = {
        f"lin{i}.model.1.weight": torch.rand(1, c, 1, 1, generator=generator) for i, c in enumerate(LAYERS.values())
    }
    for file, content in (("vgg16.pth", tensors), ("vgg.pth", channels)):
        torch.save(content, folder / file)
    return folder / "vgg16.pth", folder / "vgg.pth"


def distance_costs(n: int, side: int, dtype: str) -> Sequence[Cost]:
    """The costs of comparing features: the forward reads both sides; the backward reads both and writes one."""
    features = sum(n * c * (side >> i) ** 2 for i, c in enumerate(LAYERS.values()))
    moved = features * PRODUCTS[dtype].itemsize
    return [Cost(2 * moved, 10 * features), Cost(3 * moved, 12 * features)]


def make_case(n: int, side: int) -> Case:
    """Distance and gradient of ``n`` images of ``side``²."""
    return Case(
        "lpips",
        "forward+backward",
        f"{n}x3x{side}x{side}",
        DTYPE,
        module=lambda: LPIPS("vgg", *weight_files(), normalize=True),
        inputs=lambda: (image(n, side, side, requires_grad=True), image(n, side, side)),
        reference=forward,
        fused=forward,
        channels_last=True,
        track_memory=True,
        costs=lambda: distance_costs(n, side, DTYPE),
        tolerance=TOLERANCE,
    )


CASES = [make_case(*shape) for shape in SHAPES[DEVICE]]


@runs(CASES)
def test_lpips(measure: Measure, case: Case, provider: Provider) -> None:
    measure(case, provider)
