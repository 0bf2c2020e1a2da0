"""Batch statistics over two processes: those of the whole batch, with the same bits in both."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from cases import error
from torch import nn
from two_processes import in_two_processes

from fastperc import backends, ops, use_backend
from fastperc.collective import combine_over_processes
from fastperc.types import RELU

# Batches of the two processes, of different sizes, one of them empty, one of a single value a channel each.
SHARES = {"3+2": (3, 2, 33, 20), "4+0": (4, 0, 9, 8), "1+1": (1, 1, 1, 1)}
CASES = [
    ("native", "3+2", torch.float32, True),
    ("reference", "3+2", torch.float32, True),
    ("reference", "3+2", torch.float64, False),
    (None, "4+0", torch.float32, True),  # plain PyTorch takes the empty batch, the C++ kernel the other
    (None, "1+1", torch.float32, False),
]


def case_id(case):
    backend, shares, dtype, relu = case
    return f"{backend or 'any'}-{shares}-{str(dtype).removeprefix('torch.')}{'-relu' * relu}"


def whole_batch(shares, channels=5):
    """A batch and an incoming gradient, float64."""
    first, second, height, width = SHARES[shares]
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(first + second, channels, height, width, generator=generator, dtype=torch.float64) * 3 + 20
    incoming = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    return x, incoming


def share_of(rank, shares, *tensors):
    first = SHARES[shares][0]
    return [tensor[:first] if rank == 0 else tensor[first:] for tensor in tensors]


def norm_of(kind, dtype, channels=5):
    torch.manual_seed(3)
    norm = nn.BatchNorm2d(channels, momentum=0.3)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.normal_(norm.bias)
    return (nn.SyncBatchNorm.convert_sync_batchnorm(norm) if kind == "sync" else norm).to(dtype)


def outcome(norm, x, incoming, relu, dtype, with_skip):
    """The output, the gradients to the input, weight and bias, and the norm's state afterwards."""
    x = x.to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    skip = x.detach().flip(1) if with_skip else None
    y = ops.norm_relu(x, norm, RELU if relu else None, skip)
    gradients = torch.autograd.grad(y, [x, norm.weight, norm.bias], incoming.to(dtype))
    return [y.detach(), *gradients, *norm.state_dict().values()]


def norms(rank):
    results = []
    for backend, shares, dtype, relu in CASES:
        x, incoming = share_of(rank, shares, *whole_batch(shares))
        norm = norm_of("sync", dtype)
        with use_backend(backend) if backend else backends.recorded():
            values = outcome(norm, x, incoming, relu, dtype, not relu)
        results.append((values, list(norm.state_dict())))
    return results


def gradients_of_gradients(rank):
    x = whole_batch("3+2")[0][:, :, :5, :4]
    (x,) = share_of(rank, "3+2", x)
    norm, results = norm_of("sync", torch.float64), []
    for dtype, backend in ((torch.float64, "reference"), (torch.float32, "native")):
        with use_backend(backend):
            results.append([gradient.double() for gradient in penalty(norm.to(dtype), x.to(dtype))])
    return results


def penalty(norm, x):
    """Gradients of a function of the gradient."""
    leaf = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    (gradient,) = torch.autograd.grad(ops.norm_relu(leaf, norm).pow(3).sum(), leaf, create_graph=True)
    return torch.autograd.grad(gradient.square().sum(), [leaf, *norm.parameters()])


def combined(rank):
    x = whole_batch("3+2")[0].float()
    (share,) = share_of(rank, "3+2", x)
    variance, mean = torch.var_mean(share, (0, 2, 3), correction=0)
    count = share[:, 0].numel()
    return combine_over_processes(torch.stack([torch.full_like(mean, count), mean, variance * count]))


def work(rank):
    return norms(rank), gradients_of_gradients(rank), combined(rank)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    return in_two_processes(work, tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("index", range(len(CASES)), ids=[case_id(case) for case in CASES])
def test_norms_over_two_processes_are_those_of_the_whole_batch(both, index):
    _, shares, dtype, relu = CASES[index]
    x, incoming = whole_batch(shares)
    norm = norm_of("plain", torch.float64)
    exact = outcome(norm, x, incoming, relu, torch.float64, not relu)
    (first, keys), (second, _) = (results[0][index] for results in both)
    assert keys == list(norm.state_dict())
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    for a, b, expected in zip(first[:2], second[:2], exact[:2]):  # output and its gradient: one part in each process
        joined = torch.cat([a, b])
        assert joined.dtype == dtype
        assert error(joined, expected) < tolerance or (joined - expected).norm() < 1e-4
    for a, b, expected in zip(first[2:4], second[2:4], exact[2:4]):  # gradients of the parameters: they add up
        assert error(a + b, expected) < 10 * tolerance or (a + b - expected).norm() < 1e-5
    for a, b, expected in zip(first[4:], second[4:], exact[4:]):  # the state: the same in both
        assert torch.equal(a, b) and error(a, expected) < tolerance


def test_gradients_of_gradients_over_two_processes(both):
    x = whole_batch("3+2")[0][:, :, :5, :4]
    with use_backend("reference"):
        exact = penalty(norm_of("plain", torch.float64), x)
    scale = max(gradient.norm() for gradient in exact)
    for index, tolerance in ((0, 1e-10), (1, 1e-4)):
        first, second = both[0][1][index], both[1][1][index]
        actual = torch.cat([first[0], second[0]]), first[1] + second[1], first[2] + second[2]
        assert all((a - expected).norm() < tolerance * scale for a, expected in zip(actual, exact))


def test_statistics_combine(both):
    x = whole_batch("3+2")[0].float().double()
    variance, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    first, second = both[0][2], both[1][2]
    assert first.dtype == torch.float32 and torch.equal(first, second)
    count = x[:, 0].numel()
    assert (first[0] == count).all() and error(first[1], mean) < 1e-6 and error(first[2], variance * count) < 1e-6


def test_one_process_normalises_as_batch_norm(tmp_path):
    """A group of one: PyTorch's own SyncBatchNorm refuses the CPU even then."""
    dist.init_process_group("gloo", (tmp_path / "store").as_uri(), rank=0, world_size=1)
    try:
        x, incoming = whole_batch("3+2")
        synced, plain = (
            outcome(norm_of(kind, torch.float32), x, incoming, True, torch.float32, False) for kind in ("sync", "plain")
        )
        assert all(torch.equal(a, b) for a, b in zip(synced, plain))
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            ops.norm_relu(torch.rand(1, 5, 1, 1), norm_of("sync", torch.float32))
    finally:
        dist.destroy_process_group()
