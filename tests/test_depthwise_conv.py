"""Depthwise convolutions of frozen networks on a CPU, against float64."""

from __future__ import annotations

import pytest
import torch
from cpu_convs import compare, reads_and_writes_slices, same_with_any_layout_of_the_skip, same_with_any_threads
from frozen import ACTIVATION_NAMES, activations, features, filters

from fastperc import backends, ops
from fastperc.types import NO_EPILOGUE, RELU, Activation, Epilogue, Geometry, Padding, same_sides

# batch, channels, kernel, height, width, stride, padding
CASES = {
    "B1-C32-K3-H14-W14": (1, 32, 3, 14, 14, 1, (1, 1, 1, 1)),
    "B1-C1-K3-H1-W1": (1, 1, 3, 1, 1, 1, (1, 1, 1, 1)),
    "B2-C3-K3-H5-W4": (2, 3, 3, 5, 4, 1, (1, 1, 1, 1)),
    "B1-C24-K3-H9-W11-stride2": (1, 24, 3, 9, 11, 2, (1, 1, 1, 1)),
    "B1-C144-K3-H56-W31": (1, 144, 3, 56, 31, 1, (1, 1, 1, 1)),
    "B2-C37-K3-H17-W30-stride2": (2, 37, 3, 17, 30, 2, (1, 1, 1, 1)),
    "B1-C960-K3-H7-W7": (1, 960, 3, 7, 7, 1, (1, 1, 1, 1)),
    "B1-C20-K3-H6-W9-no-border": (1, 20, 3, 6, 9, 1, (0, 0, 0, 0)),
    "B1-C20-K3-H8-W8-stride2-uneven": (1, 20, 3, 8, 8, 2, (0, 1, 0, 1)),
    "B1-C20-K3-H5-W6-wide-border": (1, 20, 3, 5, 6, 1, (3, 2, 0, 3)),
    "B2-C19-K5-H13-W12": (2, 19, 5, 13, 12, 1, (2, 2, 2, 2)),
    "B1-C40-K5-H15-W28-stride2": (1, 40, 5, 15, 28, 2, (2, 2, 2, 2)),
    "B1-C33-K7-H8-W10": (1, 33, 7, 8, 10, 1, (3, 3, 3, 3)),
    "B1-C16-K7-H2-W3-stride2": (1, 16, 7, 2, 3, 2, (3, 3, 3, 3)),
}


@pytest.fixture(autouse=True)
def by_depthwise():
    with backends.use_implementation("conv_bn_relu", "depthwise"):
        yield


def arguments(case):
    n, channels, kernel, height, width, stride, sides = CASES[case]
    x = features(n, channels, height, width, device="cpu", dtype=torch.float32)
    weight, bias = filters(channels, 1, kernel, kernel, device="cpu", dtype=torch.float32)
    geometry = Geometry(stride, Padding(sides), groups=channels)
    return x, weight, bias, geometry, features(*geometry.output_shape(x, weight), device="cpu", dtype=torch.float32)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("with_skip", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_matches_float64(case, with_skip):
    *call, skip = arguments(case)
    compare(*call, Epilogue(activation=RELU, skip=skip if with_skip else None))


@pytest.mark.parametrize("name", ACTIVATION_NAMES)
@pytest.mark.parametrize("case", ["B1-C24-K3-H9-W11-stride2", "B2-C3-K3-H5-W4", "B2-C19-K5-H13-W12"])
def test_every_activation(case, name):
    *call, skip = arguments(case)
    activation = activations(CASES[case][1])[name]
    compare(*call, Epilogue(activation=activation))
    compare(*call, Epilogue(activation=activation, skip=skip))


@pytest.mark.parametrize("case", CASES)
def test_the_number_of_threads_changes_no_bit(case):
    *call, skip = arguments(case)
    same_with_any_threads(lambda: ops.conv_bn_relu(*call, Epilogue(skip=skip)))


def test_a_pixel_is_the_same_wherever_it_lies():
    x, weight, bias, geometry, _ = arguments("B1-C144-K3-H56-W31")
    wide = compare(x, weight, bias, geometry, NO_EPILOGUE)
    for columns in range(3, 12):
        part = ops.conv_bn_relu(x[..., 5 : 5 + columns], weight, bias, geometry, NO_EPILOGUE)
        assert torch.equal(part[..., 1:-1], wide[..., 6 : 4 + columns])


@pytest.mark.parametrize("stride", [1, 2])
def test_reads_and_writes_slices_of_one_map(stride):
    x, weight, bias, geometry, _ = arguments("B1-C24-K3-H9-W11-stride2")
    reads_and_writes_slices(x, weight, bias, geometry._replace(stride=stride))


@pytest.mark.parametrize("mode", ["reflect", "replicate"])
def test_borders_of_pixels(mode):
    x, weight, bias, geometry, skip = arguments("B2-C19-K5-H13-W12")
    compare(x, weight, bias, geometry._replace(padding=same_sides(2, mode)), Epilogue(skip=skip))


def test_any_layout_of_the_skip_gives_the_same():
    *call, skip = arguments("B2-C37-K3-H17-W30-stride2")
    same_with_any_layout_of_the_skip(*call, skip=skip)


@pytest.mark.parametrize("name", ["relu", "leaky_relu", "prelu", "relu6"])
def test_nan_stays_nan(name):
    x, weight, bias, geometry, _ = arguments("B2-C3-K3-H5-W4")
    x[1, 2, 1, 3] = float("nan")
    y = ops.conv_bn_relu(x, weight, bias, geometry, Epilogue(activation=activations(3)[name]))
    expected = torch.zeros_like(y, dtype=torch.bool)
    expected[1, 2, :3, 2:] = True
    assert torch.equal(y.isnan(), expected)


def test_reads_nothing_beyond_the_border():
    x, weight, bias, geometry, _ = arguments("B2-C37-K3-H17-W30-stride2")
    expected = compare(x, weight, bias, geometry, Epilogue())
    around = torch.full((2, 48, 19, 30), float("nan")).contiguous(memory_format=torch.channels_last)
    for image in range(2):
        inner = around[image : image + 1, 8:45, 1:18]
        inner.copy_(x[image : image + 1])
        assert torch.equal(ops.conv_bn_relu(inner, weight, bias, geometry, Epilogue()), expected[image : image + 1])


def test_packed_weights_follow_weight_bias_and_slopes():
    x, weight, bias, geometry, _ = arguments("B2-C3-K3-H5-W4")
    slopes = torch.rand(3)
    epilogue = Epilogue(activation=Activation("prelu", slopes=slopes))
    compare(x, weight, bias, geometry, epilogue)
    for tensor in (weight, bias, slopes):
        tensor.mul_(-2)
        compare(x, weight, bias, geometry, epilogue)


def test_what_it_leaves_to_others():
    x, weight, bias, geometry, skip = arguments("B1-C32-K3-H14-W14")
    for call in (
        (x.half(), weight, bias, geometry, Epilogue()),
        (x, weight[:, :, :1], bias, geometry, Epilogue()),
        (x, weight, bias, geometry._replace(dilation=2), Epilogue()),
        (x, weight, bias, geometry, Epilogue(skip=skip[:, :, :1])),
        (x, weight.expand(-1, 2, -1, -1), bias, geometry._replace(groups=16), Epilogue()),
    ):
        with pytest.raises(backends.CannotServe, match="depthwise: "):
            backends.OPERATIONS["conv_bn_relu"](*call)
