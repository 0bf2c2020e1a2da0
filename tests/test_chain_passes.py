"""The passes of a chain with their coefficients in one launch: bit for bit what the launches one by one give."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from cases import GPU

from fastperc.types import Deferred

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
DEVICE = "cuda" if GPU else "cpu"  # where Triton's interpreter stands in


def nhwc(*shape):
    return torch.randn(shape, device=DEVICE, dtype=torch.float16).contiguous(memory_format=torch.channels_last)


def counters():
    from fastperc.kernels import chain_passes

    return torch.zeros(chain_passes.COUNTERS, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("batch", [True, False], ids=["batch", "instance"])
def test_a_normalised_map(batch):
    from fastperc.kernels import chain_passes, instance_norm, norm_coefficients

    channels, x, skip = 20, nhwc(2, 20, 9, 13), nhwc(2, 20, 13, 17)[:, :, 2:-2, 2:-2]
    partials = torch.rand(1 if batch else 2, 7, 3, channels, device=DEVICE) + 1
    weight, bias = torch.randn(2, channels, device=DEVICE)
    results = []
    for together in (True, False):
        statistics = torch.zeros(channels, device=DEVICE), torch.ones(channels, device=DEVICE)
        running = (
            norm_coefficients.RunningStatistics(*statistics, 0.1, torch.tensor(1, device=DEVICE)) if batch else None
        )
        out = torch.empty_like(x)
        if together:
            norm = chain_passes.Norm(counters(), partials, weight, bias, 1e-5, running)
            coefficients = norm.empty_coefficients()
            chain_passes.Pass(Deferred(x, coefficients, True), skip, out, norm).run()
            programs = norm.counters[1]
            assert programs == len(partials) * 3 and norm.counters[0] > programs
        else:
            coefficients = norm_coefficients.norm_coefficients(partials, weight, bias, 1e-5, running)
            instance_norm.instance_norm_fwd(Deferred(x, coefficients, True), skip, out)
        results.append((out, coefficients, *statistics))
    assert all(torch.equal(one, other) for one, other in zip(*results))


@pytest.mark.parametrize("frozen", [False, True], ids=["norm", "frozen"])
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside"])
def test_a_gradient_before_its_norm(beside, frozen):
    from fastperc.kernels import chain_passes, instance_norm, norm_coefficients

    channels, saved, x = 20, nhwc(2, 20, 9, 13), nhwc(2, 40, 5, 6)
    partials, norm_table = torch.randn(2, 7, 2, channels, device=DEVICE), torch.rand(2, 5, channels, device=DEVICE) + 1
    weight, x_table = torch.randn(channels, device=DEVICE), torch.randn(1, 5, 40, device=DEVICE)
    results = []
    for together in (True, False):
        grad = nhwc(2, 20, 9, 13).copy_(saved.flip(0))
        sums, out = torch.empty(2, 2, channels, device=DEVICE), torch.zeros_like(x)
        other = chain_passes.Pass(Deferred(x, x_table, True), None, out) if beside else None
        norm = chain_passes.GradientNorm(counters(), partials, weight, norm_table, frozen, sums)
        if together:
            coefficients = norm.empty_coefficients()
            before = Deferred(grad, coefficients, other=None if frozen else saved)
            chain_passes.before_norm(norm, chain_passes.Pass(before, None, grad), other)
        else:
            coefficients = norm_coefficients.gradient_coefficients(*norm[1:])
            before = Deferred(grad, coefficients, other=None if frozen else saved)
            instance_norm.instance_norm_fwd(before, None, grad)
            if other is not None:
                other.run()
        results.append((grad, sums, coefficients, out))
    assert all(torch.equal(one, same) for one, same in zip(*results))


@pytest.mark.parametrize("from_start", [False, True], ids=["relu", "start"])
@pytest.mark.parametrize("tables", [1, 2], ids=["batch", "instance"])
def test_inputs_of_residual_blocks(tables, from_start):
    from fastperc.kernels import instance_norm, residual_inputs

    raws, start = [nhwc(2, 20, 9, 13) for _ in range(3)], nhwc(2, 20, 9, 13) if from_start else None
    activations = [
        Deferred(raw, torch.randn(tables, 5, 20, device=DEVICE), i == 0 and not from_start)
        for i, raw in enumerate(raws)
    ]
    outs, expected = ([torch.empty_like(raw) for raw in raws] for _ in range(2))
    residual_inputs.residual_inputs(start, activations, outs)
    for before, activation, out in zip([start, *expected], activations, expected):
        instance_norm.instance_norm_fwd(activation, before, out)
    assert all(torch.equal(*pair) for pair in zip(outs, expected))
