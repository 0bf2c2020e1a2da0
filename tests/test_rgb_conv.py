"""The convolutions at the two ends, against float64: pictures in, pictures out."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from cases import GPU, error, no_worse
from frozen import ACTIVATION_NAMES, FROZEN_RUNS, activations, features, filters, instance_norm, widened

from fastperc import _native, backends, ops, reference, use_backend
from fastperc.modules import RGBConv
from fastperc.ops.conv3x3 import FEWEST_LANES
from fastperc.ops.rgb_conv import _Fold
from fastperc.types import Epilogue, Padding, Window, same_sides

FOURS = (4, 4, 4, 4)
ENDS = {
    "tanh": ((2.0, -1.0), 1.0),
    "linear": ((255.0, 0.0), 60.0),
    "plain": ((1.0, 0.0), 1.0),
}  # input range, size of what the head gives

# image, window, filters, kernel, padding, mode, norm
STEMS = {
    "levels": ("uint8", Window(0, 0, 20, 23), 32, 9, FOURS, "zeros", False),
    "float-norm": ("fp32", Window(0, 0, 17, 12), 16, 9, FOURS, "zeros", True),
    "float-mirrored": ("fp32", Window(-40, -23, 62, 48), 16, 9, FOURS, "zeros", False),
    "levels-reflect-norm": ("uint8", Window(0, 0, 20, 24), 16, 9, FOURS, "reflect", True),
    "half-part": ("fp16", Window(5, 3, 12, 14), 32, 9, (4, 0, 0, 2), "reflect", False),
    "small-kernel": ("fp32", Window(0, 0, 9, 8), 12, 3, (1, 1, 1, 1), "zeros", False),
    "strips": ("uint8", Window(-9, -60, 41, 141), 96, 9, FOURS, "zeros", False),
    "strips-reflect-uneven": ("fp32", Window(-9, -60, 40, 134), 48, 9, (4, 1, 0, 3), "reflect", False),
}


def image_of(kind, device):
    """Two images of 20×23, or their part that a case wants."""
    if kind == "uint8":
        return torch.randint(0, 256, (2, 20, 23, 3), dtype=torch.uint8, device=device).permute(0, 3, 1, 2)
    return torch.rand(2, 3, 20, 23, device=device).to({"fp16": torch.float16, "fp32": torch.float32}[kind])


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("output", ENDS)
@pytest.mark.parametrize("case", STEMS)
@pytest.mark.parametrize(("device", "backend", "dtype"), FROZEN_RUNS)
def test_stem_matches_the_formula(device, backend, dtype, case, output):
    if backend == "native":
        backend = None  # image_io and conv_bn_relu, which choose for themselves
    kind, window, out, kernel, padding, mode, with_norm = STEMS[case]
    image, input_range, padding = image_of(kind, device), ENDS[output][0], Padding(padding, mode)
    weight, bias = filters(out, 3, kernel, kernel, device=device, dtype=dtype)
    norm = instance_norm(out, device) if with_norm else None

    def run(backend, dtype, exactly=lambda value: value):
        tensors = exactly(weight), exactly(bias)
        given = norm and norm._replace(weight=exactly(norm.weight), bias=exactly(norm.bias))
        with use_backend(backend) if backend else torch.no_grad():
            return ops.rgb_conv_stem(image, *tensors, window, input_range, padding, Epilogue(given), dtype)

    exact, stock = run("reference", torch.float64, torch.Tensor.double), run("reference", dtype)
    ours = run(backend, dtype)
    assert ours.dtype == dtype and torch.equal(ours, run(backend, dtype))
    no_worse(ours, stock, exact)


# batch, in, height, width, kernel, padding, mode
HEADS = {
    "B1-I32-H12-W21": (1, 32, 12, 21, 9, FOURS, "zeros"),
    "B3-I16-H9-W70": (3, 16, 9, 70, 9, FOURS, "zeros"),
    "B2-I12-H20-W16-reflect": (2, 12, 20, 16, 9, FOURS, "reflect"),
    "B1-I64-H13-W12-uneven": (1, 64, 13, 12, 9, (4, 2, 0, 3), "zeros"),
    "B1-I32-H14-W13-valid": (1, 32, 14, 13, 9, (0, 0, 0, 0), "reflect"),
    "B2-I32-H37-W131-strips": (2, 32, 37, 131, 9, FOURS, "zeros"),
    "B1-I64-H25-W108-strips-reflect": (1, 64, 25, 108, 9, (4, 1, 0, 3), "reflect"),
    "B1-I70-H4-W5-kernel3": (1, 70, 4, 5, 3, (1, 1, 1, 1), "reflect"),
    "B2-I64-H17-W21-kernel3-zeros": (2, 64, 17, 21, 3, (1, 1, 1, 1), "zeros"),
    "B2-I16-H4-W40-kernel7": (2, 16, 4, 40, 7, (3, 3, 3, 3), "zeros"),
    "B1-I64-H25-W47-kernel7-reflect": (1, 64, 25, 47, 7, (3, 3, 3, 3), "reflect"),
    "B1-I32-H4-W35-kernel7-reflect-thin": (1, 32, 4, 35, 7, (3, 3, 3, 3), "reflect"),
    "B1-I32-H19-W20-kernel7-uneven": (1, 32, 19, 20, 7, (3, 1, 0, 2), "reflect"),
}
PICTURES = {
    "fp32": lambda n, h, w: torch.full((n, 3, h, w), torch.nan),
    "fp16-nhwc": lambda n, h, w: torch.full((n, h, w, 3), torch.nan).half().permute(0, 3, 1, 2),
    "window": lambda n, h, w: torch.full((n, 3, h + 3, w + 2), torch.nan)[:, :, 1 : h + 1, 2:],
    "levels": lambda n, h, w: torch.full((n, h, w, 3), 77, dtype=torch.uint8).permute(0, 3, 1, 2),
    "levels-chw": lambda n, h, w: torch.full((n, 3, h, w), 77, dtype=torch.uint8),
}


@pytest.mark.parametrize("picture", PICTURES)
@pytest.mark.parametrize("output", ENDS)
@pytest.mark.parametrize("case", HEADS)
@pytest.mark.parametrize(("device", "backend", "dtype"), FROZEN_RUNS)
def test_head_matches_the_formula(device, backend, dtype, case, output, picture):
    if output == "plain" and picture.startswith("levels"):
        pytest.skip("a plain output has no levels")
    n, c, height, width, kernel, padding, mode = HEADS[case]
    x = features(n, c, height, width, device=device, dtype=dtype)
    weight, bias = filters(3, c, kernel, kernel, device=device, dtype=dtype)
    size = ENDS[output][1]
    weight, bias = size * weight, size * bias
    height, width = height + sum(padding[2:]) - kernel + 1, width + sum(padding[:2]) - kernel + 1
    padding = Padding(padding, mode)
    exact = torch.empty(n, 3, height, width, dtype=torch.float64, device=device)
    ours = PICTURES[picture](n, height, width).to(device)
    with use_backend("reference"):
        ops.rgb_conv_head(x.double(), weight.double(), bias.double(), padding, output, exact)
    with use_backend(backend):
        ops.rgb_conv_head(x, weight, bias, padding, output, ours)
    if ours.dtype == torch.uint8:
        tolerated = {torch.float32: 0.503, torch.float16: 0.75, torch.bfloat16: 1.5}[dtype]
        assert (ours.double() - exact.clamp(0, 1) * 255).abs().max() <= tolerated
    else:  # what a stock network makes in its own dtype
        stock = torch.nn.functional.conv2d(reference.pad(x, padding), weight.to(dtype), bias.to(dtype))
        no_worse(ours, reference.to_image_range(stock, output).to(ours.dtype), exact)


@pytest.mark.parametrize("mode", ["zeros", "reflect"])
def test_head_some_rows_at_a_time(mode, monkeypatch):
    x = features(2, 8, 23, 14, device="cpu", dtype=torch.float32)
    weight, bias = filters(3, 8, 9, 9, device="cpu", dtype=torch.float32)
    pictures = []
    for pixels in (1 << 20, 14 * 5):
        monkeypatch.setattr(import_module("fastperc.ops.rgb_conv_head"), "PIXELS_AT_ONCE", pixels)
        pictures.append(torch.full((2, 3, 23, 14), torch.nan))
        with use_backend("native"):
            ops.rgb_conv_head(x, weight, bias, Padding(FOURS, mode), "tanh", pictures[-1])
    assert error(*pictures) < 1e-6


@pytest.mark.parametrize(("device", "backend", "dtype"), FROZEN_RUNS)
def test_head_saturates_and_rounds(device, backend, dtype):
    """From far below to far above, through a kernel that passes one channel on: every level, ends included."""
    values = torch.linspace(-2, 2, 1021)
    x = values.to(device, dtype).view(1, 1, 1, -1).expand(1, 16, 1, 1021).contiguous(memory_format=torch.channels_last)
    weight = torch.zeros(3, 16, 1, 1, device=device)
    weight[:, 0] = 1
    out = torch.empty(1, 3, 1, 1021, dtype=torch.uint8, device=device)
    with use_backend(backend):
        ops.rgb_conv_head(x, weight, torch.zeros(3, device=device), Padding(), "tanh", out)
    expected = reference.to_levels(0.5 + 150 / 255 * x[:, :1].double().tanh())
    assert (out.int() - expected.int()).abs().max() <= 1
    assert out[0, 0, 0, 0] == 0 and out[0, 0, 0, -1] == 255
    assert (out.int() == expected.int()).double().mean() > 0.99


@pytest.mark.parametrize("backend", ["reference", "native", *["triton"] * GPU])
def test_large_and_not_finite(backend):
    device = "cuda" if backend == "triton" else "cpu"
    x = torch.tensor([-1e30, -50.0, 0.0, 50.0, 1e30, torch.nan], device=device).view(1, 1, 1, 6).repeat(1, 16, 1, 1)
    weight = torch.zeros(3, 16, 1, 1, device=device)
    weight[:, 0] = 1
    out = torch.empty(1, 3, 1, 6, device=device)
    with use_backend(backend):
        ops.rgb_conv_head(x, weight, torch.zeros(3, device=device), Padding(), "tanh", out)
    assert error(out[0, 0, 0, :5].cpu(), 0.5 + 150 / 255 * torch.tensor([-1.0, -1.0, 0.0, 1.0, 1.0])) < 1e-6
    assert out[0, 0, 0, 5].isnan()


def test_refuses_what_does_not_fit():
    x, weight, bias = torch.rand(1, 8, 12, 12), torch.rand(3, 8, 9, 9), torch.zeros(3)
    for kwargs, told in (
        (dict(output="tanh", out=torch.empty(1, 3, 11, 12)), r"a picture \[1, 3, 12, 12\].*got 3, 'tanh' and"),
        (dict(output="sigmoid", out=torch.empty(1, 3, 12, 12)), "among tanh, linear, plain"),
        (dict(output="plain", out=torch.empty(1, 3, 12, 12, dtype=torch.uint8)), "a plain output has no levels"),
    ):
        with pytest.raises(ValueError, match=told):
            ops.rgb_conv_head(x, weight, bias, Padding(FOURS), **kwargs)


@pytest.mark.parametrize("kernel", [9, 7, 3])
def test_which_algorithm_makes_the_head(kernel):
    x = features(1, 64, 16, 40, device="cpu", dtype=torch.float32)
    weight, bias = filters(3, 64, kernel, kernel, device="cpu", dtype=torch.float32)
    with backends.recorded() as choices:
        ops.rgb_conv_head(x, weight, bias, same_sides(kernel // 2), "plain", torch.empty(1, 3, 16, 40))
    by_winograd = kernel > 3 and _native.winograd_lanes() >= FEWEST_LANES
    assert choices[0].implementation == ("winograd" if by_winograd else "onednn")


def test_a_head_may_repeat_the_pixels_at_the_border():
    x = features(1, 64, 16, 40, device="cpu", dtype=torch.float32)
    weight, bias = filters(3, 64, 9, 9, device="cpu", dtype=torch.float32)
    out, padding = torch.empty(1, 3, 16, 40), same_sides(4, "replicate")
    ops.rgb_conv_head(x, weight, bias, padding, "plain", out)
    assert error(out, reference.convolve(x.double(), weight.double(), bias.double(), 1, padding)) < 1e-6


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", ACTIVATION_NAMES)
@pytest.mark.parametrize("with_norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize(("device", "backend", "dtype"), FROZEN_RUNS)
def test_every_activation_after_the_stem(device, backend, dtype, with_norm, name):
    image, window = torch.rand(2, 3, 20, 23, device=device), Window(0, 0, 20, 23)
    weight, bias = filters(32, 3, 9, 9, device=device, dtype=dtype)
    norm = instance_norm(32, device) if with_norm else None
    epilogue = Epilogue(norm, activations(32, device)[name])
    call = window, (2.0, -1.0), Padding(FOURS)
    with use_backend("reference"):
        exact = ops.rgb_conv_stem(image, weight.double(), bias.double(), *call, widened(epilogue), torch.float64)
        stock = ops.rgb_conv_stem(image, weight, bias, *call, epilogue, dtype)
    with use_backend(backend) if backend == "triton" else torch.no_grad():
        ours = ops.rgb_conv_stem(image, weight, bias, *call, epilogue, dtype)
        wide = features(2, 64, 20, 23, device=device, dtype=dtype)
        slice_out = wide[:, 16:48]
        again = ops.rgb_conv_stem(image, weight, bias, *call, epilogue._replace(out=slice_out), dtype)
    assert ours.dtype == dtype and again is slice_out and torch.equal(ours, again)
    no_worse(ours, stock, exact)


# The head in training

# batch, in, height, width, out, kernel, padding, mode
TRAINED = {
    "B2-I16-H12-W21": (2, 16, 12, 21, 3, 9, 4, "zeros"),
    "B1-I5-H9-W11-reflect": (1, 5, 9, 11, 3, 9, 4, "reflect"),
    "B1-I64-H16-W16-replicate": (1, 64, 16, 16, 3, 9, 4, "replicate"),
    "B3-I4-H10-W13-valid": (3, 4, 10, 13, 3, 9, 0, "zeros"),
    "B1-I7-H1-W2-kernel3-O2": (1, 7, 1, 2, 2, 3, 1, "zeros"),
    "B1-I8-H14-W10-padding2": (1, 8, 14, 10, 3, 9, 2, "zeros"),
}


def trained(case, layout=torch.channels_last):
    n, c, height, width, out, kernel, *rest = TRAINED[case]
    x = torch.randn(n, c, height, width).contiguous(memory_format=layout)
    weight, bias = filters(out, c, kernel, kernel, device="cpu", dtype=torch.float32)
    return [tensor.detach().requires_grad_() for tensor in (x, weight, bias)], rest


def output_and_gradients(backend, tensors, rest, autocast=False):
    with use_backend(backend), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = ops.rgb_conv(*tensors, *rest)
        incoming = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
        return [y, *torch.autograd.grad(y, tensors, incoming)]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["NHWC", "NCHW"])
@pytest.mark.parametrize("kind", ["fp32", "bf16", "autocast"])
@pytest.mark.parametrize("case", TRAINED)
def test_training_matches_the_formula(case, kind, layout):
    tensors, rest = trained(case, layout)
    if kind == "bf16":
        tensors = [tensor.detach().bfloat16().requires_grad_() for tensor in tensors]
    exact = output_and_gradients("reference", [tensor.detach().double().requires_grad_() for tensor in tensors], rest)
    stock, ours, again = (
        output_and_gradients(backend, tensors, rest, kind == "autocast")
        for backend in ("reference", "native", "native")
    )
    for mine, theirs, wanted, same in zip(ours, stock, exact, again):
        assert mine.dtype == theirs.dtype and torch.equal(mine, same)
        no_worse(mine, theirs, wanted)


def test_training_is_a_stock_convolution_by_default():
    """The module is chosen for, and has the keys and the numbers of ``nn.Conv2d``."""
    net, stock = (
        RGBConv(16, 9, padding=4, padding_mode="reflect"),
        torch.nn.Conv2d(16, 3, 9, 1, 4, padding_mode="reflect"),
    )
    stock.load_state_dict(net.state_dict())
    x = torch.randn(2, 16, 20, 15)
    with backends.recorded() as choices:
        assert error(net(x), stock(x)) < 1e-6
    assert [(choice.operation, choice.implementation) for choice in choices] == [("rgb_conv", "native")]


@pytest.mark.parametrize("beyond", [0, 1, 2])
def test_gradients_of_gradients(beyond):
    products = torch.randn(2, 15, 3, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: _Fold.apply(x, 5, beyond), products)
    assert torch.autograd.gradgradcheck(lambda x: _Fold.apply(x, 5, beyond), products)


@pytest.mark.usefixtures("half_computed")
@pytest.mark.parametrize("cause", ["fp16", "fp64", "empty", "compile"])
def test_training_leaves_the_rest_to_plain_pytorch(cause):
    (x, weight, bias), rest = trained("B2-I16-H12-W21")
    call = ops.rgb_conv
    if cause in ("fp16", "fp64"):
        x, weight, bias = (one.to({"fp16": torch.float16, "fp64": torch.float64}[cause]) for one in (x, weight, bias))
    elif cause == "empty":
        x = x[:0]
    elif cause == "compile":
        call = torch.compile(ops.rgb_conv, fullgraph=True, backend="eager")
    expected = torch.nn.functional.conv2d(x, weight, bias, padding=4)
    assert torch.equal(call(x, weight, bias, *rest), expected)
