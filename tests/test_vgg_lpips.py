"""LPIPS of images under a frozen network: as exact as plain PyTorch, the same every time, and how little it keeps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cases import GPU, RUNS, dtype_id, error, no_worse

from fastperc import ops, use_backend
from fastperc.models.vgg import CONVOLUTIONS
from fastperc.ops.vgg_lpips import Network, plain_vgg_lpips
from fastperc.types import FrozenConv, Tap

KERNEL_RUNS = [run for run in RUNS if run != ("cuda", "native")]
CASES = [
    pytest.param(device, backend, dtype, id=f"{device}-{backend}-{dtype_id(dtype)}")
    for device, backend in KERNEL_RUNS
    for dtype in [torch.float32, torch.float16, *[torch.bfloat16] * (backend == "native" or GPU)]
]


@pytest.fixture(scope="module")
def network():
    """Like VGG-16, narrow: 3 → 16 → 16, pool, → 32 → 32, pool, → 32 → 32; the taps before pools, between and last."""
    generator = torch.Generator().manual_seed(3)
    sizes = [(3, 16, False), (16, 16, False), (16, 32, True), (32, 32, False), (32, 32, True), (32, 32, False)]
    convs = [
        FrozenConv(
            torch.randn(o, i, 3, 3, generator=generator) * (2 / (9 * i)) ** 0.5,
            torch.randn(o, generator=generator) * 0.1,
            pooled,
        )
        for i, o, pooled in sizes
    ]
    taps = (1, 2, 5)
    return Network(convs, taps, [torch.rand(len(convs[i].bias), generator=generator) for i in taps])


def moved(network, device, dtype):
    convs = [
        FrozenConv(weight.to(device, dtype), bias.to(device, dtype), pooled)
        for weight, bias, pooled in (conv[:3] for conv in network.convs)
    ]
    return Network(convs, network.taps, [weight.to(device) for weight in network.weights])


def total_of(terms):
    return torch.stack(terms).sum(dim=0)


def run_network(run, x, target, network, size, wanted):
    x, target = (t.detach().requires_grad_(want) for t, want in zip((x, target), wanted))
    total = total_of(run(x, target, network, size))
    total.backward(torch.linspace(1, 2, total.numel(), device=total.device).view_as(total).to(total))
    return total.detach(), [t.grad for t in (x, target) if t.requires_grad]


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (True, True)], ids=["first", "second", "both"])
@pytest.mark.parametrize("size", [None, (21, 18)], ids=["mean", "spatial"])
@pytest.mark.parametrize(("device", "backend", "dtype"), CASES)
def test_as_exact_as_plain_pytorch(network, device, backend, dtype, size, wanted):
    x, target = (torch.randn(3, 3, 21, 18).to(device, dtype) for _ in range(2))
    rounded = moved(network, device, dtype)
    with use_backend(backend):
        ours, grads = run_network(ops.vgg_lpips, x, target, rounded, size, wanted)
    with use_backend("reference"):
        stock, stock_grads = run_network(ops.vgg_lpips, x, target, rounded, size, wanted)
        wide = moved(rounded, device, torch.float64)
        exact, exact_grads = run_network(ops.vgg_lpips, x.double(), target.double(), wide, size, wanted)
    floor = 1e-6 if dtype == torch.float32 else 1e-3
    assert ours.dtype == torch.float32
    no_worse(ours, stock, exact, floor)
    for grad, stock_grad, exact_grad in zip(grads, stock_grads, exact_grads, strict=True):
        assert grad.dtype == dtype
        no_worse(grad, stock_grad, exact_grad, floor)


@pytest.mark.parametrize(("device", "backend"), KERNEL_RUNS, ids=str)
@pytest.mark.usefixtures("poisoned")
def test_same_bits_every_time_and_in_a_second_backward(network, device, backend):
    x, target = (torch.randn(2, 3, 21, 18, device=device).half().requires_grad_() for _ in range(2))
    half = moved(network, device, torch.float16)
    with use_backend(backend):
        total = total_of(ops.vgg_lpips(x, target, half)).sum()
        grads = [torch.autograd.grad(total, (x, target), retain_graph=True) for _ in range(3)]  # kept, then made anew
        again = total_of(ops.vgg_lpips(x, target, half)).sum()
    assert torch.equal(again, total)
    assert all(torch.equal(a, b) for pair in grads[1:] for a, b in zip(pair, grads[0]))


def test_features_as_the_target(network):
    x, target = torch.randn(2, 3, 21, 18, requires_grad=True), torch.randn(2, 3, 21, 18)
    features = [*ops.vgg_features(target, network.convs, [Tap(i) for i in network.taps]).values()]
    kept = [f.clone() for f in features]
    results = []
    for given in (target, features, [f.contiguous() for f in features]):
        total = total_of(ops.vgg_lpips(x, given, network))
        results.append((total, torch.autograd.grad(total.sum(), x)[0]))
    assert all(error(a, b) < 1e-6 for result in results[1:] for a, b in zip(result, results[0]))
    assert all(torch.equal(a, b) for a, b in zip(features, kept))  # the target is left as it is


def test_gradcheck_once_and_twice(network):
    wide = moved(network, "cpu", torch.float64)._replace(
        convs=moved(network, "cpu", torch.float64).convs[:3], taps=(1, 2)
    )
    x, target = (torch.randn(1, 3, 4, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def total(x, target):
        return total_of(ops.vgg_lpips(x, target, wide))

    with use_backend("native"):
        assert torch.autograd.gradcheck(total, (x, target))
        assert torch.autograd.gradgradcheck(total, (x, target))


@pytest.mark.parametrize(("device", "backend"), KERNEL_RUNS, ids=str)
def test_an_image_that_is_not_finite_stays_visible(network, device, backend):
    x = torch.rand(2, 3, 16, 16, device=device).half()
    x[1, 1, 3, 4] = float("nan")
    with use_backend(backend):
        total = total_of(ops.vgg_lpips(x, torch.rand_like(x), moved(network, device, torch.float16)))
    assert total[1].isnan() and total[0].isfinite()


def test_weights_that_want_gradients_get_them(network):
    convs = [conv._replace(weight=conv.weight.clone().requires_grad_()) for conv in network.convs]
    x, target = torch.randn(1, 3, 16, 16), torch.randn(1, 3, 16, 16)
    total_of(ops.vgg_lpips(x, target, network._replace(convs=convs))).sum().backward()
    assert all(conv.weight.grad.any() for conv in convs)


def test_refuses_other_batches_and_shapes(network):
    with pytest.raises(ValueError, match="as many images on both sides, or one on either, got 2 and 3"):
        ops.vgg_lpips(torch.rand(2, 3, 16, 16), torch.rand(3, 3, 16, 16), network)
    with pytest.raises(ValueError, match=r"one shape, got \[2, 3, 16, 16\] and \[2, 3, 16, 18\]"):
        ops.vgg_lpips(torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 18), network)


def test_keeps_little(monkeypatch):
    """Peak memory of forward and backward at batch 1 and 4, on the true network."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    from memory import peak_bytes

    convs = [
        FrozenConv(0.05 * torch.randn(o, i, 3, 3), torch.zeros(o), name[-1] == "1" and name != "1_1")
        for name, i, o in CONVOLUTIONS
    ]
    network = Network(convs, (1, 3, 6, 9, 12), [torch.rand(len(convs[i].bias)) for i in (1, 3, 6, 9, 12)])
    for batch in (1, 4):
        x, target = torch.rand(batch, 3, 128, 128, requires_grad=True), torch.rand(batch, 3, 128, 128)

        def step(x=x, target=target):
            x.grad = None
            total_of(ops.vgg_lpips(x, target, network)).sum().backward()

        step()  # packs the weights
        ours = peak_bytes(step)
        with use_backend("reference"):
            stock = peak_bytes(step)
        assert ours <= 0.4 * stock


def test_the_plain_path_is_the_reference(network):
    x, target = torch.randn(1, 3, 16, 16), torch.randn(1, 3, 16, 16)
    maps = plain_vgg_lpips(x, target, network)
    assert [tuple(m.shape) for m in maps] == [(1, 1, 16, 16), (1, 1, 8, 8), (1, 1, 4, 4)]
