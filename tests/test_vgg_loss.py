"""The frozen loss network: its passes over memory, its features, its terms, and how little it keeps."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from cases import RUNS, dtype_id, error, half_precision, no_worse
from frozen import narrow_vgg
from torch import Tensor

from fastperc import _native, gram_matrix, ops, reference, use_backend
from fastperc.ops.vgg_loss import plain_vgg_loss
from fastperc.ops.vgg_terms import ContentTerm, GramTerm
from fastperc.types import FrozenConv, Tap

CHANNELS_LAST = torch.channels_last
CASES = [
    pytest.param(device, backend, dtype, id=f"{device}-{backend}-{dtype_id(dtype)}")
    for device, backend in RUNS
    if (device, backend) != ("cuda", "native")
    for dtype in [torch.float32, *half_precision(backend)]
]
SHAPES = [(2, 3, 21, 18), (1, 3, 9, 30), (3, 3, 8, 8)]
TERMS = {  # the content layer, and the style layers, of a network whose pooling stands before layer 2
    "paper-like": (3, (1, 3, 4)),
    "content-deepest": (4, (0, 2)),
    "content-first": (0, (1, 4)),
    "content-alone": (3, ()),
    "style-before-content": (2, (1,)),
}


@pytest.fixture(scope="module")
def convs():
    return narrow_vgg()


class Terms(NamedTuple):
    """The values of a content term and of style terms, and the size of the content's target."""

    content: Tensor
    style: Tensor
    target_square: Tensor


def terms_of(run, output, content, convs, content_layer, grams):
    """The squared distances at the ReLU of ``content_layer`` and of the Gram matrices ``grams``, by layer."""
    styles = [GramTerm(Tap(layer), gram=gram) for layer, gram in grams.items()]
    values, sizes = run(output, content, convs, [ContentTerm(Tap(content_layer)), *styles], True)
    return Terms(values[0], values[1:], sizes[0])


def maps_of(run, x, convs, layers):
    """The maps after the ReLUs of ``layers``, by layer."""
    return {tap.conv: maps for tap, maps in run(x, convs, [Tap(layer) for layer in layers]).items()}


def moved(convs, device, dtype):
    return [FrozenConv(conv.weight.to(device, dtype), conv.bias.to(device, dtype), conv.pooled) for conv in convs]


def grams_of(convs, layers):
    if not layers:
        return {}
    features = maps_of(reference.vgg_features, torch.randn(1, 3, 24, 24), convs, layers)
    return {layer: gram_matrix(features[layer]) for layer in layers}


def terms_and_gradient(run, output, content, convs, content_layer, grams, weights=(3.0, 2.0)):
    output = output.detach().requires_grad_()
    terms = terms_of(run, output, content, convs, content_layer, grams)
    (weights[0] * terms.content + weights[1] * terms.style.sum()).backward()
    return [term.detach() for term in terms], output.grad


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize(("device", "backend", "dtype"), CASES)
def test_terms_are_as_exact_as_plain_pytorch(convs, device, backend, dtype, terms):
    content_layer, style_layers = TERMS[terms]
    for shape in SHAPES if backend == "native" else SHAPES[:1]:
        output, content = torch.randn(shape).to(device, dtype), torch.randn(shape).to(device, dtype)
        grams = {layer: gram.to(device) for layer, gram in grams_of(convs, style_layers).items()}
        with use_backend(backend):
            arguments = (output, content, moved(convs, device, dtype), content_layer, grams)
            ours, grad = terms_and_gradient(ops.vgg_loss, *arguments)
        stock, stock_grad = terms_and_gradient(plain_vgg_loss, *arguments)
        exact, exact_grad = terms_and_gradient(
            plain_vgg_loss,
            output.double(),
            content.double(),
            moved(moved(convs, device, dtype), device, torch.float64),
            content_layer,
            {layer: gram.double() for layer, gram in grams.items()},
        )
        floor = 1e-6 if dtype == torch.float32 else 1e-3
        for a, b, c in zip(ours, stock, exact):
            assert a.dtype == torch.float32 and a.shape == c.shape
            no_worse(a, b, c, floor)
        assert grad.dtype == dtype
        no_worse(grad, stock_grad, exact_grad, floor)


@pytest.mark.parametrize(("device", "backend"), [run for run in RUNS if run != ("cuda", "native")], ids=str)
def test_same_bits_every_time_and_in_a_second_backward(convs, device, backend):
    output, content = (torch.randn(2, 3, 21, 18, device=device).half() for _ in range(2))
    grams = {layer: gram.to(device) for layer, gram in grams_of(convs, (1, 3)).items()}
    output.requires_grad_()
    with use_backend(backend):
        terms = terms_of(ops.vgg_loss, output, content, moved(convs, device, torch.float16), 3, grams)
        total = terms.content + terms.style.sum()
        grads = [torch.autograd.grad(total, output, retain_graph=True)[0] for _ in range(3)]  # kept, then made anew
        again = terms_of(ops.vgg_loss, output, content, moved(convs, device, torch.float16), 3, grams)
    assert all(torch.equal(grad, grads[0]) for grad in grads[1:])
    assert torch.equal(again.content, terms.content) and torch.equal(again.style, terms.style)


def test_gradients_reach_the_output_alone(convs):
    output, content = torch.randn(1, 3, 16, 16, requires_grad=True), torch.randn(1, 3, 16, 16, requires_grad=True)
    terms_of(ops.vgg_loss, output, content, convs, 3, grams_of(convs, (1,))).content.backward()
    assert output.grad.any() and content.grad is None
    assert not terms_of(ops.vgg_loss, output, content, convs, 3, {}).target_square.requires_grad


def test_gradcheck_once_and_twice(convs):
    wide = moved(convs[:3], "cpu", torch.float64)
    grams = {layer: gram.double() for layer, gram in grams_of(convs, (1, 2)).items()}
    output, content = (torch.randn(1, 3, 4, 5, dtype=torch.float64, requires_grad=i == 0) for i in range(2))

    def total(output):
        terms = terms_of(ops.vgg_loss, output, content, wide, 2, grams)
        return terms.content + terms.style[0] + 2 * terms.style[1]

    with use_backend("native"):
        assert torch.autograd.gradcheck(total, output)
        assert torch.autograd.gradgradcheck(total, output)


def test_under_autocast(convs):
    output, content = torch.randn(1, 3, 16, 16, requires_grad=True), torch.randn(1, 3, 16, 16)
    grams = grams_of(convs, (1,))
    with torch.autocast("cpu", torch.bfloat16):
        terms = terms_of(ops.vgg_loss, output, content, convs, 3, grams)
        features = maps_of(ops.vgg_features, output, convs, [3])
    (terms.content + terms.style.sum()).backward()
    assert features[3].dtype == torch.bfloat16
    assert {term.dtype for term in terms} == {torch.float32} and output.grad.dtype == torch.float32
    assert error(terms.content, terms_of(ops.vgg_loss, output, content, convs, 3, grams).content) < 0.05


def test_a_changed_weight_is_seen(convs):
    convs = moved(convs, "cpu", torch.float32)
    convs = [FrozenConv(conv.weight.clone(), conv.bias.clone(), conv.pooled) for conv in convs]
    x = torch.randn(1, 3, 16, 16)
    for change in (lambda: convs[1].weight.mul_(2), lambda: convs[0].bias.add_(1)):
        maps_of(ops.vgg_features, x, convs, [4])
        change()
        assert (
            error(maps_of(ops.vgg_features, x, convs, [4])[4], maps_of(reference.vgg_features, x, convs, [4])[4]) < 1e-6
        )


def test_weights_that_want_gradients_get_them(convs):
    convs = [FrozenConv(conv.weight.clone().requires_grad_(), conv.bias, conv.pooled) for conv in convs]
    maps_of(ops.vgg_features, torch.randn(1, 3, 16, 16), convs, [4])[4].sum().backward()
    assert all(conv.weight.grad.any() for conv in convs)


def test_the_targets_square_keeps_its_digits_over_a_million_values(convs):
    content = torch.rand(1, 3, 256, 256)
    exact = (
        maps_of(reference.vgg_features, content.double(), moved(convs[:2], "cpu", torch.float64), [1])[1]
        .square()
        .mean()
    )
    with use_backend("native"):
        square = terms_of(ops.vgg_loss, torch.rand_like(content), content, convs, 1, {}).target_square
    assert error(square, exact) < 1e-6


def test_refuses_content_of_another_shape(convs):
    with pytest.raises(ValueError, match=r"shape \[1, 3, 16, 16\], got \[1, 3, 16, 12\]"):
        terms_of(ops.vgg_loss, torch.rand(1, 3, 16, 16), torch.rand(1, 3, 16, 12), convs, 1, {})


@pytest.mark.parametrize(("device", "backend"), [run for run in RUNS if run != ("cuda", "native")], ids=str)
def test_an_image_that_is_not_finite_stays_visible(convs, device, backend):
    output = torch.rand(1, 3, 16, 16, device=device).half()
    output[0, 1, 3, 4] = float("nan")
    with use_backend(backend):
        terms = terms_of(ops.vgg_loss, output, torch.rand_like(output), moved(convs, device, torch.float16), 3, {})
    assert terms.content.isnan()


@pytest.mark.parametrize("used", [(1, 3, 4), (1,), (4,), (3,)], ids=str)
@pytest.mark.parametrize(("device", "backend"), [run for run in RUNS if run != ("cuda", "native")], ids=str)
def test_features_and_their_gradients(convs, device, backend, used):
    x = torch.randn(2, 3, 21, 18, device=device)
    weights = {}
    grads = []
    for run, of in ((ops.vgg_features, torch.float32), (reference.vgg_features, torch.float64)):
        image = x.to(of).detach().requires_grad_()
        with use_backend(backend):
            features = maps_of(run, image, moved(convs, device, of), (1, 3, 4))
        assert list(features) == [1, 3, 4]
        weights = weights or {layer: torch.randn_like(features[layer]) for layer in used}
        sum((features[layer] * weights[layer]).sum() for layer in used).backward()
        grads.append(image.grad)
    assert error(grads[0], grads[1]) < 1e-5


def test_features_twice_differentiable(convs):
    x = torch.randn(1, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    wide = moved(convs[:3], "cpu", torch.float64)
    with use_backend("native"):
        assert torch.autograd.gradgradcheck(lambda x: maps_of(ops.vgg_features, x, wide, [1, 2])[2].square().sum(), x)


def test_features_changed_in_place_are_noticed(convs):
    x = torch.randn(1, 3, 16, 16, requires_grad=True)
    features = maps_of(ops.vgg_features, x, convs, [1, 3])
    with torch.no_grad():
        features[1].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        features[3].sum().backward()


@pytest.mark.parametrize(("run", "share"), [("terms", 0.35), ("features", 0.5)])
def test_keeps_a_third_of_what_autograd_keeps(monkeypatch, run, share):
    """The paper's layers, to relu3_3, at batch 4: peak memory of forward and backward."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    from memory import peak_bytes

    sizes = [(3, 64), (64, 64), (64, 128), (128, 128), (128, 256), (256, 256), (256, 256)]
    convs = [FrozenConv(torch.randn(o, i, 3, 3) * 0.05, torch.zeros(o), k in (2, 4)) for k, (i, o) in enumerate(sizes)]
    grams = {1: torch.eye(64)[None], 3: torch.eye(128)[None], 6: torch.eye(256)[None]}
    output, content = torch.rand(4, 3, 128, 128, requires_grad=True), torch.rand(4, 3, 128, 128)

    def step():
        output.grad = None
        if run == "terms":
            terms = terms_of(ops.vgg_loss, output, content, convs, 3, grams)
            (terms.content + terms.style.sum()).backward()
        else:
            maps_of(ops.vgg_features, output, convs, [6])[6].sum().backward()

    step()  # packs the weights
    ours = peak_bytes(step)
    with use_backend("reference"):
        stock = peak_bytes(step)
    assert ours <= share * stock


def passes():
    from fastperc.kernels import vgg_loss as triton_kernels

    for device, backend in RUNS:
        if (device, backend) != ("cuda", "native"):
            for dtype in [torch.float32, *half_precision(backend)]:
                kernels = _native if backend == "native" else triton_kernels
                yield pytest.param(kernels, device, dtype, id=f"{device}-{backend}-{dtype_id(dtype)}")


@pytest.mark.parametrize("shape", [(1, 16, 3, 5), (3, 16, 9, 14), (1, 3, 3, 5), (2, 32, 1, 1)], ids=str)
@pytest.mark.parametrize(("kernels", "device", "dtype"), list(passes()))
class TestPasses:
    """What ReLU leaves, with NaN and zeros of both signs among it, against PyTorch."""

    @staticmethod
    def activations(shape, dtype, device):
        x = torch.randn(shape).relu()
        x.view(-1)[::7] = -0.0
        x.view(-1)[5::11] = 1e-30
        return x.to(device, dtype).contiguous(memory_format=CHANNELS_LAST)

    def test_mask(self, kernels, device, shape, dtype):
        x = self.activations(shape, dtype, device)
        grad = torch.randn_like(x)
        expected = grad * (x != 0)
        bits = torch.full(((x.numel() + 7) // 8,), 0xAA, dtype=torch.uint8, device=device)
        kernels.relu_mask_fwd(x, bits)
        kernels.relu_mask_bwd(grad, bits)
        assert torch.equal(grad, expected)

    def test_pool(self, kernels, device, shape, dtype):
        if min(shape[2:]) < 2:
            pytest.skip("no window fits")
        x = self.activations(shape, dtype, device)
        n, c, h, w = shape
        pooled = torch.full((n, c, h // 2, w // 2), float("nan"), dtype=dtype, device=device)
        pooled = pooled.contiguous(memory_format=CHANNELS_LAST)
        winners = torch.full_like(pooled[: (n + 1) // 2], 9, dtype=torch.uint8)  # the first images alone
        kernels.relu_pool_fwd(x, pooled, winners)
        assert torch.equal(pooled, F.max_pool2d(x, 2))

        image = x[: len(winners)].detach().requires_grad_()
        upstream = torch.randn_like(pooled[: len(winners)])
        F.max_pool2d(image.relu(), 2).backward(upstream)
        grad = torch.full_like(image, float("nan"))
        kernels.relu_pool_bwd(upstream, winners, grad)
        assert torch.equal(grad, image.grad)

    def test_not_finite_stays_visible(self, kernels, device, shape, dtype):
        x = self.activations(shape, dtype, device)
        x[0, 0, 0, 0] = float("nan")
        grad = torch.ones_like(x)
        bits = torch.empty((x.numel() + 7) // 8, dtype=torch.uint8, device=device)
        kernels.relu_mask_fwd(x, bits)
        kernels.relu_mask_bwd(grad, bits)
        assert grad[0, 0, 0, 0] == 1
        if min(shape[2:]) >= 2:
            pooled = F.max_pool2d(x, 2).contiguous(memory_format=CHANNELS_LAST)
            kernels.relu_pool_fwd(x, pooled, torch.empty_like(pooled, dtype=torch.uint8))
            assert pooled[0, 0, 0, 0].isnan()
