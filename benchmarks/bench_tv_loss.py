"""Total variation."""

from __future__ import annotations

import torch
from costs import Cost
from harness import DEVICE, DTYPES, Case, Measure, runs
from providers import Provider

from fastperc import ops, reference

SHAPES = {
    "cpu": [(4, 3, 256, 256), (1, 3, 1080, 1920)],
    "cuda": [(4, 3, 256, 256), (1, 3, 1080, 1920), (4, 3, 1080, 1920)],
}
TOLERANCE = {"fp32": (2e-5, 2e-6), "bf16": (2e-5, 1e-2)}


def cost(shape: tuple[int, ...], dtype: str) -> Cost:
    """Read x, write its gradient; two differences, squared and added, and twice two terms of the gradient."""
    numel = torch.Size(shape).numel()
    return Cost(2 * numel * DTYPES[dtype].itemsize, 10 * numel)


def make_case(shape: tuple[int, ...], dtype: str) -> Case:
    """Loss and gradient of images of ``shape``."""
    return Case(
        "tv_loss",
        "forward+backward",
        "x".join(map(str, shape)),
        dtype,
        inputs=lambda: (torch.rand(shape, requires_grad=True),),
        reference=reference.tv_loss,
        fused=ops.tv_loss,
        costs=lambda: [cost(shape, dtype)],
        tolerance=TOLERANCE[dtype],
    )


CASES = [make_case(shape, dtype) for shape in SHAPES[DEVICE] for dtype in ("fp32", "bf16")]


@runs(CASES)
def test_tv_loss(measure: Measure, case: Case, provider: Provider) -> None:
    measure(case, provider)
