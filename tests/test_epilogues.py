"""What may follow a frozen convolution, against float64: every activation, and slices of larger maps in and out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import LAYER_ERROR_4X4, error
from frozen import ACTIVATION_NAMES, FROZEN_RUNS, activations, check, features, filters, instance_norm, widened

from fastperc import backends, ops, reference, use_backend
from fastperc.types import Activation, Epilogue, Geometry, Padding, same_sides

CPU_RUNS = [run for run in FROZEN_RUNS if run.values[0] == "cpu"]
BY_4X4, BY_2X2, BY_ONEDNN = (1, 32, 64, 12, 13), (2, 64, 32, 2, 65), (2, 12, 20, 7, 11)  # batch, in, out, height, width
FOLLOWS = ("nothing", "skip", "norm", "norm-skip")
SHAPES = {"4x4": BY_4X4, "2x2": BY_2X2, "onednn": BY_ONEDNN}
CASES = [  # in Triton's interpreter, which is slow, one shape and two of what follows
    pytest.param(*run.values, shape, follows, marks=run.marks, id=f"{'-'.join(map(str, run.values))}-{name}-{follows}")
    for run in FROZEN_RUNS
    for name, shape in SHAPES.items()
    for follows in FOLLOWS
    if run.values[1] != "triton" or (name == "onednn" and follows in ("nothing", "norm-skip"))
]


def epilogue_of(follows, activation, shape, device, dtype):
    skip = features(*shape, device=device, dtype=dtype) if "skip" in follows else None
    return Epilogue(instance_norm(shape[1], device) if "norm" in follows else None, activation, skip)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", ACTIVATION_NAMES)
@pytest.mark.parametrize(("device", "backend", "dtype", "shape", "follows"), CASES)
def test_every_activation_matches_the_formula(device, backend, dtype, name, shape, follows):
    n, c_in, c_out, height, width = shape
    x = features(n, c_in, height, width, device=device, dtype=dtype)
    weight, bias = filters(c_out, c_in, 3, 3, device=device, dtype=dtype)
    activation = activations(c_out, device)[name]
    epilogue = epilogue_of(follows, activation, (n, c_out, height, width), device, dtype)
    floor = LAYER_ERROR_4X4 if backend == "native" and shape == BY_4X4 else 4e-7
    check(backend, ops.conv_bn_relu, x, weight, bias, Geometry(1, same_sides(1)), epilogue, floor=floor)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", ACTIVATION_NAMES)
@pytest.mark.parametrize("follows", ["norm", "norm-skip"])
@pytest.mark.parametrize(("device", "backend", "dtype"), FROZEN_RUNS)
def test_every_activation_after_an_instance_norm(device, backend, dtype, follows, name):
    shape = (2, 70, 5, 7)
    x = features(*shape, device=device, dtype=dtype) * 3 + 5
    check(backend, ops.instance_norm, x, epilogue_of(follows, activations(70, device)[name], shape, device, dtype))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("upsample", "follows"), [("transposed", "nothing"), ("nearest", "norm")])
@pytest.mark.parametrize("name", ACTIVATION_NAMES)
@pytest.mark.parametrize(("device", "backend", "dtype"), FROZEN_RUNS)
def test_every_activation_after_an_upsampling_convolution(device, backend, dtype, follows, name, upsample):
    x = features(2, 12, 5, 7, device=device, dtype=dtype)
    weight, bias = filters(12, 12, 3, 3, device=device, dtype=dtype)
    epilogue = epilogue_of(follows, activations(12, device)[name], (2, 12), device, dtype)
    check(backend, ops.subpixel_conv_bn_relu, x, weight, bias, upsample, same_sides(1), epilogue)


# in, out, kernel, stride, padding, dilation, groups
SPREAD = {
    "dilated": (16, 20, 3, 1, 2, 2, 1),
    "dilated-reflect-stride": (16, 20, 3, 2, 3, 3, 1),
    "depthwise": (24, 24, 3, 1, 1, 1, 24),
    "depthwise-stride": (24, 24, 3, 2, 1, 1, 24),
    "depthwise-multiplied": (16, 32, 5, 1, 2, 1, 16),
    "grouped-dilated": (32, 64, 3, 1, 2, 2, 4),
}


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", ["relu", "relu6", "prelu"])
@pytest.mark.parametrize("follows", FOLLOWS)
@pytest.mark.parametrize("case", SPREAD)
@pytest.mark.parametrize(("device", "backend", "dtype"), [run for run in CPU_RUNS if run.values[1] != "triton"])
def test_dilation_and_groups(device, backend, dtype, case, follows, name):
    c_in, c_out, kernel, stride, pad, dilation, groups = SPREAD[case]
    padding = same_sides(pad, "reflect" if "reflect" in case else "zeros")
    x = features(2, c_in, 11, 14, device=device, dtype=dtype)
    weight, bias = filters(c_out, c_in // groups, kernel, kernel, device=device, dtype=dtype)
    shape = F.conv2d(reference.pad(x.float(), padding), weight, bias, stride, 0, dilation, groups).shape
    epilogue = epilogue_of(follows, activations(c_out)[name], shape, device, dtype)
    check(backend, ops.conv_bn_relu, x, weight, bias, Geometry(stride, padding, dilation, groups), epilogue)


def test_a_kernel_that_is_not_square():
    x = features(2, 8, 9, 12, device="cpu", dtype=torch.float32)
    weight, bias = filters(16, 8, 1, 7, device="cpu", dtype=torch.float32)
    check("native", ops.conv_bn_relu, x, weight, bias, Geometry(1, Padding((3, 3, 0, 0))), Epilogue())
    check("native", ops.conv_bn_relu, x, weight, bias, Geometry(2, Padding((3, 2, 0, 1))), Epilogue())


def test_triton_leaves_dilation_and_groups_to_the_library():
    x = features(1, 8, 9, 12, device="cpu", dtype=torch.float32)
    weight, bias = filters(8, 8, 3, 3, device="cpu", dtype=torch.float32)
    with use_backend("triton"), pytest.raises(backends.CannotServe, match=r"left to the library|not installed"):
        ops.conv_bn_relu(x, weight, bias, Geometry(1, same_sides(2), 2))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", ["none", "leaky_relu", "silu"])
@pytest.mark.parametrize(("device", "backend", "dtype", "shape", "follows"), CASES)
def test_slices_of_one_map_in_and_out(device, backend, dtype, shape, name, follows):
    """A dense block: each convolution reads the channels before it and writes those after them."""
    n, c_in, c_out, height, width = shape
    whole = features(n, c_in + c_out + 32, height, width, device=device, dtype=dtype)
    weight, bias = filters(c_out, c_in, 3, 3, device=device, dtype=dtype)
    activation = None if name == "none" else activations(c_out, device)[name]
    epilogue = epilogue_of(follows, activation, (n, c_out, height, width), device, dtype)
    with use_backend(backend):
        call = (weight, bias, Geometry(1, same_sides(1)))
        expected = ops.conv_bn_relu(whole[:, :c_in].clone(), *call, epilogue)
        before, out = whole.clone(), whole[:, c_in : c_in + c_out]
        for _ in range(2):
            assert ops.conv_bn_relu(whole[:, :c_in], *call, epilogue._replace(out=out)) is out
            assert torch.equal(out, expected)
        assert torch.equal(whole[:, :c_in], before[:, :c_in])
        assert torch.equal(whole[:, c_in + c_out :], before[:, c_in + c_out :])


@pytest.mark.parametrize(("device", "backend", "dtype"), FROZEN_RUNS)
def test_an_out_of_any_strides(device, backend, dtype):
    x = features(1, 32, 12, 13, device=device, dtype=dtype)
    weight, bias = filters(32, 32, 3, 3, device=device, dtype=dtype)
    wide = features(2, 64, 14, 13, device=device, dtype=dtype)
    outs = (torch.empty(1, 32, 12, 13, device=device, dtype=dtype), wide[1:, ::2, 1:-1], wide[:1, 32:, 2:])
    with use_backend(backend):
        expected = ops.conv_bn_relu(x, weight, bias, Geometry(padding=same_sides(1)))
        for out in outs:
            ops.conv_bn_relu(x, weight, bias, Geometry(padding=same_sides(1)), epilogue=Epilogue(out=out))
            assert torch.equal(out, expected)


def test_the_other_operations_write_to_an_out():
    for dtype in (torch.float32, torch.bfloat16):
        x = features(2, 16, 5, 6, device="cpu", dtype=dtype)
        weight, bias = filters(16, 16, 3, 3, device="cpu", dtype=dtype)
        for norm in (None, instance_norm(16, "cpu")):
            out, wide = torch.empty_like(x), features(2, 40, 10, 12, device="cpu", dtype=dtype)
            if norm is not None:
                y = ops.instance_norm(x, Epilogue(norm))
                assert ops.instance_norm(x, Epilogue(norm, out=out)) is out and torch.equal(out, y)
            slice_out = wide[:, 8:24]
            y = ops.subpixel_conv_bn_relu(x, weight, bias, epilogue=Epilogue(norm))
            assert ops.subpixel_conv_bn_relu(x, weight, bias, epilogue=Epilogue(norm, out=slice_out)) is slice_out
            assert torch.equal(slice_out, y)


def test_refuses_an_out_that_does_not_fit():
    x = features(1, 32, 12, 13, device="cpu", dtype=torch.float32)
    weight, bias = filters(32, 32, 3, 3, device="cpu", dtype=torch.float32)
    for out in (torch.empty(1, 32, 12, 13), torch.empty(1, 32, 10, 11).double()):
        with pytest.raises(ValueError, match=r"expected an out of \[1, 32, 10, 11\] in torch.float32"):
            ops.conv_bn_relu(x, weight, bias, epilogue=Epilogue(out=out))


@pytest.mark.parametrize("name", ["leaky_relu", "prelu", "relu6", "silu", "sigmoid", "tanh"])
def test_not_finite_stays_visible_in_winograd(name):
    x = features(1, 32, 12, 13, device="cpu", dtype=torch.float32)
    weight, bias = filters(32, 32, 3, 3, device="cpu", dtype=torch.float32)
    x[0, 3, 4, 5] = float("nan")
    y = ops.conv_bn_relu(
        x, weight, bias, Geometry(padding=same_sides(1)), epilogue=Epilogue(activation=activations(32)[name])
    )
    assert y[0, :, 3:6, 4:7].isnan().all() and y[0, :, 9:].isfinite().all()


def test_slopes_that_change_are_seen():
    x = features(1, 32, 12, 13, device="cpu", dtype=torch.float32)
    weight, bias = filters(32, 32, 3, 3, device="cpu", dtype=torch.float32)
    slopes = torch.full((32,), 0.25)
    for slope in (0.25, 0.5):
        slopes.fill_(slope)
        epilogue = Epilogue(activation=Activation("prelu", slopes=slopes))
        leaky = Epilogue(activation=Activation("leaky_relu", slope))
        assert torch.equal(
            ops.conv_bn_relu(x, weight, bias, epilogue=epilogue), ops.conv_bn_relu(x, weight, bias, epilogue=leaky)
        )


def test_where_the_slopes_want_a_gradient_there_is_one():
    x = features(1, 4, 5, 5, device="cpu", dtype=torch.float32)
    weight, bias = filters(4, 4, 3, 3, device="cpu", dtype=torch.float32)
    slopes = torch.full((4,), 0.25, requires_grad=True)
    ops.conv_bn_relu(x, weight, bias, epilogue=Epilogue(activation=Activation("prelu", slopes=slopes))).sum().backward()
    assert slopes.grad.any()


@pytest.mark.parametrize("name", ["leaky_relu", "prelu", "relu6", "silu"])
def test_compiles_without_a_graph_break(name):
    torch.compiler.reset()
    x = features(1, 32, 12, 13, device="cpu", dtype=torch.float32)
    weight, bias = filters(32, 32, 3, 3, device="cpu", dtype=torch.float32)
    call = x, weight, bias, Geometry(1, same_sides(1)), Epilogue(activation=activations(32)[name])
    with torch.no_grad():
        compiled = torch.compile(ops.conv_bn_relu, fullgraph=True, backend="aot_eager")(*call)
        assert error(compiled, ops.conv_bn_relu(*map(widened, call))) < 1e-5
