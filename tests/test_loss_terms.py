"""The weighted terms of a perceptual loss by Triton's kernels, which a training step on a GPU launches."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from cases import GPU, dtype_id, error, half_precision, no_worse
from frozen import narrow_vgg

from fastperc import ops, reference, use_backend
from fastperc.ops.loss_terms import LossTerms, plain_loss_terms
from fastperc.ops.vgg_terms import ContentTerm, GramTerm
from fastperc.types import FrozenConv, Tap

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
DEVICE = "cuda" if GPU else "cpu"  # where Triton's interpreter stands in
DTYPES = half_precision("triton")
CASES = {  # the content layer, the style layers, whether the content is relative to its target, and the criterion
    "style": (3, (1, 3, 4), True, "l2"),
    "content-deepest": (4, (0, 2), False, "l2"),
    "content-alone": (3, (), True, "l1"),
    "style-alone": (None, (1, 4), False, "l2"),
    "before-a-relu": (Tap(0, "conv"), (1,), True, "smooth_l1"),
}


@pytest.fixture(scope="module")
def convs():
    return narrow_vgg()


def loss_of(convs, case, dtype=torch.float32):
    content, styles, relative, criterion = CASES[case]
    moved = [FrozenConv(conv.weight.to(DEVICE, dtype), conv.bias.to(DEVICE, dtype), conv.pooled) for conv in convs]
    taps = [Tap(layer) for layer in styles]
    maps = reference.vgg_features(torch.randn(1, 3, 24, 24), convs, taps) if taps else {}
    terms = [GramTerm(tap, gram=reference.gram_matrix(maps[tap]).to(DEVICE, dtype)) for tap in taps]
    if content is not None:
        terms = [ContentTerm(content if isinstance(content, Tap) else Tap(content), criterion), *terms]
    constants = torch.tensor([[0.4, 0.5, 0.6], [0.2, 0.25, 0.3]], device=DEVICE, dtype=dtype).view(2, 1, 3, 1, 1)
    weights = torch.tensor([1.5, 0.5, 2.0], device=DEVICE, dtype=dtype)[: len(taps)] if taps else None
    return LossTerms(moved, *constants, terms, 2.0, 3.0, weights, 0.05, relative)


def run(function, loss, output, target, picked=0):
    """The terms, and the gradient of the total, or of the picked term or terms."""
    output = output.detach().requires_grad_()
    terms = function(output, target, loss)
    picked = [picked] if isinstance(picked, int) else picked
    sum((i + 1) * terms[i] for i in picked).backward()
    return [term.detach() for term in terms], output.grad


def pictures(dtype, layout=torch.channels_last):
    return [torch.rand(2, 3, 21, 18, device=DEVICE).to(dtype, memory_format=layout) for _ in range(2)]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("case", CASES)
def test_as_exact_as_plain_pytorch(convs, case, dtype):
    output, target = pictures(dtype)
    target = target.float()  # photos
    picked = {"content-deepest": (0, 1), "content-alone": 1, "style-alone": 2}.get(case, 0)
    with use_backend("triton"):
        loss = loss_of(convs, case)
        assert ops.why_not_loss_terms(output, target, loss) is None
        ours, grad = run(ops.loss_terms, loss, output, target, picked)
    stock, stock_grad = run(plain_in(dtype), loss, output, target, picked)
    wide = loss._replace(**widened(loss))
    exact, exact_grad = run(plain_loss_terms, wide, output.double(), target.double(), picked)
    for a, b, c in zip(ours, stock, exact):
        assert a.dtype == torch.float32 and a.shape == ()
        no_worse(a, b, c, 1e-3)
    assert grad.dtype == dtype and grad.is_contiguous(memory_format=torch.channels_last)
    no_worse(grad, stock_grad, exact_grad, 1e-3)


def test_same_bits_every_time(convs):
    loss, (output, target) = loss_of(convs, "style"), pictures(torch.float16)
    with use_backend("triton"):
        (terms, grad), (again, other) = (run(ops.loss_terms, loss, output, target) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip([*terms, grad], [*again, other]))


def plain_in(dtype):
    """The plain terms with the network in ``dtype``, as autocast has it."""

    def terms(output, target, loss):
        with torch.autocast(DEVICE, dtype):
            return plain_loss_terms(output, target, loss)

    return terms


def widened(loss):
    grams = [term._replace(gram=term.gram.double()) if isinstance(term, GramTerm) else term for term in loss.terms]
    convs = [conv._replace(weight=conv.weight.double(), bias=conv.bias.double()) for conv in loss.convs]
    weights = None if loss.layer_weights is None else loss.layer_weights.double()
    return dict(mean=loss.mean.double(), std=loss.std.double(), terms=grams, convs=convs, layer_weights=weights)


def test_any_layout_gives_the_same(convs):
    loss = loss_of(convs, "style")
    output, target = pictures(torch.float16)
    with use_backend("triton"):
        expected, grad = run(ops.loss_terms, loss, output, target)
        terms, other = run(ops.loss_terms, loss, output.contiguous(), target.contiguous())
    assert other.is_contiguous() and torch.equal(grad, other)
    assert all(error(*pair) < 1e-5 for pair in zip(terms, expected))


def test_a_second_backward_and_a_second_derivative(convs):
    loss = loss_of(convs, "style")
    output, target = pictures(torch.float16)
    output.requires_grad_()
    with use_backend("triton"):
        total = ops.loss_terms(output, target, loss)[0]
        grads = [torch.autograd.grad(total, output, retain_graph=True)[0] for _ in range(2)]
        assert torch.equal(*grads)
    (grad,) = torch.autograd.grad(total, output, create_graph=True)  # in plain PyTorch, in float32
    (second,) = torch.autograd.grad(grad.float().square().sum(), output)
    assert error(grad.detach(), grads[0]) < 0.02 and second.isfinite().all() and second.any()


def test_no_gradient_is_kept_where_none_is_wanted(convs):
    loss, (output, target) = loss_of(convs, "style"), pictures(torch.float16)
    with use_backend("triton"), torch.no_grad():
        terms = ops.loss_terms(output, target, loss)
    assert not any(term.requires_grad for term in terms)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_pixel_that_is_not_finite_shows_in_every_term(convs, value):
    loss, (output, target) = loss_of(convs, "style"), pictures(torch.float16)
    output[1, 2, 3, 4] = value
    with use_backend("triton"):
        assert not any(term.isfinite() for term in ops.loss_terms(output, target, loss)[:3])


def test_the_rest_is_not_the_kernels(convs):
    loss, (output, target) = loss_of(convs, "style"), pictures(torch.float16)
    assert GPU or "interpreted" in ops.why_not_loss_terms(output, target, loss)
    with use_backend("triton"):
        assert "float32" in ops.why_not_loss_terms(output.float(), target, loss)
        assert "shape" in ops.why_not_loss_terms(output, target[:1], loss)
        several = loss._replace(terms=[ContentTerm(Tap(0)), *loss.terms])
        assert "several" in ops.why_not_loss_terms(output, target, several)
        of_target = loss._replace(terms=[GramTerm(Tap(1))])
        assert "Gram" in ops.why_not_loss_terms(output, target, of_target)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=dtype_id)
def test_masks_beside_a_pooling_are_those_one_by_one(dtype):
    from fastperc.kernels import vgg_loss

    maps = [torch.randn(shape, device=DEVICE).relu().to(dtype) for shape in ((2, 16, 18, 17), (1, 16, 3, 5))]
    maps = [x.contiguous(memory_format=torch.channels_last) for x in maps]
    bits = [x.new_empty((x.numel() + 7) // 8, dtype=torch.uint8) for x in maps]
    for x, expected in zip(maps, bits):
        vgg_loss.relu_mask_fwd(x, expected)
    pooled = maps[0].new_empty(2, 16, 9, 8).to(memory_format=torch.channels_last)
    winners = torch.empty_like(pooled, dtype=torch.uint8)
    vgg_loss.relu_pool_fwd(maps[0], pooled, winners)
    filled = [torch.empty_like(one) for one in bits]
    others = torch.empty_like(pooled), torch.empty_like(winners)
    vgg_loss.relu_pool_masks_fwd(maps[0], *others, list(zip(maps, filled)))
    assert torch.equal(pooled, others[0]) and torch.equal(winners, others[1])
    assert all(torch.equal(*pair) for pair in zip(bits, filled))
    again = [torch.empty_like(one) for one in bits]
    vgg_loss.relu_masks_fwd(list(zip(maps, again)))
    assert all(torch.equal(*pair) for pair in zip(bits, again))
