"""Helpers to test the operations of frozen networks: each backend against float64, compared with plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import GPU, RUNS, dtype_id, no_worse
from torch import Tensor

from fastperc import use_backend
from fastperc.ops import onednn
from fastperc.types import Activation, Epilogue, FrozenConv, InstanceNorm


def runs(native: Callable[[torch.Tensor], str | None], cuda: bool = False) -> list[Any]:
    """The device, backend and dtype of each run; ``native`` says why the native backend cannot serve a tensor.

    The native backend on a GPU is included with ``cuda``. That of convolutions is cuDNN and the passes after it, which
    have tests of their own: test_cudnn.py and test_cuda_epilogues.py.
    """

    def can(backend: str, dtype: torch.dtype) -> bool:
        if backend == "triton":
            return dtype != torch.bfloat16 or GPU  # products of bfloat16 are wrong in the interpreter
        return native(torch.empty(0, dtype=dtype)) is None

    return [
        pytest.param(device, backend, dtype, id=f"{device}-{backend}-{dtype_id(dtype)}")
        for device, backend in RUNS
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
        if (device == "cpu" or backend == "triton" or cuda) and can(backend, dtype)
    ]


FROZEN_RUNS = runs(onednn.why_not)


def widened(value: Any) -> Any:
    """``value`` in float64 if it is a floating-point tensor, a norm or an epilogue of such."""
    if isinstance(value, Epilogue):
        return value._replace(**{name: widened(field) for name, field in value._asdict().items() if name != "out"})
    if isinstance(value, Activation):
        return value._replace(slopes=widened(value.slopes))
    if isinstance(value, InstanceNorm):
        return InstanceNorm(value.weight.double(), value.bias.double(), value.eps)
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def check(
    backend: str, operation: Callable[..., Tensor], *arguments: Any, floor: float = 4e-7, **options: Any
) -> Tensor:
    """Runs ``operation`` on ``backend`` and returns its result.

    Asserts that the result is bitwise repeatable and that its error is at most 1.5 times that of plain PyTorch, plus
    ``floor``.
    """
    with use_backend("reference"):
        wide = {key: widened(value) for key, value in options.items()}
        exact = operation(*map(widened, arguments), **wide)
        stock = operation(*arguments, **options)
    with use_backend(backend):
        ours = operation(*arguments, **options)
        assert torch.equal(ours, operation(*arguments, **options))
    assert ours.shape == exact.shape and ours.dtype == stock.dtype
    no_worse(ours, stock, exact, floor)
    return ours


def features(*shape: int, device: str, dtype: torch.dtype) -> Tensor:
    """Activations [N, C, H, W], channels-last."""
    return torch.randn(shape).to(device, dtype).contiguous(memory_format=torch.channels_last)


def filters(*shape: int, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution that keeps the size of activations: float32, exact in ``dtype``."""
    fan_in = shape[1] * shape[2] * shape[3]
    weight, bias = torch.randn(shape) / fan_in**0.5, torch.randn(shape[0])
    return weight.to(dtype).float().to(device), bias.to(dtype).float().to(device)


def activations(channels: int, device: str = "cpu") -> dict[str, Activation]:
    """Every activation, by name; with slopes for ``channels``."""
    slopes = torch.linspace(-0.5, 1.5, channels, device=device)
    return {
        "relu": Activation("relu"),
        "leaky_relu": Activation("leaky_relu", 0.2),
        "prelu": Activation("prelu", slopes=slopes),
        "prelu of one slope": Activation("prelu", slopes=slopes[channels // 3 :][:1]),
        "relu6": Activation("relu6"),
        "silu": Activation("silu"),
        "sigmoid": Activation("sigmoid"),
        "tanh": Activation("tanh"),
    }


ACTIVATION_NAMES = [name for name in activations(1)]  # of :func:`activations`


def instance_norm(channels: int, device: str) -> InstanceNorm:
    return InstanceNorm(torch.rand(channels, device=device) + 0.5, torch.randn(channels, device=device), 1e-5)


def narrow_vgg(averages=False):
    """Like VGG-16, five layers deep and narrow: 3 → 16 → 16, pool, → 32 → 32, pool, → 32."""
    generator = torch.Generator().manual_seed(3)
    sizes = [(3, 16, False), (16, 16, False), (16, 32, True), (32, 32, False), (32, 32, True)]
    return [
        FrozenConv(
            torch.randn(o, i, 3, 3, generator=generator) * (2 / (9 * i)) ** 0.5,
            torch.randn(o, generator=generator) * 0.1,
            pooled,
            averages,
        )
        for i, o, pooled in sizes
    ]
