"""The tiles for GPUs with less shared memory than an H200 compute the same."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from test_conv_chain import DEVICE, HALF, Row, compare, varied

from fastperc.modules import ConvBNReLU, ResidualBlock, RGBConv, SubpixelConvBNReLU

pytest.importorskip("triton")
KERNELS = (
    "conv_bn_relu",
    "rgb_conv_head",
    "rgb_conv_stem",
    "rgb_weight_gradient",
    "subpixel_conv_bn_relu",
    "weight_gradient",
)
LAYERS = {
    "ends": (lambda: Row(ConvBNReLU(3, 40, 9, padding=4), RGBConv(40, 9, 4)), (1, 3, 10, 12)),
    "trunk": (lambda: Row(ConvBNReLU(8, 72, 3, 2, 1), ResidualBlock(72)), (1, 8, 12, 18)),
    "subpixel": (lambda: SubpixelConvBNReLU(72, 24), (1, 72, 5, 9)),
}


@pytest.mark.slow
@pytest.mark.parametrize("layers", LAYERS)
def test_layers_on_a_gpu_with_less_shared_memory_match_the_formula(monkeypatch, layers):
    """In training, forward and backward: on a GPU, or in Triton's interpreter."""
    for name in KERNELS:
        monkeypatch.setattr(import_module(f"fastperc.kernels.{name}"), "shared_memory", lambda device: 99 * 1024)
    make, shape = LAYERS[layers]
    compare(varied(make(), HALF), torch.randn(shape, device=DEVICE), HALF)
