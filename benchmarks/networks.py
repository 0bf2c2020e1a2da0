"""What several benchmarks build: images, features and a loss network with random weights of the true shapes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import torch
from costs import Cost, gram_loss
from harness import DTYPE, PRODUCTS, Case, Step
from torch import Tensor, nn

from fastperc import PerceptualLoss, VGG16Features
from fastperc.models.vgg16 import CONVOLUTIONS, TORCHVISION_INDEX

VGG_LAYERS = ("relu1_2", "relu2_2", "relu3_3", "relu4_3")


def image(n: int, height: int, width: int, requires_grad: bool = False) -> Tensor:
    """RGB in 0–1."""
    return torch.rand(n, 3, height, width, requires_grad=requires_grad)


def features(*shape: int, requires_grad: bool = False) -> Tensor:
    """What a ReLU leaves: half of it zero."""
    return torch.randn(shape).relu().requires_grad_(requires_grad)


def forward(module: nn.Module, *inputs: Tensor) -> Tensor:
    """A module's result: the reference of every module, under ``use_backend("reference")``."""
    return module(*inputs)


def layer_cases(
    operation: str,
    shape: str,
    module: Callable[[], nn.Module],
    inputs: Callable[[], tuple[Tensor, ...]],
    fused: Step | None = None,
) -> list[Case]:
    """A layer of a network, in inference and in training."""
    return [
        Case(
            operation,
            direction,
            shape,
            DTYPE,
            module=module,
            inputs=inputs,
            reference=forward,
            fused=fused,
            channels_last=True,
            tolerance={"fp32": (1e-5, 1e-3), "bf16": (1e-2, 0.2)}[DTYPE],
        )
        for direction in ("inference", "forward+backward")
    ]


def loss(module: PerceptualLoss, output: Tensor, content: Tensor) -> Tensor:
    """The total alone."""
    return module(output, content).total


def perceptual_loss(deepest: str, size: int) -> PerceptualLoss:
    """Content at relu2_2, style at ``VGG_LAYERS`` down to ``deepest``, the target from a random image of ``size``²."""
    layers = VGG_LAYERS[: VGG_LAYERS.index(deepest) + 1]
    return PerceptualLoss(VGG16Features(vgg_file(), layers), torch.rand(1, 3, size, size), convention="relative")


def style_shapes(deepest: str, n: int, size: int) -> list[tuple[int, ...]]:
    """Shapes of the activations at ``VGG_LAYERS`` down to ``deepest`` of ``n`` images of ``size``²."""
    return [(n, 64 << i, size >> i, size >> i) for i in range(VGG_LAYERS.index(deepest) + 1)]


def style_costs(deepest: str, n: int, size: int, dtype: str) -> list[Cost]:
    """What the style terms of :func:`perceptual_loss` cost on ``n`` images."""
    return [cost for shape in style_shapes(deepest, n, size) for cost in gram_loss(shape, PRODUCTS[dtype].itemsize)]


@cache
def vgg_file() -> Path:
    """Random weights under torchvision's names, scaled to keep activations level."""
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, c_in, c_out in CONVOLUTIONS[: CONVOLUTIONS.index(("4_3", 512, 512)) + 1]:
        key = f"features.{TORCHVISION_INDEX[name]}"
        tensors[f"{key}.weight"] = torch.randn(c_out, c_in, 3, 3, generator=generator) * (2 / (9 * c_in)) ** 0.5
        tensors[f"{key}.bias"] = torch.randn(c_out, generator=generator) * 0.01
    path = Path(mkdtemp(), "vgg16.pth")
    torch.save(tensors, path)
    return path
