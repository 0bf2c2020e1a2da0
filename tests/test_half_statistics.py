"""Statistics stay in float32 or wider when a module is converted to half precision."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import error

import fastperc
from fastperc import ConvBNReLU, PerceptualLoss, ResidualBlock, SubpixelConvBNReLU, TransformNet, VGG16Features
from fastperc.presets import CONVENTIONS

CONVERSIONS = {
    "half": lambda module: module.half(),
    "bfloat16": lambda module: module.bfloat16(),
    "to-dtype": lambda module: module.to(torch.float16),
    "to-device-dtype": lambda module: module.to("cpu", torch.float16),
    "to-channels-last": lambda module: module.to(torch.float16, memory_format=torch.channels_last),
    "type": lambda module: module.type(torch.float16),
    "twice": lambda module: module.half().bfloat16().half(),
    "through-double": lambda module: module.double().half(),
    "in-a-parent": lambda module: torch.nn.ModuleDict({"child": module}).half()["child"],
    "then-copied": lambda module: copy.deepcopy(module.half()),
}


@pytest.fixture(scope="module")
def loud_features(vgg_file):
    """A loss network whose Gram matrices pass 65,504, as those of Caffe's weights do."""
    features = VGG16Features(vgg_file, ("relu1_2", "relu2_2"))
    features.convs["1_1"].weight.mul_(64)
    return features


@pytest.mark.parametrize("conversion", CONVERSIONS)
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_perceptual_loss_in_half_precision(loud_features, convention, conversion):
    output, content = torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 32)
    loss = PerceptualLoss(copy.deepcopy(loud_features), torch.rand(1, 3, 24, 40), convention=convention)
    expected = loss(output, content)
    half = CONVERSIONS[conversion](loss)
    dtype = half.features.convs["1_1"].weight.dtype
    assert dtype in (torch.float16, torch.bfloat16)
    assert half.style_scales.dtype == half.gram_relu1_2.dtype == half.features.mean.dtype == torch.float32
    leaf = output.to(dtype).requires_grad_()
    terms = half(leaf, content.to(dtype))
    terms.total.backward()
    for name, term, value in zip(terms._fields, terms, expected):
        assert term.dtype == torch.float32 and error(term, value) < 5e-2, name
    assert leaf.grad.isfinite().all()


def test_the_image_is_normalised_in_float32(loud_features):
    """Caffe's mean in half precision is off by a sixteenth of a level."""
    half = copy.deepcopy(loud_features).half()
    image = torch.rand(1, 3, 16, 16).half()
    expected = (image.double() - loud_features.mean.double()) / loud_features.std.double()
    assert half.normalized(image).dtype == torch.float16
    assert torch.equal(half.normalized(image), expected.half())


def test_small_style_scales_do_not_become_zero(loud_features):
    loss = PerceptualLoss(loud_features, torch.rand(1, 3, 24, 24), convention="relative")
    assert 0 < loss.style_scales.min() < 2**-25
    before = loss.style_scales.clone()
    assert torch.equal(copy.deepcopy(loss).half().style_scales, before)


@pytest.mark.parametrize("conversion", CONVERSIONS)
@pytest.mark.parametrize(
    "make",
    [
        lambda: ConvBNReLU(4, 4, 3, padding=1),
        lambda: ResidualBlock(4),
        lambda: SubpixelConvBNReLU(4, 4),
    ],
    ids=["ConvBNReLU", "ResidualBlock", "SubpixelConvBNReLU"],
)
def test_batch_norms_keep_their_statistics(make, conversion):
    module = make()
    norms = [child for child in module.modules() if isinstance(child, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.running_var.fill_(1e6)
        norm.running_mean.fill_(7e4)
    x = 1e3 * torch.randn(2, 4, 16, 16)
    expected = copy.deepcopy(module).eval()(x)
    half = CONVERSIONS[conversion](module)
    dtype = half.state_dict()["conv.weight" if "conv.weight" in half.state_dict() else "conv1.weight"].dtype
    assert dtype in (torch.float16, torch.bfloat16)
    for norm in (child for child in half.modules() if isinstance(child, torch.nn.BatchNorm2d)):
        assert norm.running_var.dtype == torch.float32 and norm.running_var.eq(1e6).all()
    assert error(half.eval()(x.to(dtype)), expected) < 5e-2
    half.train()(x.to(dtype).requires_grad_()).float().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in half.parameters())


@pytest.mark.usefixtures("half_computed")
def test_networks_keep_their_statistics_and_compile():
    torch.compiler.reset()
    net = TransformNet("paper", width=4).eval()
    x = torch.rand(1, 3, 24, 24)
    expected = net(x)
    half = copy.deepcopy(net).half()
    assert half.down[0].norm.running_var.dtype == torch.float32 and half.head.weight.dtype == torch.float16
    assert fastperc.freeze(half).dtype == torch.float16
    compiled = torch.compile(half, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert error(compiled(x.half()), expected) < 3e-2
    assert torch.equal(copy.deepcopy(half).float().down[0].norm.running_var, net.down[0].norm.running_var)


def test_saving_in_half_precision_keeps_statistics(tmp_path):
    net = TransformNet("paper", width=4)
    net.stem.norm.running_var.fill_(1e5)
    fastperc.save(net, tmp_path / "net.safetensors", dtype=torch.float16)
    assert fastperc.load(tmp_path / "net.safetensors").stem.norm.running_var.eq(1e5).all()


def test_weights_that_do_not_fit_the_dtype_are_not_saved(tmp_path):
    net = TransformNet("paper", width=4)
    with torch.no_grad():
        net.head.bias[0] = 1e5
    with pytest.raises(FloatingPointError, match=r"head\.bias has values that do not fit in torch\.float16"):
        fastperc.save(net, tmp_path / "net.safetensors", dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []
