"""Instance norm with its skip and ReLU, and the statistics alone, against float64."""

from __future__ import annotations

import pytest
import torch
from cases import error
from frozen import check, features, instance_norm, runs

from fastperc import ops, use_backend
from fastperc.ops.common import why_not_compiled
from fastperc.types import RELU, Epilogue

RUNS = runs(why_not_compiled, cuda=True)
SHAPES = [(1, 16, 9, 13), (3, 70, 5, 7), (2, 3, 1, 9), (1, 128, 33, 40), (1, 5, 130, 70)]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("follows", ["nothing", "relu", "skip", "skip-relu"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape)))
@pytest.mark.parametrize(("device", "backend", "dtype"), RUNS)
def test_matches_the_formula(device, backend, dtype, shape, follows):
    n, c, h, w = shape
    x = features(*shape, device=device, dtype=dtype) * 3 + 5
    skip = features(n, c, h + 4, w + 4, device=device, dtype=dtype)[:, :, 2:-2, 2:-2] if "skip" in follows else None
    epilogue = Epilogue(instance_norm(c, device), RELU if "relu" in follows else None, skip)
    check(backend, ops.instance_norm, x, epilogue)


@pytest.mark.parametrize(("device", "backend", "dtype"), RUNS)
def test_a_mean_far_from_zero_costs_no_digits(device, backend, dtype):
    """Σx² − (Σx)²/n would lose them all."""
    x = (features(1, 8, 40, 40, device=device, dtype=torch.float32) + 1000).to(dtype)
    norm = instance_norm(8, device)
    expected = torch.nn.functional.instance_norm(x.double(), weight=norm.weight.double(), bias=norm.bias.double())
    with use_backend(backend):
        y = ops.instance_norm(x, Epilogue(norm, None))
    assert error(y, expected) < {2: 1e-2, 4: 1e-4}[x.element_size()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape)))
def test_statistics(shape, dtype):
    x = (torch.randn(shape) * 2 + 3).to(dtype)
    mean, m2 = ops.instance_statistics(x).unbind(1)
    assert mean.dtype == m2.dtype == torch.float64
    assert error(mean, x.double().mean((2, 3))) < 1e-6
    expected = (x.double() - x.double().mean((2, 3), keepdim=True)).square().sum((2, 3))
    assert error(m2, expected) < 1e-6
