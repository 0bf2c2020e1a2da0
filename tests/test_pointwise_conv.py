"""Convolutions of frozen networks on a CPU as products of matrices, against float64: 1×1, and larger kernels."""

from __future__ import annotations

import pytest
import torch
from cpu_convs import compare, reads_and_writes_slices, same_with_any_layout_of_the_skip, same_with_any_threads
from frozen import ACTIVATION_NAMES, activations, features, filters

from fastperc import backends, ops
from fastperc.types import RELU, Activation, Epilogue, Geometry, Padding, same_sides

# batch, in, out, height, width, stride
CASES = {
    "B1-I64-O64-H14-W14": (1, 64, 64, 14, 14, 1),
    "B1-I1-O1-H1-W1": (1, 1, 1, 1, 1, 1),
    "B2-I3-O5-H3-W7": (2, 3, 5, 3, 7, 1),
    "B1-I24-O144-H9-W11": (1, 24, 144, 9, 11, 1),
    "B1-I144-O24-H13-W5": (1, 144, 24, 13, 5, 1),
    "B1-I401-O37-H7-W7": (1, 401, 37, 7, 7, 1),
    "B1-I1037-O37-H7-W7-two-parts": (1, 1037, 37, 7, 7, 1),
    "B1-I960-O160-H7-W7": (1, 960, 160, 7, 7, 1),
    "B1-I1024-O33-H5-W23": (1, 1024, 33, 5, 23, 1),
    "B1-I48-O80-H6-W11-panel-of-three": (1, 48, 80, 6, 11, 1),
    "B1-I32-O96-H41-W29-many-pixels": (1, 32, 96, 41, 29, 1),
    "B2-I40-O50-H11-W8-stride2": (2, 40, 50, 11, 8, 2),
    "B1-I16-O1000-H1-W1": (1, 16, 1000, 1, 1, 1),
}


# batch, in, out, height, width, kernel, stride, sides (left, right, top, bottom), dilation
LARGER = {
    "3x3-stride2": (1, 128, 144, 14, 13, (3, 3), 2, (1, 1, 1, 1), 1),
    "3x3-of-512": (1, 512, 64, 7, 7, (3, 3), 1, (1, 1, 1, 1), 1),
    "3x3-batch-wide-border": (2, 5, 7, 4, 6, (3, 3), 1, (3, 3, 3, 3), 1),
    "3x3-uneven-border": (2, 24, 33, 9, 7, (3, 3), 2, (0, 1, 2, 0), 1),
    "3x3-two-parts-of-a-tap": (1, 1100, 17, 3, 5, (3, 3), 1, (1, 1, 1, 1), 1),
    "5x2-dilated": (1, 40, 20, 12, 15, (5, 2), 1, (2, 0, 3, 4), 2),
    "7x7-of-rgb": (1, 3, 64, 21, 18, (7, 7), 2, (3, 3, 3, 3), 1),
    "4x4-without-border": (3, 16, 100, 8, 8, (4, 4), 2, (0, 0, 0, 0), 1),
}


@pytest.fixture(autouse=True)
def by_pointwise():
    with backends.use_implementation("conv_bn_relu", "pointwise"):
        yield


def arguments(case):
    n, c_in, c_out, height, width, stride = CASES[case]
    x = features(n, c_in, height, width, device="cpu", dtype=torch.float32)
    weight, bias = filters(c_out, c_in, 1, 1, device="cpu", dtype=torch.float32)
    shape = n, c_out, (height - 1) // stride + 1, (width - 1) // stride + 1
    return x, weight, bias, Geometry(stride), features(*shape, device="cpu", dtype=torch.float32)


def larger_arguments(case):
    n, c_in, c_out, height, width, kernel, stride, sides, dilation = LARGER[case]
    x = features(n, c_in, height, width, device="cpu", dtype=torch.float32)
    weight, bias = filters(c_out, c_in, *kernel, device="cpu", dtype=torch.float32)
    geometry = Geometry(stride, Padding(sides), dilation)
    skip = features(*geometry.output_shape(x, weight), device="cpu", dtype=torch.float32)
    return x, weight, bias, geometry, skip


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("with_skip", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_matches_float64(case, with_skip):
    *call, skip = arguments(case)
    compare(*call, Epilogue(activation=RELU, skip=skip if with_skip else None))


@pytest.mark.parametrize("name", ACTIVATION_NAMES)
@pytest.mark.parametrize("case", ["B1-I24-O144-H9-W11", "B2-I3-O5-H3-W7", "B1-I401-O37-H7-W7"])
def test_every_activation(case, name):
    *call, skip = arguments(case)
    activation = activations(CASES[case][2])[name]
    compare(*call, Epilogue(activation=activation))
    compare(*call, Epilogue(activation=activation, skip=skip))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", [None, "relu", "prelu", "silu"])
@pytest.mark.parametrize("case", LARGER)
def test_larger_kernels_match_float64(case, name):
    *call, skip = larger_arguments(case)
    activation = name and activations(LARGER[case][2])[name]
    with backends.use_implementation("conv_bn_relu", "direct"):
        compare(*call, Epilogue(activation=activation))
        compare(*call, Epilogue(activation=activation, skip=skip))


@pytest.mark.parametrize("case", CASES)
def test_the_number_of_threads_changes_no_bit(case):
    *call, skip = arguments(case)
    same_with_any_threads(lambda: ops.conv_bn_relu(*call, Epilogue(activation=None, skip=skip)))


@pytest.mark.parametrize("case", LARGER)
def test_the_number_of_threads_changes_no_bit_of_larger_kernels(case):
    *call, skip = larger_arguments(case)
    with backends.use_implementation("conv_bn_relu", "direct"):
        same_with_any_threads(lambda: ops.conv_bn_relu(*call, Epilogue(activation=None, skip=skip)))


def test_a_larger_kernel_reads_and_writes_slices_of_one_map():
    x, weight, bias, *_ = larger_arguments("3x3-of-512")
    with backends.use_implementation("conv_bn_relu", "direct"):
        reads_and_writes_slices(x, weight, bias, Geometry(1, same_sides(1)))


@pytest.mark.parametrize("stride", [1, 2])
def test_reads_and_writes_slices_of_one_map(stride):
    x, weight, bias, geometry, _ = arguments("B1-I24-O144-H9-W11")
    reads_and_writes_slices(x, weight, bias, geometry._replace(stride=stride))


def test_any_layout_of_the_skip_gives_the_same():
    *call, skip = arguments("B2-I40-O50-H11-W8-stride2")
    same_with_any_layout_of_the_skip(*call, skip=skip)


@pytest.mark.parametrize("name", ["relu", "leaky_relu", "prelu", "relu6"])
def test_nan_stays_nan(name):
    x, weight, bias, geometry, _ = arguments("B2-I3-O5-H3-W7")
    x[1, 2, 1, 3] = float("nan")
    y = ops.conv_bn_relu(x, weight, bias, geometry, Epilogue(activation=activations(5)[name]))
    expected = torch.zeros_like(y, dtype=torch.bool)
    expected[1, :, 1, 3] = True
    assert torch.equal(y.isnan(), expected)


def test_packed_weights_follow_weight_bias_and_slopes():
    x, weight, bias, geometry, _ = arguments("B2-I3-O5-H3-W7")
    slopes = torch.rand(5)
    epilogue = Epilogue(activation=Activation("prelu", slopes=slopes))
    compare(x, weight, bias, geometry, epilogue)
    for tensor in (weight, bias, slopes):
        tensor.mul_(-2)
        compare(x, weight, bias, geometry, epilogue)


def test_what_it_leaves_to_others():
    x, weight, bias, geometry, skip = arguments("B1-I64-O64-H14-W14")
    for call in (
        (x.half(), weight, bias, geometry, Epilogue()),
        (x, weight, bias, Geometry(padding=same_sides(1)), Epilogue()),
        (x, weight, bias, geometry, Epilogue(skip=skip[:, :, :1])),
        (x, weight, bias, Geometry(groups=2), Epilogue()),
    ):
        with pytest.raises(backends.CannotServe, match="pointwise: "):
            backends.OPERATIONS["conv_bn_relu"](*call)
    larger = features(64, 64, 3, 3, device="cpu", dtype=torch.float32)
    for call in (
        (x, weight, bias, geometry, Epilogue()),
        (x.half(), larger, bias, Geometry(padding=same_sides(1)), Epilogue()),
        (x, larger, bias, Geometry(padding=same_sides(1, "reflect")), Epilogue()),
    ):
        with (
            backends.use_implementation("conv_bn_relu", "direct"),
            pytest.raises(backends.CannotServe, match="direct: "),
        ):
            backends.OPERATIONS["conv_bn_relu"](*call)
