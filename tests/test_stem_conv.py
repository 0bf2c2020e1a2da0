"""The first convolutions of frozen networks on a CPU, from few channels, against float64."""

from __future__ import annotations

import pytest
import torch
from cpu_convs import compare, reads_and_writes_slices, same_with_any_layout_of_the_skip, same_with_any_threads
from frozen import ACTIVATION_NAMES, activations, features, filters

from fastperc import backends, ops
from fastperc.types import NO_EPILOGUE, RELU, Activation, Epilogue, Geometry, Padding, same_sides

# batch, in, out, kernel, height, width, stride, padding
CASES = {
    "B1-I3-O32-K3-H28-W28-stride2": (1, 3, 32, 3, 28, 28, 2, (1, 1, 1, 1)),
    "B1-I1-O1-K3-H1-W1": (1, 1, 1, 3, 1, 1, 1, (1, 1, 1, 1)),
    "B2-I3-O5-K3-H5-W4": (2, 3, 5, 3, 5, 4, 1, (1, 1, 1, 1)),
    "B1-I3-O64-K7-H29-W31-stride2": (1, 3, 64, 7, 29, 31, 2, (3, 3, 3, 3)),
    "B2-I4-O40-K5-H9-W30": (2, 4, 40, 5, 9, 30, 1, (2, 2, 2, 2)),
    "B1-I2-O24-K3-H6-W9-no-border": (1, 2, 24, 3, 6, 9, 1, (0, 0, 0, 0)),
    "B1-I3-O16-K3-H8-W8-stride2-uneven": (1, 3, 16, 3, 8, 8, 2, (0, 1, 0, 1)),
    "B1-I3-O33-K3-H5-W6-wide-border": (1, 3, 33, 3, 5, 6, 1, (5, 2, 0, 7)),
    "B1-I3-O16-K4-H8-W12-stride4": (1, 3, 16, 4, 8, 12, 4, (0, 0, 0, 0)),
}


@pytest.fixture(autouse=True)
def by_stem():
    with backends.use_implementation("conv_bn_relu", "stem"):
        yield


def arguments(case):
    n, c_in, c_out, kernel, height, width, stride, sides = CASES[case]
    x = features(n, c_in, height, width, device="cpu", dtype=torch.float32)
    weight, bias = filters(c_out, c_in, kernel, kernel, device="cpu", dtype=torch.float32)
    geometry = Geometry(stride, Padding(sides))
    return x, weight, bias, geometry, features(*geometry.output_shape(x, weight), device="cpu", dtype=torch.float32)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("with_skip", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_matches_float64(case, with_skip):
    *call, skip = arguments(case)
    compare(*call, Epilogue(activation=RELU, skip=skip if with_skip else None))


@pytest.mark.parametrize("name", ACTIVATION_NAMES)
@pytest.mark.parametrize("case", ["B1-I3-O32-K3-H28-W28-stride2", "B2-I3-O5-K3-H5-W4", "B2-I4-O40-K5-H9-W30"])
def test_every_activation(case, name):
    *call, skip = arguments(case)
    activation = activations(CASES[case][2])[name]
    compare(*call, Epilogue(activation=activation))
    compare(*call, Epilogue(activation=activation, skip=skip))


@pytest.mark.parametrize("case", CASES)
def test_the_number_of_threads_changes_no_bit(case):
    *call, skip = arguments(case)
    same_with_any_threads(lambda: ops.conv_bn_relu(*call, Epilogue(skip=skip)))


def test_a_pixel_is_the_same_wherever_it_lies():
    x, weight, bias, geometry, _ = arguments("B2-I4-O40-K5-H9-W30")
    wide = compare(x, weight, bias, geometry, NO_EPILOGUE)
    for columns in range(5, 20):
        part = ops.conv_bn_relu(x[..., 5 : 5 + columns], weight, bias, geometry, NO_EPILOGUE)
        assert torch.equal(part[..., 2:-2], wide[..., 7 : 3 + columns])


@pytest.mark.parametrize("stride", [1, 2])
def test_reads_and_writes_slices_of_one_map(stride):
    x, weight, bias, geometry, _ = arguments("B2-I4-O40-K5-H9-W30")
    reads_and_writes_slices(x, weight, bias, geometry._replace(stride=stride))


@pytest.mark.parametrize("mode", ["reflect", "replicate"])
def test_borders_of_pixels(mode):
    x, weight, bias, geometry, skip = arguments("B2-I4-O40-K5-H9-W30")
    compare(x, weight, bias, geometry._replace(padding=same_sides(2, mode)), Epilogue(skip=skip))


def test_any_layout_of_the_skip_gives_the_same():
    *call, skip = arguments("B1-I3-O64-K7-H29-W31-stride2")
    same_with_any_layout_of_the_skip(*call, skip=skip)


@pytest.mark.parametrize("name", ["relu", "leaky_relu", "prelu", "relu6"])
def test_nan_stays_nan(name):
    x, weight, bias, geometry, _ = arguments("B2-I3-O5-K3-H5-W4")
    x[1, 2, 1, 3] = float("nan")
    y = ops.conv_bn_relu(x, weight, bias, geometry, Epilogue(activation=activations(5)[name]))
    expected = torch.zeros_like(y, dtype=torch.bool)
    expected[1, :, :3, 2:] = True
    assert torch.equal(y.isnan(), expected)


def test_reads_nothing_beyond_the_border():
    x, weight, bias, geometry, _ = arguments("B1-I3-O64-K7-H29-W31-stride2")
    expected = compare(x, weight, bias, geometry, Epilogue())
    around = torch.full((1, 5, 33, 31), float("nan")).contiguous(memory_format=torch.channels_last)
    inner = around[:, 1:4, 2:31]
    inner.copy_(x)
    assert torch.equal(ops.conv_bn_relu(inner, weight, bias, geometry, Epilogue()), expected)


def test_packed_weights_follow_weight_bias_and_slopes():
    x, weight, bias, geometry, _ = arguments("B2-I3-O5-K3-H5-W4")
    slopes = torch.rand(5)
    epilogue = Epilogue(activation=Activation("prelu", slopes=slopes))
    compare(x, weight, bias, geometry, epilogue)
    for tensor in (weight, bias, slopes):
        tensor.mul_(-2)
        compare(x, weight, bias, geometry, epilogue)


def test_what_it_leaves_to_others():
    x, weight, bias, geometry, skip = arguments("B1-I3-O32-K3-H28-W28-stride2")
    for call in (
        (x.half(), weight, bias, geometry, Epilogue()),
        (x, weight[:, :, :1], bias, geometry, Epilogue()),
        (x, weight, bias, geometry._replace(dilation=2), Epilogue()),
        (x, weight, bias, geometry, Epilogue(skip=skip[:, :, :1])),
        (torch.cat([x, x], 1), torch.cat([weight, weight], 1), bias, geometry, Epilogue()),
    ):
        with pytest.raises(backends.CannotServe, match="stem: "):
            backends.OPERATIONS["conv_bn_relu"](*call)
