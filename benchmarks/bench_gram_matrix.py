"""The Gram matrix of a feature map, and the gradient through it."""

from __future__ import annotations

from costs import gram_loss
from harness import DTYPE, DTYPES, Case, Measure, runs
from networks import features, style_shapes
from providers import Provider

from fastperc import ops, reference

TOLERANCE = {"fp32": (1e-5, 1e-5), "bf16": (1e-2, 1e-2)}[DTYPE]


def make_case(shape: tuple[int, ...]) -> Case:
    """The matrix and the gradient of a feature map of ``shape``."""
    return Case(
        "gram_matrix",
        "forward+backward",
        "x".join(map(str, shape)),
        DTYPE,
        inputs=lambda: (features(*shape, requires_grad=True),),
        reference=reference.gram_matrix,
        fused=ops.gram_matrix,
        costs=lambda: gram_loss(shape, DTYPES[DTYPE].itemsize),
        tolerance=TOLERANCE,
    )


CASES = [make_case(shape) for shape in style_shapes("relu2_2", 4, 256)]


@runs(CASES)
def test_gram_matrix(measure: Measure, case: Case, provider: Provider) -> None:
    measure(case, provider)
