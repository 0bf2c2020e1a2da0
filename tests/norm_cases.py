"""Norms, what follows them, and how a test runs them: for the C++ and the CUDA kernels."""

from __future__ import annotations

import copy

import torch
from torch import nn

from fastperc import ops, use_backend
from fastperc.types import RELU, Activation

NORMS = {"batch": nn.BatchNorm2d, "instance": lambda channels: nn.InstanceNorm2d(channels, affine=True)}
MORE_NORMS = {
    **NORMS,
    "batch-plain": lambda channels: nn.BatchNorm2d(channels, affine=False, track_running_stats=False),
    "instance-plain": nn.InstanceNorm2d,
    "none": lambda channels: None,
}
ENDS = {"relu": (RELU, False), "bare": (None, False), "skip": (None, True)}
ACTIVATIONS = {
    "relu": RELU,
    "relu6": Activation("relu6"),
    "leaky": Activation("leaky_relu", 0.2),
    "leaky-default": Activation("leaky_relu"),
    "leaky-negative": Activation("leaky_relu", -0.3),
    "prelu": Activation("prelu", slopes=torch.tensor(0.25)),  # one for each channel
    "prelu-one": Activation("prelu", slopes=torch.tensor([-0.1])),
    "silu": Activation("silu"),
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def norm_of(kind, channels):
    norm = MORE_NORMS[kind](channels)
    if norm is not None and norm.affine:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
    return norm


def features(shape, offset=0.7):
    """Of a mean that is not zero and differs from channel to channel, in NHWC."""
    x = torch.randn(shape) + offset * torch.randn(1, shape[1], 1, 1)
    return x.contiguous(memory_format=torch.channels_last)


def run(backend, norm, x, activation, skip, dtype):
    """The output, the gradients to the input, the skip, weight, bias and slopes, and the running statistics."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    norm = None if norm is None else copy.deepcopy(norm).to(x.device, wide)
    x = x.to(dtype).detach().requires_grad_()
    leaves = [x, *(() if norm is None else norm.parameters())]
    if skip is not None:
        leaves.append(skip := skip.to(dtype).detach().requires_grad_())
    if activation is not None and activation.slopes is not None:
        slopes = activation.slopes.to(x.device, wide)
        slopes = slopes.repeat(x.shape[1]) if slopes.dim() == 0 else slopes
        leaves.append(slopes := slopes.detach().requires_grad_())
        activation = activation._replace(slopes=slopes)
    with use_backend(backend), torch.autocast(x.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        y = ops.norm_relu(x, norm, activation, skip)
        incoming = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
        gradients = torch.autograd.grad(y, leaves, incoming)
    return [y, *gradients], [] if norm is None else list(norm.buffers())
