"""The forms of a chain's weights, gathered in one launch, against the functions that pack one weight."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from cases import GPU

from fastperc.ops import weight_forms
from fastperc.ops.weight_forms import Forms, in_forms

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
DEVICE = "cuda" if GPU else "cpu"  # where Triton's interpreter stands in
FORMS = {  # and the shape of a weight
    "stem": (Forms(weight_forms.stem_form, weight_forms.turned_head_form), (5, 3, 9, 9)),
    "conv": (Forms(), (6, 4, 3, 3)),
    "stride 2": (Forms(None, weight_forms.transposed_form), (7, 4, 3, 3)),
    "transposed": (Forms(weight_forms.transposed_form), (6, 5, 3, 3)),
    "nearest": (Forms(weight_forms.nearest_form, weight_forms.as_transposed_form), (6, 5, 3, 3)),
    "head": (Forms(weight_forms.head_form, weight_forms.turned_stem_form), (3, 5, 9, 9)),
}


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=["NHWC", "NCHW"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_forms_are_those_of_each_weight_by_itself(dtype, memory_format):
    forms = [form for form, _ in FORMS.values()]
    weights = [torch.randn(shape, device=DEVICE).contiguous(memory_format=memory_format) for _, shape in FORMS.values()]
    for _ in range(2):  # the second time with a known index
        for packed, weight, form in zip(in_forms(forms, weights, dtype), weights, forms):
            for actual, pack in zip(packed, form):
                exact = weight.double() if pack is None else pack(weight.double())
                assert actual.shape == exact.shape and actual.dtype == dtype
                assert actual.stride() == exact.stride() or pack is None
                if pack is weight_forms.nearest_form or pack is weight_forms.as_transposed_form:  # sums of up to four
                    assert ((actual - exact).abs() <= torch.finfo(dtype).eps * exact.abs() + 1e-6).all()
                else:
                    assert torch.equal(actual, exact.to(dtype))
                if pack is None:
                    assert actual.is_contiguous(memory_format=torch.channels_last)
        weights = [2 * weight for weight in weights]


def test_each_form_begins_at_a_whole_vector():
    form, shape = FORMS["stem"]
    for packed in in_forms([form, form], [torch.randn(shape, device=DEVICE) for _ in range(2)], torch.float16):
        assert all(tensor.data_ptr() % 16 == 0 for tensor in packed)
