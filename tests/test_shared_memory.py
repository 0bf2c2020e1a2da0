"""Layers in the tiles for GPUs with less shared memory than an H200, in training against float64."""

from __future__ import annotations

import copy
from importlib import import_module

import pytest
import torch
from cases import GPU, no_worse
from torch import nn

from fastperc import use_backend
from fastperc.models.common import in_a_row
from fastperc.modules import ConvBNReLU, ResidualBlock, RGBConv, SubpixelConvBNReLU

pytest.importorskip("triton")
DEVICE = "cuda" if GPU else "cpu"  # where Triton's interpreter stands in
HALF = torch.bfloat16 if GPU else torch.float16  # the interpreter's products of bfloat16 are wrong
ROUNDING = {torch.float16: 5e-4, torch.bfloat16: 4e-3}  # of one number
KERNELS = (
    "conv_bn_relu",
    "rgb_conv_head",
    "rgb_conv_stem",
    "rgb_weight_gradient",
    "subpixel_conv_bn_relu",
)
LAYERS = {
    "ends": (lambda: [ConvBNReLU(3, 40, 9, padding=4), RGBConv(40, 9, 4)], (1, 3, 10, 12)),
    "trunk": (lambda: [ConvBNReLU(8, 72, 3, 2, 1), ResidualBlock(72)], (1, 8, 12, 18)),
    "subpixel": (lambda: [SubpixelConvBNReLU(72, 24)], (1, 72, 5, 9)),
}


def output_and_gradients(layers, x, backend, dtype):
    """The output of ``layers``, and the gradients of its product with random numbers to input and parameters."""
    layers = copy.deepcopy(layers).to(torch.float64 if dtype == torch.float64 else torch.float32)
    x = x.to(dtype).requires_grad_()
    with use_backend(backend), torch.autocast(DEVICE, HALF, enabled=dtype == HALF):
        y = in_a_row(x, tuple(layers))
        incoming = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
        return [y, *torch.autograd.grad(y, [x, *layers.parameters()], incoming)]


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_layers_in_small_tiles_match_the_formula(monkeypatch, name):
    """Forward and backward: on a GPU, or in Triton's interpreter."""
    for module in KERNELS:
        monkeypatch.setattr(import_module(f"fastperc.kernels.{module}"), "shared_memory", lambda device: 99 * 1024)
    make, shape = LAYERS[name]
    layers = nn.ModuleList(make()).to(DEVICE).to(memory_format=torch.channels_last)
    for norm in (module for module in layers.modules() if isinstance(module, nn.BatchNorm2d)):
        # Away from where rounding switches a ReLU: one channel in two passes, one is stopped.
        nn.init.uniform_(norm.weight, 0.3, 0.6)
        norm.bias.data += 4 - 8 * (torch.arange(len(norm.bias), device=DEVICE) % 2)
    x = torch.randn(shape, device=DEVICE)
    exact = output_and_gradients(layers, x, "reference", torch.float64)
    stock = output_and_gradients(layers, x, "reference", HALF)
    ours = output_and_gradients(layers, x, "triton", HALF)
    largest = max(one.norm() for one in exact)
    for mine, theirs, wanted in zip(ours, stock, exact):
        if wanted.norm() >= 1e-6 * largest:  # what a norm takes off again has no gradient but rounding
            no_worse(mine, theirs, wanted, ROUNDING[HALF])
