"""Sums in parts added up in one launch, against PyTorch's sum."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from cases import GPU

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
DEVICE = "cuda" if GPU else "cpu"  # where Triton's interpreter stands in


def halves_added(partials, kernel, to_rgb):
    """[channels, k, k, 3] or, turned, [3, k, k, channels], of [parts, 2, channels, k, run]."""
    first, second = (partials.sum(0)[p, ..., 3 * p : 3 * (p + kernel)] for p in (0, 1))
    gradient = (first + second).unflatten(2, (kernel, 3))
    return gradient.flip(1, 2).permute(3, 1, 2, 0) if to_rgb else gradient


@pytest.mark.parametrize("nbytes", [1 << 20, 40_000, 0], ids=["one launch", "several", "each by itself"])
def test_the_sums_of_several_layers(nbytes):
    from fastperc.kernels.sum_parts import SplitSums, Wide

    pieces = (2, 5, 9, 32)  # of a wide convolution
    cases = [
        (5, (6, 3, 3, 50), (6, 3, 3, 50), None),
        (7, pieces, (5, 9, 9, 3), Wide(9, 32, 5, False)),
        (7, pieces, (3, 9, 9, 5), Wide(9, 32, 5, True)),
        (9, (1,), (1,), None),
    ]
    results = []
    for _ in range(2):
        sums, exact = SplitSums(nbytes, torch.device(DEVICE)), {}
        for key, (parts, part_shape, shape, wide) in enumerate(cases):
            partials = torch.randn(parts, *part_shape, generator=torch.Generator().manual_seed(key)).to(DEVICE)
            sums.empty(key, parts, part_shape, shape, wide).copy_(partials)
            exact[key] = partials.double()
            exact[key] = exact[key].sum(0) if wide is None else halves_added(exact[key], 9, wide.to_rgb)
        results.append(sums.add_up())
        assert results[-1].keys() == exact.keys()
        for key, out in results[-1].items():
            assert out.shape == cases[key][2] and out.dtype == torch.float32 and torch.equal(out, results[0][key])
            assert (out - exact[key]).abs().max() < 1e-5
