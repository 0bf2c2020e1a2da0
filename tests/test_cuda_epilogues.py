"""The CUDA passes around a frozen network's convolutions, run on the CPU through the operations that use them:
epilogues, instance norms, and images at both ends, against float64 and plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from cases import IMAGES, WINDOWS, dtype_id, error
from frozen import ACTIVATION_NAMES, activations, check, features, filters, instance_norm

from fastperc import backends, ops, use_backend
from fastperc.backends import use_implementation
from fastperc.types import RELU, Epilogue, Geometry, Padding, same_sides

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FOLLOWS = ("nothing", "skip", "norm", "norm-skip")
PICTURES = {
    "levels-hwc": lambda shape: torch.empty(shape[0], *shape[2:], 3, dtype=torch.uint8).permute(0, 3, 1, 2),
    "levels-chw": lambda shape: torch.empty(shape, dtype=torch.uint8),
    "fp32": torch.empty,
    "fp16-slice": lambda shape: torch.empty(*shape[:3], shape[3] + 4, dtype=torch.float16)[..., 2:-2],
}
pytestmark = pytest.mark.usefixtures("poisoned")


def pinned(operation, name):
    """``operation`` by its implementation ``name``, with the signature that ``frozen.check`` calls."""

    def run(*arguments, **options):
        if backends.forced() == "reference":
            return getattr(ops, operation)(*arguments, **options)
        with use_implementation(operation, name):
            return getattr(ops, operation)(*arguments, **options)

    return run


def epilogue_of(follows, activation, shape, dtype):
    n, c, h, w = shape
    skip = features(n, c, h + 4, w + 4, device="cpu", dtype=dtype)[..., 2:-2, 2:-2] if "skip" in follows else None
    return Epilogue(instance_norm(c, "cpu") if "norm" in follows else None, activation, skip)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("follows", FOLLOWS)
@pytest.mark.parametrize("name", ACTIVATION_NAMES)
def test_a_convolution_and_its_epilogue(emulated, name, follows, dtype):
    for order, (c_in, c_out, geometry) in enumerate(
        [
            (3, 16, Geometry(1, same_sides(1))),
            (5, 7, Geometry(2, same_sides(1, "reflect"))),
            (8, 8, Geometry(1, same_sides(2), 2, 8)),
        ]
    ):
        x = features(2, c_in, 9, 8, device="cpu", dtype=dtype)
        weight, bias = filters(c_out, c_in // geometry.groups, 3, 3, device="cpu", dtype=dtype)
        shape = geometry.output_shape(x, weight)
        epilogue = epilogue_of(follows, activations(c_out, "cpu")[name], shape, dtype)
        with emulated.on_gpu(order):
            check("native", pinned("conv_bn_relu", "epilogue"), x, weight, bias, geometry, epilogue)


@pytest.mark.parametrize("sides", [(1, 1, 1, 1), (0, 0, 0, 0), (1, 0, 0, 1)], ids=str)
@pytest.mark.parametrize("upsample", ["transposed", "nearest"])
@pytest.mark.parametrize("follows", ["nothing", "norm"])
def test_an_upsampling_convolution(emulated, follows, upsample, sides):
    x = features(2, 8, 5, 7, device="cpu", dtype=torch.float32)
    weight, bias = filters(8, 8, 3, 3, device="cpu", dtype=torch.float32)
    epilogue = epilogue_of(follows, RELU, (2, 8, 1, 1), torch.float32)
    with emulated.on_gpu(2):
        operation = pinned("subpixel_conv_bn_relu", "epilogue")
        check("native", operation, x, weight, bias, upsample, Padding(sides), epilogue)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", [(1, 16, 9, 13), (3, 70, 5, 7), (2, 3, 1, 9)], ids=str)
def test_an_instance_norm(emulated, shape, dtype):
    x = features(*shape, device="cpu", dtype=dtype) * 3 + 50
    with emulated.on_gpu(2):
        check("native", ops.instance_norm, x, epilogue_of("norm-skip", RELU, shape, dtype))
        mean, m2 = ops.instance_statistics(x).unbind(1)
    wide = x.double()
    assert error(mean, wide.mean((2, 3))) < 1e-6
    assert error(m2, (wide - wide.mean((2, 3), keepdim=True)).square().sum((2, 3))) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("image", IMAGES)
def test_an_image_in(emulated, image, dtype):
    """The values are those of the C++ kernel, which tests/test_image_io.py compares with numpy."""
    x = IMAGES[image]()
    for order, window in enumerate(WINDOWS):
        with use_backend("native"):
            expected = ops.image_io(x, window, (2, -1), dtype)
            with emulated.on_gpu(order):
                y = ops.image_io(x, window, (2, -1), dtype)
        assert y.stride() == expected.stride() and (y - expected).abs().max() <= torch.finfo(dtype).eps


@pytest.mark.parametrize("picture", PICTURES)
@pytest.mark.parametrize("output", ["tanh", "linear", "plain"])
def test_a_picture_out(emulated, output, picture):
    if output == "plain" and picture.startswith("levels"):
        pytest.skip("a plain output has no levels")
    padding, shape = same_sides(4, "reflect"), (2, 3, 9, 13)
    for order, dtype in enumerate(DTYPES):
        x = features(2, 5, 9, 13, device="cpu", dtype=dtype)
        weight, bias = filters(3, 5, 9, 9, device="cpu", dtype=dtype)
        weight = weight * (100 if output == "linear" else 1)
        pictures = [PICTURES[picture](shape) for _ in range(2)]
        with emulated.on_gpu(order), use_implementation("rgb_conv_head", "epilogue"):
            ops.rgb_conv_head(x, weight, bias, padding, output, pictures[0])
        wide = [x.double(), weight.double(), bias.double(), padding, output]
        with use_backend("reference"):
            ops.rgb_conv_head(*wide, pictures[1])
        limit = 1.01 if picture.startswith("levels") else 0.02 if dtype != torch.float32 else 2e-3
        scale = 1 if output != "plain" else float(pictures[1].abs().max())
        assert (pictures[0].double() - pictures[1].double()).abs().max() <= limit * scale


def test_the_choice_on_a_gpu(emulated):
    """Where cuDNN fuses less, the pass runs; where there is a bias alone, the library adds it."""
    x = features(1, 8, 9, 8, device="cpu", dtype=torch.float32)
    weight, bias = filters(8, 8, 3, 3, device="cpu", dtype=torch.float32)
    operation = backends.OPERATIONS["conv_bn_relu"]
    (epilogue,) = [one for one in operation.implementations if one.name == "epilogue"]
    call = (x, weight, bias, Geometry(1, same_sides(1)))
    assert "not on cpu tensors" in epilogue.why_not(*call, Epilogue())
    with emulated.on_gpu(), torch.no_grad():
        assert epilogue.why_not(*call, Epilogue()) is None
        assert epilogue.why_slow(*call, Epilogue(skip=x)) is None
        assert epilogue.why_slow(*call, Epilogue(activation=None)) == "there is only a bias to add"
        assert "another shape" in epilogue.why_not(*call, Epilogue(skip=x[..., 1:]))
        assert "float64" in epilogue.why_not(x.double(), *call[1:], Epilogue())
