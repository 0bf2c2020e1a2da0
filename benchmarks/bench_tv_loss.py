"""Total variation, forward and backward: ``pytest benchmarks/ --benchmark-only``.

I/O of the pass: read x, write grad. The backward of a loss that is weighted reads and writes the gradient once more.
"""

from __future__ import annotations

import pytest
import torch
from providers import PROVIDERS, provide

from fastperc import ops, reference

SHAPES = {"4x3x256x256": (4, 3, 256, 256), "1x3x1080x1920": (1, 3, 1080, 1920)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("device", DEVICES)
def test_tv_loss(benchmark, device, shape, dtype, provider):
    x = torch.rand(SHAPES[shape], device=device).to(DTYPES[dtype]).requires_grad_()
    loss = provide(provider, reference.tv_loss, ops.tv_loss)

    def forward_and_backward():
        x.grad = None
        loss(x).backward()
        if device == "cuda":
            torch.cuda.synchronize()

    expected = x.detach().double().requires_grad_()
    reference.tv_loss(expected).backward()
    forward_and_backward()
    error = (x.grad.double() - expected.grad).norm() / expected.grad.norm()
    assert error < (1e-6 if dtype == "fp32" else 1e-2)

    benchmark.group = f"tv_loss forward+backward {device} {shape} {dtype}"
    benchmark.pedantic(forward_and_backward, rounds=30, warmup_rounds=5)
    moved = 2 * x.numel() * x.element_size()
    benchmark.extra_info["GB/s"] = round(moved / benchmark.stats["median"] / 1e9, 2)
