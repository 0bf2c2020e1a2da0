"""The Gram matrix against float64, and its gradients."""

from __future__ import annotations

import pytest
import torch
from cases import DEVICES, DTYPES, GRAD_ERROR, LAYOUTS, LOSS_ERROR, SHAPES, dtype_id, error, shape_id

import fastperc
from fastperc import reference, use_backend
from fastperc.ops.gram_loss import PIXELS_AT_ONCE


def with_gradient(function, x, weights):
    leaf = x.detach().requires_grad_()
    gram = function(leaf)
    (gradient,) = torch.autograd.grad((gram * weights).sum(), leaf)
    return gram, gradient


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[0]], ids=shape_id)
def test_matches_the_formula(shape, dtype, layout, device):
    x = LAYOUTS[layout](torch.randn(shape).to(device, dtype))
    weights = torch.randn(*x.shape[:2], x.shape[1], device=device, dtype=torch.float64)  # not symmetric
    exact = with_gradient(reference.gram_matrix, x.double(), weights)
    wide = torch.promote_types(dtype, torch.float32)
    with use_backend("native"):
        gram, gradient = with_gradient(fastperc.gram_matrix, x, weights.to(wide))
        again = with_gradient(fastperc.gram_matrix, x, weights.to(wide))
    assert gram.dtype == wide and gradient.dtype == dtype
    assert torch.equal(gram, gram.mT) and torch.equal(gram, again[0]) and torch.equal(gradient, again[1])
    with use_backend("reference"):  # a BLAS library without AVX2 rounds more than the tolerances allow
        stock = with_gradient(fastperc.gram_matrix, x, weights.to(wide))
    assert error(gram, exact[0]) < max(LOSS_ERROR[dtype], 1.5 * error(stock[0], exact[0]))
    assert error(gradient, exact[1]) < max(GRAD_ERROR[dtype], 1.5 * error(stock[1], exact[1]))


@pytest.mark.parametrize("channels", [1, 63, 64, 65, 128])
def test_halves_of_any_size_and_several_blocks_of_pixels(channels):
    x = torch.randn(2, channels, 2, PIXELS_AT_ONCE)
    weights = torch.randn(2, channels, channels, dtype=torch.float64)
    exact = with_gradient(reference.gram_matrix, x.double(), weights)
    ours = with_gradient(fastperc.gram_matrix, x, weights.float())
    assert error(ours[0], exact[0]) < 1e-6 and error(ours[1], exact[1]) < 1e-6


def test_gradients_of_gradients():
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(fastperc.gram_matrix, x)
    assert torch.autograd.gradgradcheck(fastperc.gram_matrix, x)


def test_under_autocast_and_without_a_batch():
    x = 300 * torch.rand(1, 4, 64, 64)
    with torch.autocast("cpu", torch.float16):
        assert (
            torch.equal(fastperc.gram_matrix(x), fastperc.gram_matrix(x.clone()))
            and fastperc.gram_matrix(x).dtype == torch.float32
        )
    assert fastperc.gram_matrix(torch.rand(0, 4, 5, 6)).shape == (0, 4, 4)
    with pytest.raises(ValueError, match=r"needs features of shape \[N, C, H, W\]"):
        fastperc.gram_matrix(torch.rand(4, 5, 6))


def test_compiles_without_a_graph_break():
    x = torch.rand(1, 4, 5, 6)
    compiled = torch.compile(fastperc.gram_matrix, fullgraph=True, backend="eager")
    assert error(compiled(x), fastperc.gram_matrix(x)) < 1e-6
