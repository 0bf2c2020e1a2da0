"""Feature, pixel and perceptual losses against their formulas in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import error

from fastperc import FeatureLoss, PerceptualLoss, PixelLoss, VGG16Features, gram_matrix
from fastperc.presets import CONVENTIONS

LAYERS = ("relu1_2", "relu2_2")


@pytest.fixture(scope="module")
def features(vgg_file):
    return VGG16Features(vgg_file, LAYERS)


@pytest.mark.parametrize("kind", [FeatureLoss, PixelLoss])
def test_feature_and_pixel_loss(kind):
    x, target = torch.randn(2, 3, 5, 7, requires_grad=True), torch.randn(2, 3, 5, 7)
    loss = kind(weight=0.5)(x, target)
    loss.backward()
    difference = x.detach().double() - target.double()
    assert error(loss, 0.5 * (difference.square().sum(dim=(1, 2, 3)) / (3 * 5 * 7)).mean()) < 1e-6
    assert error(x.grad, 0.5 * 2 * difference / (3 * 5 * 7) / 2) < 1e-6


def test_feature_loss_of_large_half_precision_values_is_finite():
    x = torch.full((1, 4, 64, 64), 300.0, dtype=torch.float16, requires_grad=True)  # its square passes 65,504
    loss = FeatureLoss()(x, torch.zeros_like(x))
    loss.backward()
    assert loss.item() == 90_000 and x.grad.isfinite().all()


def test_feature_loss_refuses_other_shapes():
    with pytest.raises(ValueError, match="PixelLoss needs equal shapes"):
        PixelLoss()(torch.rand(1, 3, 4, 4), torch.rand(1, 3, 4, 5))


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_perceptual_loss_matches_its_convention(features, convention):
    style, content = torch.rand(1, 3, 40, 30), torch.rand(2, 3, 24, 32)
    output = torch.rand(2, 3, 24, 32, requires_grad=True)
    loss = PerceptualLoss(features, style, convention=convention, content_weight=2.0, style_weight=3.0, tv_weight=0.5)
    terms = loss(output, content)

    features64 = copy.deepcopy(features).double()
    y, s = output.detach().double(), style.double()
    phi, target = features64(y), features64(content.double())["relu2_2"]
    difference = (phi["relu2_2"] - target).square().sum(dim=(1, 2, 3)) / target[0].numel()
    grams = {layer: (gram_matrix(phi[layer]), gram_matrix(features64(s)[layer])) for layer in LAYERS}
    frobenius = {layer: (g - a).square().sum(dim=(1, 2)).mean() for layer, (g, a) in grams.items()}
    squares = y.diff(dim=2).square().sum() + y.diff(dim=3).square().sum()
    if convention == "paper":
        expected = difference.mean(), sum(frobenius.values()), squares * 255**2 / 2
    elif convention == "means":
        expected = difference.mean(), sum(frobenius[k] / grams[k][0][0].numel() for k in LAYERS), squares * 255**2 / 2
    else:
        expected = (
            difference.mean() / target.square().mean(),
            sum(frobenius[k] / grams[k][1].square().sum() for k in LAYERS),
            squares / y.numel(),
        )
    content_term, style_term, tv_term = 2 * expected[0], 3 * expected[1], 0.5 * expected[2]
    assert error(terms.content, content_term) < 1e-5
    assert error(terms.style, style_term) < 1e-5
    assert error(terms.tv, tv_term) < 1e-5
    assert error(terms.total, content_term + style_term + tv_term) < 1e-5

    terms.total.backward()
    assert output.grad.isfinite().all() and output.grad.any()
    assert all(parameter.grad is None for parameter in loss.parameters())


def test_perceptual_loss_without_a_style(features):
    output, content = torch.rand(1, 3, 16, 16), torch.rand(1, 3, 16, 16)
    terms = PerceptualLoss(features, content_layer="relu2_2", tv_weight=0.0)(output, content)
    assert terms.style.item() == 0 and terms.tv.item() == 0 and torch.equal(terms.total, terms.content)
    assert PerceptualLoss(features)(content, content).content.item() == 0


def test_perceptual_loss_is_finite_under_autocast(features):
    loss = PerceptualLoss(features, torch.rand(1, 3, 32, 32))
    output, content = torch.rand(1, 3, 32, 32, requires_grad=True), torch.rand(1, 3, 32, 32)
    expected = loss(output, content).total
    with torch.autocast("cpu", torch.bfloat16):
        total = loss(output, content).total
    total.backward()
    assert total.dtype == torch.float32 and error(total, expected) < 5e-2
    assert output.grad.isfinite().all()


def test_perceptual_loss_refuses(features):
    with pytest.raises(ValueError, match="sums"):
        PerceptualLoss(features, convention="sums")
    with pytest.raises(ValueError, match="without relu3_3"):
        PerceptualLoss(features, torch.rand(1, 3, 16, 16), style_layers=["relu1_2", "relu3_3"])
    with pytest.raises(ValueError, match="without relu3_3"):
        PerceptualLoss(features, content_layer="relu3_3")


def test_the_default_convention_is_relative(features):
    """The terms are about 1, as a GAN's own loss is."""
    output, content = torch.rand(2, 1, 3, 32, 32)
    loss = PerceptualLoss(features, torch.rand(1, 3, 24, 24))
    assert loss.convention == "relative" and 0 < loss(output, content).total < 10
    expected = PerceptualLoss(features, torch.zeros(1, 3, 24, 24), convention="relative", tv_weight=0.0)
    assert (loss.content_weight, loss.style_weight) == (expected.content_weight, expected.style_weight)


def test_a_dict_weighs_the_style_layers(features):
    style, output, content = torch.rand(3, 1, 3, 32, 32)
    weights = {"relu2_2": 0.25, "relu1_2": 3}
    single = {
        layer: PerceptualLoss(features, style, style_layers=layer, convention="means")(output, content).style
        for layer in weights
    }
    both = PerceptualLoss(features, style, style_layers=weights, convention="means")(output, content).style
    assert error(both, sum(weights[layer] * single[layer] for layer in weights)) < 1e-5


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"relu1_2": -1.0}, "weight of relu1_2 must be a finite number from 0 up, got -1.0"),
        ({"relu1_2": float("nan")}, "got nan"),
        ({"relu1_2": "1"}, "got '1'"),
        ({"relu1_2": True}, "got True"),
        ({3: "relu1_2"}, r"weight of 3 must be .* got 'relu1_2'"),
        ({3: 1.0}, "layers are names such as 'relu2_2'"),
        ([["relu1_2"]], "layers are names such as 'relu2_2'"),
        ({"relu3_3": 1.0}, "without relu3_3"),
    ],
    ids=str,
)
def test_other_dicts_of_layers_are_refused(features, layers, message):
    with pytest.raises(ValueError, match=message):
        PerceptualLoss(features, torch.rand(1, 3, 24, 24), style_layers=layers)


def test_layers_of_the_loss_network(vgg_file):
    assert VGG16Features(vgg_file, "relu1_2").layers == ("relu1_2",)
    assert VGG16Features(vgg_file, {"relu1_2": 1.0, "relu2_2": 2.0}).layers == LAYERS
    assert VGG16Features(vgg_file, ["relu1_2", "relu1_2"]).layers == ("relu1_2",)
    with pytest.raises(ValueError, match=r"a dict has them as keys.*got 3"):
        VGG16Features(vgg_file, {3: "relu1_2"})
    with pytest.raises(ValueError, match="content_layer must be one name"):
        PerceptualLoss(VGG16Features(vgg_file, LAYERS), content_layer={"relu2_2": 1.0})


def test_compiles_without_a_graph_break(features):
    torch.compiler.reset()
    loss = PerceptualLoss(features, torch.rand(1, 3, 24, 24), convention="relative", tv_weight=0.1)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    output, content = torch.rand(1, 3, 24, 24), torch.rand(1, 3, 24, 24)
    ours, theirs = output.clone().requires_grad_(), output.clone().requires_grad_()
    loss(ours, content).total.backward()
    compiled(theirs, content).total.backward()
    assert error(theirs.grad, ours.grad) < 1e-5
