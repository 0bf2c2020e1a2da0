"""The frozen convolution and what follows it, against float64."""

from __future__ import annotations

import pytest
import torch
from cases import DEVICES, GPU, LAYER_ERROR_4X4, error
from frozen import FROZEN_RUNS, check, features, filters, instance_norm

from fastperc import _native, backends, ops, reference, use_backend
from fastperc.ops.conv3x3 import FEWEST_LANES
from fastperc.types import RELU, Activation, Epilogue, Geometry, Padding

ONES, NONE, UNEVEN = (1, 1, 1, 1), (0, 0, 0, 0), (1, 0, 2, 1)

# batch, in, out, height, width, kernel, stride, padding, mode, what follows
CASES = {
    "B1-I16-O16-H9-W13": (1, 16, 16, 9, 13, 3, 1, ONES, "zeros", "relu"),
    "B2-I12-O20-H7-W11-skip": (2, 12, 20, 7, 11, 3, 1, ONES, "zeros", "skip"),
    "B1-I128-O128-H8-W18-skip-relu": (1, 128, 128, 8, 18, 3, 1, ONES, "zeros", "skip relu"),
    "B1-I70-O5-H6-W17-stride2": (1, 70, 5, 6, 17, 3, 2, ONES, "zeros", "relu"),
    "B3-I3-O32-H33-W9-stride2-norm": (3, 3, 32, 33, 9, 3, 2, ONES, "zeros", "norm relu"),
    "B1-I32-O16-H17-W20-reflect": (1, 32, 16, 17, 20, 3, 1, ONES, "reflect", "relu"),
    "B2-I16-O24-H12-W7-reflect-norm-skip": (2, 16, 24, 12, 7, 3, 1, ONES, "reflect", "norm skip"),
    "B1-I24-O40-H19-W35-norm-relu": (1, 24, 40, 19, 35, 3, 1, ONES, "zeros", "norm relu"),
    "B1-I16-O16-H9-W8-valid-cropped": (1, 16, 16, 9, 8, 3, 1, NONE, "zeros", "cropped skip"),
    "B1-I16-O8-H9-W8-uneven": (1, 16, 8, 9, 8, 3, 1, UNEVEN, "zeros", "relu"),
    "B2-I8-O8-H9-W8-uneven-reflect": (2, 8, 8, 9, 8, 3, 1, UNEVEN, "reflect", "plain"),
    "B1-I16-O16-H7-W9-kernel5": (1, 16, 16, 7, 9, 5, 1, (2, 2, 2, 2), "zeros", "relu"),
    "B1-I16-O4-H1-W9-kernel1": (1, 16, 4, 1, 9, 1, 1, NONE, "zeros", "norm relu"),
    "B1-I32-O32-H5-W9-few-pixels": (1, 32, 32, 5, 9, 3, 1, ONES, "zeros", "relu"),
}
WINOGRAD_CASES = {
    "B1-I32-O64-H12-W13-plain": (1, 32, 64, 12, 13, 3, 1, ONES, "zeros", "plain"),
    "B2-I64-O32-H11-W15-valid-cropped": (2, 64, 32, 11, 15, 3, 1, NONE, "zeros", "cropped skip relu"),
    "B2-I32-O32-H9-W14-skip": (2, 32, 32, 9, 14, 3, 1, ONES, "zeros", "skip"),
    "B1-I32-O32-H13-W12-reflect-skip": (1, 32, 32, 13, 12, 3, 1, ONES, "reflect", "skip relu"),
    "B1-I32-O32-H13-W14-uneven": (1, 32, 32, 13, 14, 3, 1, UNEVEN, "zeros", "relu"),
    "B1-I32-O32-H2-W65-thin": (1, 32, 32, 2, 65, 3, 1, ONES, "zeros", "relu"),
    "B2-I32-O32-H12-W11-norm-cropped": (2, 32, 32, 12, 11, 3, 1, ONES, "zeros", "norm cropped skip relu"),
}
CASES |= WINOGRAD_CASES


def arguments(case, device, dtype):
    n, c_in, c_out, height, width, kernel, stride, padding, mode, follows = CASES[case]
    x = features(n, c_in, height, width, device=device, dtype=dtype)
    weight, bias = filters(c_out, c_in, kernel, kernel, device=device, dtype=dtype)
    padding, skip = Padding(padding, mode), None
    if "skip" in follows:
        shape = reference.conv_bn_relu(x.float(), weight, bias, Geometry(stride, padding)).shape
        margin = 2 if "cropped" in follows else 0
        skip = features(n, c_out, shape[2] + 2 * margin, shape[3] + 2 * margin, device=device, dtype=dtype)
        skip = skip[:, :, margin : margin + shape[2], margin : margin + shape[3]]
    norm = instance_norm(c_out, device) if "norm" in follows else None
    return x, weight, bias, Geometry(stride, padding), Epilogue(norm, RELU if "relu" in follows else None, skip)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("device", "backend", "dtype"), FROZEN_RUNS)
def test_matches_the_formula(device, backend, dtype, case):
    by_4x4 = backend == "native" and dtype == torch.float32 and implementation_of(case) == "winograd_4x4"
    floor = LAYER_ERROR_4X4 if by_4x4 else 4e-7
    check(backend, ops.conv_bn_relu, *arguments(case, device, dtype), floor=floor)


BY_WINOGRAD = pytest.mark.skipif(_native.winograd_lanes() < FEWEST_LANES, reason="Winograd wants AVX2 to be faster")


def implementation_of(case):
    with backends.recorded() as choices:
        ops.conv_bn_relu(*arguments(case, "cpu", torch.float32))
    return choices[0].implementation


@BY_WINOGRAD
@pytest.mark.parametrize("case", WINOGRAD_CASES)
def test_float32_uses_winograd_on_a_cpu(case):
    assert implementation_of(case) == ("winograd" if case.endswith("thin") else "winograd_4x4")
    assert implementation_of("B1-I32-O32-H5-W9-few-pixels") == "direct"


@BY_WINOGRAD
@pytest.mark.parametrize(
    ("channels", "size", "expected"),
    [(64, 56, "winograd_4x4"), (128, 28, "winograd_4x4"), (256, 14, "winograd_4x4"), (512, 7, "winograd")],
)
def test_which_tiles_serve_the_layers_of_a_resnet(channels, size, expected):
    x = features(1, channels, size, size, device="cpu", dtype=torch.float32)
    parameters = filters(channels, channels, 3, 3, device="cpu", dtype=torch.float32)
    with backends.recorded() as choices:
        ops.conv_bn_relu(x, *parameters, Geometry(padding=Padding(ONES)))
    assert choices[0].implementation == expected


@BY_WINOGRAD
def test_winograd_takes_a_skip_in_any_layout_of_the_right_shape():
    *call, epilogue = arguments("B2-I32-O32-H9-W14-skip", "cpu", torch.float32)
    skip = epilogue.skip
    with use_backend("native"):
        expected = ops.conv_bn_relu(*call, epilogue)
        assert torch.equal(ops.conv_bn_relu(*call, epilogue._replace(skip=skip.contiguous())), expected)
        for wrong in (skip[:, :, 1:], skip[:, :16], skip[:1], skip.double()):
            with pytest.raises(ValueError, match=r"expected a skip of \[2, 32, 9, 14\] in float32, got \["):
                ops.conv_bn_relu(*call, epilogue._replace(skip=wrong))


@BY_WINOGRAD
def test_winograd_weights_follow_the_weight():
    x, weight, bias, *rest = arguments("B1-I32-O64-H12-W13-plain", "cpu", torch.float32)
    with use_backend("native"):
        before = ops.conv_bn_relu(x, weight, bias, *rest)
        assert torch.equal(ops.conv_bn_relu(x, weight, bias, *rest), before)
        weight.mul_(2)
        bias.mul_(2)
        assert torch.equal(ops.conv_bn_relu(x, weight, bias, *rest), 2 * before)


@pytest.mark.skipif(not GPU, reason="cuDNN is a GPU's")
@pytest.mark.parametrize("case", [case for case in CASES if case.endswith(("W13", "skip-relu", "stride2"))])
def test_cudnn_matches_the_formula(case):
    check("native", ops.conv_bn_relu, *arguments(case, "cuda", torch.bfloat16))


@pytest.mark.parametrize(("device", "backend", "dtype"), FROZEN_RUNS)
def test_any_layout_gives_the_same(device, backend, dtype):
    x, *rest, epilogue = arguments("B2-I12-O20-H7-W11-skip", device, dtype)
    wider = torch.nn.functional.pad(x, (2, 1, 1, 2))[:, :, 1:-2, 2:-1]
    with use_backend(backend):
        expected = ops.conv_bn_relu(x, *rest, epilogue)
        contiguous = epilogue._replace(skip=epilogue.skip.contiguous())
        for y in (x.contiguous(), wider):
            assert torch.equal(ops.conv_bn_relu(y, *rest, contiguous), expected)


def test_packed_weights_follow_the_weight():
    x = features(1, 4, 5, 5, device="cpu", dtype=torch.float32)
    weight, bias = filters(4, 4, 3, 3, device="cpu", dtype=torch.float32)
    before = ops.conv_bn_relu(x, weight, bias, Geometry(padding=Padding(ONES)))
    weight.mul_(2)
    bias.mul_(2)
    assert error(ops.conv_bn_relu(x, weight, bias, Geometry(padding=Padding(ONES))), 2 * before) < 1e-6


@pytest.mark.parametrize("device", DEVICES)
def test_where_a_gradient_is_wanted_there_is_one(device):
    x = features(1, 4, 5, 5, device=device, dtype=torch.float32)
    weight, bias = (t.requires_grad_() for t in filters(4, 4, 3, 3, device=device, dtype=torch.float32))
    ops.conv_bn_relu(x, weight, bias, Geometry(padding=Padding(ONES))).sum().backward()
    assert weight.grad.any() and bias.grad.any()


@pytest.mark.parametrize("device", DEVICES)
def test_a_gradient_wanted_by_the_norm_alone_is_there_too(device):
    x = features(1, 4, 5, 5, device=device, dtype=torch.float32)
    weight, bias = filters(4, 4, 3, 3, device=device, dtype=torch.float32)
    norm = instance_norm(4, device)
    norm.weight.requires_grad_()
    for y in (
        ops.conv_bn_relu(x, weight, bias, epilogue=Epilogue(norm)),
        ops.subpixel_conv_bn_relu(x, weight, bias, epilogue=Epilogue(norm)),
        ops.instance_norm(x, Epilogue(norm)),
    ):
        (gradient,) = torch.autograd.grad(y.square().sum(), norm.weight)
        assert gradient.any()


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_without_a_graph_break(device):
    torch.compiler.reset()
    call = arguments("B1-I24-O40-H19-W35-norm-relu", device, torch.float32)
    with torch.no_grad():
        compiled = torch.compile(ops.conv_bn_relu, fullgraph=True, backend="aot_eager")(*call)
        assert error(compiled, ops.conv_bn_relu(*call)) < 1e-5


@pytest.mark.parametrize(("device", "backend", "dtype"), [run for run in FROZEN_RUNS if run.values[1] == "triton"])
def test_not_finite_stays_visible(device, backend, dtype):
    x, *rest = arguments("B1-I16-O16-H9-W13", device, dtype)
    x[0, 3, 4, 5] = float("nan")
    with use_backend(backend):
        y = ops.conv_bn_relu(x, *rest)
    assert y[0, :, 3:6, 4:7].isnan().all() and y[0, :, :2].isfinite().all()


@pytest.mark.skipif(not GPU, reason="streams are a GPU's")
def test_on_the_current_cuda_stream():
    call = arguments("B1-I24-O40-H19-W35-norm-relu", "cuda", torch.bfloat16)
    expected = ops.conv_bn_relu(*call)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        y = ops.conv_bn_relu(*call)
    stream.synchronize()
    assert torch.equal(y, expected)


def test_an_empty_batch_stays_empty():
    weight, bias = filters(4, 4, 3, 3, device="cpu", dtype=torch.float32)
    assert ops.conv_bn_relu(torch.rand(0, 4, 5, 6), weight, bias, Geometry(padding=Padding(ONES))).shape == (0, 4, 5, 6)


def test_refuses_what_does_not_fit():
    weight, bias = filters(4, 4, 3, 3, device="cpu", dtype=torch.float32)
    with pytest.raises(ValueError, match=r"\[N, I, H, W\].*got \[1, 3, 5, 6\]"):
        ops.conv_bn_relu(torch.rand(1, 3, 5, 6), weight, bias)


def test_an_activation_of_another_name_is_refused():
    x = features(1, 4, 5, 5, device="cpu", dtype=torch.float32)
    weight, bias = filters(4, 4, 3, 3, device="cpu", dtype=torch.float32)
    swish = Epilogue(activation=Activation("swish"))
    with use_backend("native"), pytest.raises(backends.CannotServe, match="no kernel for the activation swish"):
        ops.conv_bn_relu(x, weight, bias, epilogue=swish)
    with pytest.raises(ValueError, match=r"activation must be one of relu, leaky_relu, .*, got 'swish'"):
        ops.conv_bn_relu(x, weight, bias, epilogue=swish)
