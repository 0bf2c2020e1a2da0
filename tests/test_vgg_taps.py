"""Taps of the frozen loss network before the ReLU, after it and after the pooling: maps, terms and gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cases import RUNS, dtype_id, error, half_precision, no_worse
from frozen import narrow_vgg

from fastperc import ops, reference, use_backend
from fastperc.ops.vgg_loss import plain_vgg_loss
from fastperc.ops.vgg_terms import CRITERIA, ContentTerm, GramTerm
from fastperc.types import FrozenConv, Tap

BACKENDS = [run for run in RUNS if run != ("cuda", "native")]
CASES = [
    pytest.param(device, backend, dtype, id=f"{device}-{backend}-{dtype_id(dtype)}")
    for device, backend in BACKENDS
    for dtype in [torch.float32, *half_precision(backend)]
]
CONV, RELU, POOL = "conv", "relu", "pool"
TAPS = {  # of a network of five convolutions, whose poolings stand after 1, 3 and 4
    "before-relu-alone": [Tap(4, CONV)],
    "pool-alone": [Tap(3, POOL)],
    "last-pool": [Tap(4, POOL)],
    "all-of-a-layer": [Tap(1, CONV), Tap(1, RELU), Tap(1, POOL)],
    "first-and-last": [Tap(0, CONV), Tap(0, RELU), Tap(4, CONV)],
    "mixed": [Tap(1, POOL), Tap(2, CONV), Tap(3, RELU), Tap(4, RELU), Tap(4, POOL)],
}


@pytest.fixture(scope="module", params=[False, True], ids=["max", "average"])
def convs(request):
    return narrow_vgg(averages=request.param)


def moved(convs, device, dtype):
    return [conv._replace(weight=conv.weight.to(device, dtype), bias=conv.bias.to(device, dtype)) for conv in convs]


def maps_and_gradient(run, x, convs, taps, weights):
    x = x.detach().requires_grad_()
    maps = run(x, convs, taps)
    sum((maps[tap].to(weight.dtype) * weight).sum() for tap, weight in weights.items()).backward()
    return {tap: features.detach() for tap, features in maps.items()}, x.grad


@pytest.mark.parametrize("taps", TAPS)
@pytest.mark.parametrize(("device", "backend"), BACKENDS, ids=str)
def test_maps_and_their_gradients(convs, device, backend, taps):
    taps, x = TAPS[taps], torch.randn(2, 3, 21, 18, device=device)
    exact_convs = moved(convs, device, torch.float64)
    shapes = {tap: maps.shape for tap, maps in reference.vgg_features(x.double(), exact_convs, taps).items()}
    for used in (taps, taps[:1], taps[-1:]):  # some get no gradient
        weights = {tap: torch.randn(shapes[tap], dtype=torch.float64, device=device) for tap in used}
        expected, grad = maps_and_gradient(reference.vgg_features, x.double(), exact_convs, taps, weights)
        weights = {tap: weight.float() for tap, weight in weights.items()}
        with use_backend(backend):
            maps, ours = maps_and_gradient(ops.vgg_features, x, moved(convs, device, torch.float32), taps, weights)
        assert list(maps) == taps
        assert max(error(maps[tap], expected[tap]) for tap in taps) < 1e-6
        assert error(ours, grad) < 1e-5


@pytest.mark.parametrize("backend", [backend for _, backend in BACKENDS])
def test_maps_before_a_relu_hold_negative_numbers_and_may_be_changed(convs, backend):
    device = dict((b, d) for d, b in BACKENDS)[backend]
    x, taps = torch.randn(1, 3, 16, 16, device=device, requires_grad=True), [Tap(1, CONV), Tap(1, RELU)]
    with use_backend(backend):
        maps = ops.vgg_features(x, moved(convs, device, torch.float32), taps)
        before = maps[taps[0]]
        assert (before < 0).any() and torch.equal(before.relu(), maps[taps[1]])
        expected = torch.autograd.grad(maps[taps[1]].sum(), x, retain_graph=True)[0]
        with torch.no_grad():
            before.zero_()
        assert torch.equal(torch.autograd.grad(maps[taps[1]].sum(), x)[0], expected)


def losses_and_gradient(run, output, target, convs, terms):
    output = output.detach().requires_grad_()
    values, sizes = run(output, target, convs, terms, True)
    (values * torch.linspace(1, 2, len(terms), dtype=values.dtype, device=values.device)).sum().backward()
    return values.detach(), sizes.detach(), output.grad


def terms_at(taps, criterion, gram=None):
    """A content and a Gram term at each of ``taps``."""
    return [term for tap in taps for term in (ContentTerm(tap, criterion), GramTerm(tap, criterion, gram))]


TERMS = {
    "content-before-relu": lambda c: [ContentTerm(Tap(4, CONV), c)],
    "content-everywhere": lambda c: [ContentTerm(tap, c) for tap in TAPS["mixed"]],
    "gram-of-target": lambda c: [GramTerm(Tap(1, RELU), c), GramTerm(Tap(3, CONV), c)],
    "both": lambda c: terms_at([Tap(1, CONV), Tap(3, RELU), Tap(3, POOL)], c),
    "two-of-a-tap": lambda c: [ContentTerm(Tap(2), c), ContentTerm(Tap(2), "l2"), ContentTerm(Tap(2, CONV), c)],
    "gram-of-painting-deeper": lambda c: [ContentTerm(Tap(0, CONV), c), GramTerm(Tap(3), c, torch.eye(32)[None])],
}


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize(("device", "backend", "dtype"), CASES)
def test_terms_are_as_exact_as_plain_pytorch(convs, device, backend, dtype, criterion, terms):
    terms = TERMS[terms](criterion)
    # Of maps that are half as large as their target, so that rounding turns no sign: there the gradient of "l1" jumps.
    output, target = (scale * torch.rand(2, 3, 13, 18).to(device, dtype) for scale in (1, 2))
    rounded = moved(convs, device, dtype)
    with use_backend(backend):
        ours = losses_and_gradient(ops.vgg_loss, output, target, rounded, terms)
    stock = losses_and_gradient(plain_vgg_loss, output, target, rounded, terms)
    exact = losses_and_gradient(
        plain_vgg_loss, output.double(), target.double(), moved(rounded, device, torch.float64), terms
    )
    assert ours[0].dtype == torch.float32
    for a, b, c, floor in zip(ours, stock, exact, (1e-6, 1e-6, 5e-4) if dtype == torch.float32 else (2e-3,) * 3):
        no_worse(a, b, c, floor)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize(("device", "backend"), BACKENDS, ids=str)
def test_same_bits_every_time_and_in_a_second_backward(convs, device, backend, criterion):
    output, target = (torch.randn(2, 3, 21, 18, device=device) for _ in range(2))
    output.requires_grad_()
    terms = terms_at([Tap(1, CONV), Tap(3, RELU)], criterion)
    with use_backend(backend):
        values, _ = ops.vgg_loss(output, target, moved(convs, device, torch.float32), terms)
        grads = [torch.autograd.grad(values.sum(), output, retain_graph=True)[0] for _ in range(3)]
        again, _ = ops.vgg_loss(output, target, moved(convs, device, torch.float32), terms)
    assert torch.equal(again, values) and all(torch.equal(grad, grads[0]) for grad in grads[1:])


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=dtype_id)
def test_half_precision_is_finite_where_features_are_large(dtype, criterion):
    averaging = [  # the mean of the input's channels, in 16 channels
        FrozenConv(torch.zeros(16, c, 3, 3, dtype=dtype), torch.zeros(16, dtype=dtype), False) for c in (3, 16)
    ]
    for conv in averaging:
        conv.weight[:, :, 1, 1] = 1 / conv.weight.shape[1]
    output, target = (torch.full((1, 3, 16, 16), value).to(dtype).requires_grad_(value == 1e4) for value in (1e4, 2e3))
    with use_backend("native"):
        terms = [ContentTerm(Tap(0, CONV), criterion), ContentTerm(Tap(1, CONV), criterion)]
        values, sizes = ops.vgg_loss(output, target, averaging, [*terms, GramTerm(Tap(1, CONV), criterion)], True)
    (values / sizes).sum().backward()
    assert values.isfinite().all() and values[0] >= 7.9e3 and output.grad.isfinite().all() and output.grad.any()


@pytest.mark.parametrize("criterion", CRITERIA)
def test_gradients_reach_both_sides_where_asked(convs, criterion):
    exact = moved(convs, "cpu", torch.float64)
    terms = terms_at([Tap(1, CONV), Tap(2, RELU)], criterion)
    output, target = (torch.rand(1, 3, 8, 9, dtype=torch.float64, requires_grad=True) for _ in range(2))
    both = ops.vgg_loss(output, target, exact, terms, False, True).values.sum()
    alone = ops.vgg_loss(output, target, exact, terms).values.sum()
    assert error(both, alone) < 1e-12
    grads = torch.autograd.grad(both, (output, target))
    assert error(grads[0], torch.autograd.grad(alone, output)[0]) < 1e-10
    # A loss of differences is the same with the sides exchanged.
    assert (
        error(grads[1], torch.autograd.grad(ops.vgg_loss(target, output, exact, terms).values.sum(), target)[0]) < 1e-10
    )


def test_gradcheck_once_and_twice(convs):
    exact = moved(convs[:3], "cpu", torch.float64)
    terms = [ContentTerm(Tap(2, CONV)), GramTerm(Tap(1, CONV)), ContentTerm(Tap(1, POOL), "smooth_l1")]
    output, target = (torch.randn(1, 3, 4, 5, dtype=torch.float64, requires_grad=i == 0) for i in range(2))
    with use_backend("native"):
        assert torch.autograd.gradcheck(lambda x: ops.vgg_loss(x, target, exact, terms).values, output)
        assert torch.autograd.gradgradcheck(lambda x: ops.vgg_loss(x, target, exact, terms).values, output)


def test_an_empty_batch_gives_0(convs):
    output, target = torch.rand(0, 3, 16, 16, requires_grad=True), torch.rand(0, 3, 16, 16)
    values, sizes = ops.vgg_loss(output, target, convs, [ContentTerm(Tap(1)), GramTerm(Tap(3, CONV))], True)
    values.sum().backward()
    assert values.tolist() == [0, 0] and sizes.tolist() == [1, 1] and output.grad.shape == output.shape


def test_refuses_what_the_network_does_not_have(convs):
    x = torch.rand(1, 3, 16, 16)
    for tap in (Tap(5), Tap(0, "norm"), Tap(0, POOL)):
        with pytest.raises(ValueError, match="has no Tap"):
            ops.vgg_features(x, convs, [tap])
    with pytest.raises(ValueError, match=r"3×16 are too small for the loss network.* at least 4×4"):
        ops.vgg_features(x[:, :, :3], convs, [Tap(4)])
    with pytest.raises(ValueError, match="criterion must be one of l2, l1, smooth_l1, got 'cosine'"):
        ops.vgg_loss(x, x, convs, [ContentTerm(Tap(1), "cosine")])
    with pytest.raises(ValueError, match="no layer"):
        ops.vgg_loss(x, x, convs, [])


@pytest.mark.parametrize("taps", [[Tap(6, CONV)], [Tap(1, CONV), Tap(3, CONV), Tap(6, CONV)]], ids=["deepest", "all"])
def test_keeps_a_fraction_of_what_autograd_keeps(monkeypatch, taps):
    """VGG-19's layers before the ReLU, at batch 4: peak memory of forward and backward."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    from memory import peak_bytes

    sizes = [(3, 64), (64, 64), (64, 128), (128, 128), (128, 256), (256, 256), (256, 256)]
    convs = [FrozenConv(torch.randn(o, i, 3, 3) * 0.05, torch.zeros(o), k in (2, 4)) for k, (i, o) in enumerate(sizes)]
    output, target = torch.rand(4, 3, 96, 96, requires_grad=True), torch.rand(4, 3, 96, 96)

    def step():
        output.grad = None
        ops.vgg_loss(output, target, convs, [ContentTerm(tap, "l1") for tap in taps]).values.sum().backward()

    step()  # packs the weights
    ours = peak_bytes(step)
    with use_backend("reference"):
        assert ours <= 0.35 * peak_bytes(step)
