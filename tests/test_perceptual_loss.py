"""The forms of the perceptual loss that other libraries use, each against its formula written out in float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from cases import error, no_worse
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastperc import PerceptualLoss, VGGFeatures, use_backend
from fastperc.losses import Criteria
from fastperc.models import image_range
from fastperc.models.vgg_weights import convolutions, indices

LAYERS = ("conv1_2", "relu1_2", "pool1", "conv2_1", "conv3_1", "relu3_2", "conv3_4")
DEPTH = 8  # convolutions, down to conv3_4


@pytest.fixture(scope="module")
def vgg19_file(tmp_path_factory):
    """Random weights of VGG-19 down to conv3_4, under torchvision's names, that keep the size of activations."""
    generator = torch.Generator().manual_seed(2)
    tensors = {}
    for (_, c_in, c_out), i in [*zip(convolutions("VGG-19"), indices("VGG-19", False))][:DEPTH]:
        tensors[f"features.{i}.weight"] = torch.randn(c_out, c_in, 3, 3, generator=generator) * (2 / (9 * c_in)) ** 0.5
        tensors[f"features.{i}.bias"] = torch.randn(c_out, generator=generator) * 0.01
    path = tmp_path_factory.mktemp("vgg") / "vgg19.pth"
    torch.save(tensors, path)
    return path


@pytest.fixture(scope="module")
def features(vgg19_file):
    return VGGFeatures("vgg19", vgg19_file, LAYERS)


class BasicSR(nn.Module):
    """BasicSR's ``PerceptualLoss``: its arguments, and its formulas one by one, in float64."""

    def __init__(self, file, layer_weights, use_input_norm=True, range_norm=False, criterion="l1"):
        super().__init__()
        self.layer_weights, self.criterion = layer_weights, criterion
        self.use_input_norm, self.range_norm = use_input_norm, range_norm
        self.tensors = {name: tensor.double() for name, tensor in torch.load(file).items()}

    def extract(self, x):
        if self.range_norm:
            x = (x + 1) / 2
        if self.use_input_norm:
            mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).double().view(2, 1, 3, 1, 1)
            x = (x - mean) / std
        maps = {}
        for (name, _, _), i in [*zip(convolutions("VGG-19"), indices("VGG-19", False))][:DEPTH]:
            if name in ("2_1", "3_1"):
                x = maps[f"pool{int(name[0]) - 1}"] = F.max_pool2d(x, 2, 2)
            x = maps[f"conv{name}"] = F.conv2d(
                x, self.tensors[f"features.{i}.weight"], self.tensors[f"features.{i}.bias"], padding=1
            )
            x = maps[f"relu{name}"] = x.relu()
        return maps

    def distance(self, a, b):
        if self.criterion == "fro":
            return torch.norm(a - b, p="fro")
        return {"l1": nn.L1Loss(), "l2": nn.MSELoss(), "smooth_l1": nn.SmoothL1Loss()}[self.criterion](a, b)

    @staticmethod
    def gram(x):
        n, c, h, w = x.shape
        return x.view(n, c, h * w).bmm(x.view(n, c, h * w).transpose(1, 2)) / (c * h * w)

    def forward(self, x, gt):
        x, gt = self.extract(x.double()), self.extract(gt.detach().double())
        weights = self.layer_weights.items()
        content = sum(self.distance(x[layer], gt[layer]) * weight for layer, weight in weights)
        return content, sum(self.distance(self.gram(x[k]), self.gram(gt[k])) * weight for k, weight in weights)


def images(requires_grad=True):
    """A target, and an output darker than it, so that rounding turns no sign."""
    target = torch.rand(2, 3, 20, 28)
    return (0.3 * target).requires_grad_(requires_grad), target


ONE, SEVERAL = {"conv3_4": 1.0}, {"conv1_2": 0.1, "relu1_2": 0.2, "pool1": 0.5, "conv3_1": 1.0, "conv3_4": 2.0}


@pytest.mark.parametrize("criterion", ["l1", "l2", "smooth_l1", "fro"])
@pytest.mark.parametrize("layer_weights", [ONE, SEVERAL], ids=["conv3_4", "several"])
@pytest.mark.parametrize(("perceptual_weight", "style_weight"), [(1.0, 0.0), (0.5, 30.0), (0.0, 2.0)], ids=str)
def test_equals_basicsr(vgg19_file, features, layer_weights, perceptual_weight, style_weight, criterion):
    loss = PerceptualLoss(
        features,
        "target",
        content_layers=layer_weights,
        style_layers=layer_weights,
        criterion=criterion,
        convention="plain",
        content_weight=perceptual_weight,
        style_weight=style_weight,
    )
    output, target = images()
    terms = loss(output, target)
    terms.total.backward()
    exact = output.detach().double().requires_grad_()
    content, style = BasicSR(vgg19_file, layer_weights, criterion=criterion)(exact, target)
    total = perceptual_weight * content + style_weight * style
    total.backward()
    assert error(terms.content, perceptual_weight * content) < 1e-5
    assert error(terms.style, style_weight * style) < 1e-5
    assert error(terms.total, total) < 1e-5 and terms.tv == 0
    with use_backend("reference"):
        stock = output.detach().requires_grad_()
        loss(stock, target).total.backward()
    no_worse(output.grad, stock.grad, exact.grad, 5e-4)


@pytest.mark.parametrize("use_input_norm", [True, False])
@pytest.mark.parametrize("range_norm", [True, False])
def test_input_ranges_equal_basicsr(vgg19_file, use_input_norm, range_norm):
    loss = PerceptualLoss(
        VGGFeatures("vgg19", vgg19_file, ONE, preprocessing=None if use_input_norm else "none"),
        content_layers=ONE,
        criterion="l1",
        convention="plain",
        input_range=(-1, 1) if range_norm else (0, 1),
    )
    output, target = images()
    if range_norm:
        output, target = (2 * output - 1).detach().requires_grad_(), 2 * target - 1
    total = loss(output, target).total
    total.backward()
    exact = output.detach().double().requires_grad_()
    expected, _ = BasicSR(vgg19_file, ONE, use_input_norm, range_norm)(exact, target)
    expected.backward()
    assert error(total, expected) < 1e-5 and error(output.grad, exact.grad) < 5e-4


@pytest.mark.parametrize("criterion", ["l1", "smooth_l1", "fro"])
def test_relative_terms_are_over_those_of_the_target_against_zeros(features, criterion):
    output, target = images()
    terms = PerceptualLoss(features, "target", content_layers=SEVERAL, style_layers="conv2_1", criterion=criterion)(
        output, target
    )
    oracle = BasicSR.__new__(BasicSR)
    nn.Module.__init__(oracle)
    oracle.criterion = criterion
    maps, targets = (copy.deepcopy(features).double()(x.detach().double()) for x in (output, target))
    zero = {layer: torch.zeros_like(maps[layer]) for layer in maps}
    content = sum(
        weight * oracle.distance(maps[layer], targets[layer]) / oracle.distance(targets[layer], zero[layer])
        for layer, weight in SEVERAL.items()
    )
    grams = [oracle.gram(x["conv2_1"]) for x in (maps, targets)]
    style = oracle.distance(*grams) / oracle.distance(grams[1], 0 * grams[1])
    assert error(terms.content, 0.3 * content) < 1e-5 and error(terms.style, style) < 1e-5


@pytest.mark.parametrize("convention", ["relative", "means", "paper", "plain"])
def test_gram_matrices_of_a_painting_by_l1(features, convention):
    """Gatys' form with a criterion of its own."""
    painting, (output, target) = torch.rand(1, 3, 24, 24), images()
    loss = PerceptualLoss(
        features,
        painting,
        content_layers=(),
        style_layers={"relu1_2": 2.0, "conv2_1": 0.5},
        criterion=Criteria("l2", "l1"),
        convention=convention,
        style_weight=1.0,
        tv_weight=0.0,
    )
    terms = loss(output, target)
    exact = copy.deepcopy(features).double()
    maps, of_painting = exact(output.detach().double()), exact(painting.double())
    expected = 0.0
    for layer, weight in (("relu1_2", 2.0), ("conv2_1", 0.5)):
        gram, target_gram = BasicSR.gram(maps[layer]), BasicSR.gram(of_painting[layer])
        size = {"relative": target_gram.abs().sum(), "paper": 1}.get(convention, target_gram.numel())
        expected += weight * (gram - target_gram).abs().sum(dim=(1, 2)).mean() / size
    assert error(terms.total, expected) < 1e-5 and terms.content == 0 and terms.tv == 0


def test_gradients_reach_the_second_argument_where_asked(features):
    loss = PerceptualLoss(features, "target", content_layers=SEVERAL, criterion="l1", convention="plain")
    output, target = images()
    target.requires_grad_()
    (alone,) = torch.autograd.grad(loss(output, target).total, output)
    loss(output, target).total.backward()
    assert target.grad is None
    output.grad = None
    loss(output, target, content_gradient=True).total.backward()
    assert error(output.grad, alone) < 1e-5
    (exchanged,) = torch.autograd.grad(loss(target, output.detach()).total, target)
    assert error(target.grad, exchanged) < 1e-5


class TestInATrainingLoop:
    """What other people's loops do to a loss."""

    @pytest.fixture
    def loss(self, features):
        return PerceptualLoss(features, content_layers=("conv1_2", "conv3_4"), criterion="l1", convention="plain")

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_checkpoint(self, loss, reentrant):
        output, target = images()
        (expected,) = torch.autograd.grad(loss(output, target).total, output)
        checkpoint(lambda x: loss(x, target).total, output, use_reentrant=reentrant).backward()
        assert torch.equal(output.grad, expected)
        maps = checkpoint(lambda x: loss.features(x)["relu3_2"], output, use_reentrant=reentrant)
        (direct,) = torch.autograd.grad(loss.features(output)["relu3_2"].sum(), output)
        assert torch.equal(torch.autograd.grad(maps.sum(), output)[0] if not reentrant else direct, direct)

    def test_autocast_and_grad_scaler(self, loss):
        net, target = nn.Conv2d(3, 3, 3, padding=1), torch.rand(1, 3, 24, 24)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        scaler, before = torch.amp.GradScaler("cpu", init_scale=256.0), net.weight.detach().clone()
        with torch.autocast("cpu", torch.float16):
            total = loss(net(target), target).total
        scaler.scale(total).backward()
        scaler.step(optimizer)
        scaler.update()
        assert total.dtype == torch.float32 and net.weight.isfinite().all() and not torch.equal(net.weight, before)

    def test_channels_last_and_shapes_that_are_not_square(self, loss):
        output, target = images(requires_grad=False)
        expected = loss(output, target).total
        in_nhwc = [x.contiguous(memory_format=torch.channels_last) for x in (output, target)]
        assert error(loss(*in_nhwc).total, expected) < 1e-6

    def test_an_empty_batch(self, loss):
        output = torch.rand(0, 3, 24, 24, requires_grad=True)
        total = loss(output, torch.rand(0, 3, 24, 24)).total
        total.backward()
        assert total.item() == 0 and output.grad.shape == output.shape

    def test_the_smallest_image_and_a_smaller_one(self, loss):
        assert loss(torch.rand(1, 3, 4, 5), torch.rand(1, 3, 4, 5)).total.isfinite()
        with pytest.raises(ValueError, match=r"images of 3×9 are too small .* at least 4×4 pixels"):
            loss(torch.rand(1, 3, 3, 9), torch.rand(1, 3, 3, 9))

    def test_compiles_with_the_caller_as_one_graph(self, loss):
        torch.compiler.reset()
        output, target = images()

        @torch.compile(fullgraph=True, backend="aot_eager")
        def step(x, target):
            return loss(x.sigmoid(), target).total

        step(output, target).backward()
        (expected,) = torch.autograd.grad(loss(output.sigmoid(), target).total, output)
        assert error(output.grad, expected) < 1e-4

    def test_without_gradients_no_masks_are_kept(self, loss, monkeypatch):
        from fastperc import _native

        monkeypatch.setattr(_native, "relu_mask_fwd", None)  # calling it fails
        output, target = images()
        with torch.no_grad():
            assert loss(output, target).total > 0


def test_a_loss_without_terms_is_0_and_has_a_gradient(features):
    output, target = images()
    loss = PerceptualLoss(features, content_layers=(), convention="plain")
    loss(output, target).total.backward()
    assert not output.grad.any()


def test_wrong_arguments_get_one_sentence(features, monkeypatch):
    with pytest.raises(ValueError, match="criterion must be one of l2, l1, smooth_l1, fro, got 'l3'"):
        PerceptualLoss(features, content_layers=ONE, criterion="l3")
    with pytest.raises(ValueError, match=r"input_range must be \(0, 1\) or \(-1, 1\), got \(0, 255\)"):
        PerceptualLoss(features, content_layers=ONE, input_range=(0, 255))
    with pytest.raises(ValueError, match="without conv5_4"):
        PerceptualLoss(features, content_layers={"conv5_4": 1.0})
    with pytest.raises(ValueError, match="weight of conv3_4 must be a finite number from 0 up, got -1"):
        PerceptualLoss(features, content_layers={"conv3_4": -1})
    with pytest.raises(TypeError, match="no argument 'perceptual_weight'"):
        PerceptualLoss(features, content_layers=ONE, perceptual_weight=1.0)
    with pytest.raises(ValueError, match=r"style must be one painting \(or 'target'\)"):
        PerceptualLoss(features, "content", content_layers=ONE)

    loss = PerceptualLoss(features, content_layers=ONE, convention="plain", input_range=(-1, 1))
    x = torch.rand(1, 3, 16, 16)
    with pytest.raises(ValueError, match=r"content must be RGB in −1…1, got values .*; divide levels by 127.5"):
        loss(x, 255 * x)
    with pytest.raises(ValueError, match=r"expected RGB images \[N, 3, H, W\], got shape \[1, 1, 16, 16\]"):
        loss(x[:, :1], x[:, :1])
    with pytest.raises(ValueError, match=r"output's shape \[1, 3, 16, 16\], got \[1, 3, 16, 15\]"):
        loss(x, x[..., :15])
    monkeypatch.setattr(image_range, "_warned", False)
    with pytest.warns(UserWarning, match="should be RGB in −1…1"):
        loss(x, 5 * x)


def test_no_style_layers_are_no_style(features):
    assert PerceptualLoss(features, "target", content_layers=features.layers[:1], style_layers={}).style_layers == {}
