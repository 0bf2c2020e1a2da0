"""Gram matrices and the style loss against their formulas in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import error

from fastperc import GramLoss, gram_matrix


def gram_by_formula(x: torch.Tensor) -> torch.Tensor:
    """Equation 3 pixel by pixel, in numpy."""
    x = x.detach().double().numpy()
    n, c, h, w = x.shape
    total = np.zeros((n, c, c))
    for i in range(h):
        for j in range(w):
            total += np.einsum("nc,nd->ncd", x[:, :, i, j], x[:, :, i, j])
    return torch.from_numpy(total / (c * h * w))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 1, 1, 1), (3, 17, 4, 1), (0, 3, 4, 4)], ids=str)
def test_gram_matrix_matches_the_formula(shape, dtype, memory_format):
    x = torch.randn(shape).to(dtype).contiguous(memory_format=memory_format)
    gram = gram_matrix(x)
    assert gram.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert error(gram, gram_by_formula(x)) < (1e-12 if dtype == torch.float64 else 1e-6)
    assert torch.equal(gram, gram_matrix(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_never_overflows(dtype):
    x = (10 * torch.randn(1, 4, 256, 256)).to(dtype).requires_grad_()  # ΣF² is 6.5 million, float16 ends at 65,504
    with torch.autocast("cpu", torch.bfloat16):
        gram = gram_matrix(x)
        loss = GramLoss()(x, torch.zeros(1, 4, 4))
    psi = x.detach().double().flatten(2)
    expected = psi @ psi.mT / psi[0].numel()
    loss.backward()
    assert gram.dtype == torch.float32 and error(gram, expected) < 1e-5
    assert error(loss, expected.square().sum()) < 1e-5
    assert x.grad.isfinite().all() and x.grad.any()


def test_loss_and_gradient_match_the_formula():
    x = torch.randn(2, 5, 6, 7, requires_grad=True)
    target = torch.randn(1, 5, 9, 4)  # another size: only channels must agree
    loss = GramLoss(weight=3.0)(x, target)
    loss.backward()

    x64 = x.detach().double()
    difference = gram_by_formula(x64) - gram_by_formula(target)
    expected = 3 * difference.square().sum(dim=(1, 2)).mean()
    # d‖G − A‖²/dψ = 4 (G − A) ψ / CHW, and the batch of two is averaged.
    grad = 3 / 2 * 4 * (difference @ x64.flatten(2)).view_as(x64) / x64[0].numel()
    assert error(loss, expected) < 1e-6
    assert error(x.grad, grad) < 1e-5


def test_target_may_be_a_gram_matrix():
    x, target = torch.randn(2, 5, 6, 7), torch.randn(1, 5, 6, 7)
    assert torch.equal(GramLoss()(x, target), GramLoss()(x, gram_matrix(target)))
    assert GramLoss()(x, gram_matrix(x)).item() < 1e-12


def test_gradcheck():
    x = torch.randn(2, 3, 3, 4, dtype=torch.float64, requires_grad=True)
    target = torch.randn(1, 3, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: GramLoss()(x, target), x)


@pytest.mark.parametrize(
    "shapes",
    [((2, 5, 6, 7), (2, 4, 6, 7)), ((2, 5, 6, 7), (3, 5, 5)), ((5, 6, 7), (1, 5, 5)), ((2, 5, 6, 7), (5, 5))],
    ids=str,
)
def test_loss_refuses_shapes_that_do_not_fit(shapes):
    with pytest.raises(ValueError, match=r"GramLoss needs .*got"):
        GramLoss()(*(torch.randn(shape) for shape in shapes))


@pytest.mark.parametrize("shape", [(3, 4, 4), (1, 3, 0, 4)], ids=str)
def test_gram_matrix_refuses_what_has_none(shape):
    with pytest.raises(ValueError, match=r"\[N, C, H, W\]"):
        gram_matrix(torch.rand(shape))
