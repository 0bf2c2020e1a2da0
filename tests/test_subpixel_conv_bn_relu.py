"""The frozen ×2 convolutions against float64."""

from __future__ import annotations

import pytest
import torch
from cases import error
from frozen import FROZEN_RUNS, check, features, filters, instance_norm
from torch import nn

from fastperc import ops, reference
from fastperc.types import NO_EPILOGUE, RELU, Epilogue, Padding

ONES = (1, 1, 1, 1)
# batch, in, out, height, width, upsample, padding, mode, what follows
CASES = {
    "B1-I16-O16-H5-W9-transposed": (1, 16, 16, 5, 9, "transposed", ONES, "zeros", "relu"),
    "B2-I12-O20-H3-W7-transposed-norm": (2, 12, 20, 3, 7, "transposed", ONES, "zeros", "norm relu"),
    "B1-I70-O33-H2-W17-transposed": (1, 70, 33, 2, 17, "transposed", ONES, "zeros", "plain"),
    "B1-I16-O8-H6-W5-transposed-inner": (1, 16, 8, 6, 5, "transposed", (0, 1, 1, 0), "zeros", "relu"),
    "B1-I16-O16-H5-W9-nearest": (1, 16, 16, 5, 9, "nearest", ONES, "zeros", "relu"),
    "B2-I12-O20-H3-W7-nearest-norm": (2, 12, 20, 3, 7, "nearest", ONES, "zeros", "norm relu"),
    "B1-I32-O16-H7-W18-nearest-reflect": (1, 32, 16, 7, 18, "nearest", ONES, "reflect", "norm relu"),
    "B1-I16-O8-H1-W1-nearest-reflect": (1, 16, 8, 1, 1, "nearest", ONES, "reflect", "relu"),
    "B1-I16-O8-H6-W5-nearest-inner": (1, 16, 8, 6, 5, "nearest", (1, 0, 0, 1), "reflect", "norm relu"),
}


def arguments(case, device, dtype):
    n, c_in, c_out, height, width, upsample, padding, mode, follows = CASES[case]
    x = features(n, c_in, height, width, device=device, dtype=dtype)
    weight, bias = filters(c_out, c_in, 3, 3, device=device, dtype=dtype)
    if upsample == "transposed":
        weight = weight.transpose(0, 1).contiguous()
    norm = instance_norm(c_out, device) if "norm" in follows else None
    return x, weight, bias, upsample, Padding(padding, mode), Epilogue(norm, RELU if "relu" in follows else None)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("device", "backend", "dtype"), FROZEN_RUNS)
def test_matches_the_formula(device, backend, dtype, case):
    check(backend, ops.subpixel_conv_bn_relu, *arguments(case, device, dtype))


@pytest.mark.parametrize("upsample", ["transposed", "nearest"])
def test_the_formula_is_that_of_stock_modules(upsample):
    x = torch.rand(2, 4, 3, 5, dtype=torch.float64)
    if upsample == "transposed":
        stock = conv = nn.ConvTranspose2d(4, 6, 3, 2, 1, 1).double()
    else:
        conv = nn.Conv2d(4, 6, 3, padding=1).double()
        stock = nn.Sequential(nn.Upsample(scale_factor=2), conv)
    ours = reference.subpixel_conv_bn_relu(x, conv.weight, conv.bias, upsample, epilogue=NO_EPILOGUE)
    assert error(ours, stock(x)) < 1e-14
    # Without padding, what is made is what the inner pixels become.
    inner = reference.subpixel_conv_bn_relu(x, conv.weight, conv.bias, upsample, Padding(), NO_EPILOGUE)
    assert error(inner, stock(x)[:, :, 2:-2, 2:-2]) < 1e-14


def test_refuses_what_does_not_fit():
    weight, bias = filters(4, 4, 3, 3, device="cpu", dtype=torch.float32)
    with pytest.raises(ValueError, match="'transposed' or 'nearest', got 'bilinear'"):
        ops.subpixel_conv_bn_relu(torch.rand(1, 4, 3, 3), weight, bias, "bilinear")
    with pytest.raises(ValueError, match="has no skip"):
        ops.subpixel_conv_bn_relu(torch.rand(1, 4, 3, 3), weight, bias, epilogue=Epilogue(skip=torch.rand(1, 4, 6, 6)))
    with pytest.raises(ValueError, match=r"got \[1, 3, 5, 6\]"):
        ops.subpixel_conv_bn_relu(torch.rand(1, 3, 5, 6), weight, bias)
