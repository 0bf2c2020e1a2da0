"""Images that are not RGB in 0–1: refused in a sentence, or warned of once where the values could be meant."""

from __future__ import annotations

import warnings

import pytest
import torch

from fastperc import SRCNN, PerceptualLoss, SuperResolutionNet, TransformNet, VGG16Features, freeze
from fastperc.models import image_range


@pytest.fixture(autouse=True)
def _not_warned_yet(monkeypatch):
    monkeypatch.setattr(image_range, "_warned", False)


@pytest.fixture(scope="module")
def takers(vgg_file):
    features = VGG16Features(vgg_file, ["relu1_2", "relu2_2"])
    x = torch.rand(1, 3, 24, 24)
    loss, engine = PerceptualLoss(features, x), freeze(TransformNet("paper", width=4).eval())
    return {
        "TransformNet": TransformNet("paper", width=4).eval(),
        "SuperResolutionNet": SuperResolutionNet(2, width=4).eval(),
        "SRCNN": SRCNN(2),
        "engine": engine,
        "engine-numpy": lambda images: engine(images.numpy()),
        "VGG16Features": features,
        "style": lambda images: PerceptualLoss(features, images),
        "content": lambda images: loss(x, images),
        "output": lambda images: loss(images, x),
    }


TAKERS = [
    *("TransformNet", "SuperResolutionNet", "SRCNN", "engine", "engine-numpy", "VGG16Features"),
    *("style", "content", "output"),
]
FAR = {
    "levels": lambda: 255 * torch.rand(1, 3, 24, 24),
    "few-bright": lambda: torch.rand(1, 3, 24, 24).index_fill(2, torch.tensor(3), 200.0),
    "minus-mean": lambda: 255 * torch.rand(1, 3, 24, 24) - 120,
    "double": lambda: 255 * torch.rand(1, 3, 24, 24, dtype=torch.float64),
    "16-bit": lambda: 65535 * torch.rand(1, 3, 24, 24),
}


@pytest.mark.parametrize("images", FAR)
@pytest.mark.parametrize("taker", [taker for taker in TAKERS if taker != "output"])
def test_levels_as_floats_are_refused(takers, taker, images):
    with pytest.raises(ValueError, match=r"must be RGB in 0–1, got values from .*; divide levels by 255") as caught:
        takers[taker](FAR[images]())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("taker", [taker for taker in TAKERS if not taker.startswith("engine")])
def test_integers_are_refused(takers, taker):
    with pytest.raises(ValueError, match=r"RGB in 0–1.*got torch.uint8; divide levels by 255"):
        takers[taker](torch.randint(256, (1, 3, 24, 24), dtype=torch.uint8))


NEAR = {
    "minus-one-to-one": lambda: 2 * torch.rand(1, 3, 24, 24) - 1,
    "normalised": lambda: (torch.rand(1, 3, 24, 24) - 0.45) / 0.225,
    "bright": lambda: 4 * torch.rand(1, 3, 24, 24),
}


@pytest.mark.parametrize("images", NEAR)
@pytest.mark.parametrize("taker", TAKERS)
def test_what_could_be_meant_is_warned_of_once(takers, taker, images):
    x = NEAR[images]()
    with pytest.warns(UserWarning, match=r"should be RGB in 0–1, got values from") as caught:
        takers[taker](x)
        takers[taker](x)
    (warning,) = caught
    assert warning.filename == __file__


def test_a_networks_output_may_leave_the_range(takers):
    x = (255 * torch.rand(1, 3, 24, 24)).requires_grad_()
    for taker in ("TransformNet", "VGG16Features", "output"):
        image_range._warned = False
        with pytest.warns(UserWarning, match="should be RGB"):
            takers[taker](x)


@pytest.mark.parametrize("taker", TAKERS)
def test_pictures_give_no_warning(takers, taker):
    images = torch.rand(1, 3, 24, 24) * 1.4 - 0.2  # what resampling and unclamped networks make of 0–1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        takers[taker](images)
        takers[taker](torch.zeros(1, 3, 24, 24))


def test_nothing_is_checked_where_operations_are_recorded(takers):
    net, x = takers["TransformNet"], 255 * torch.rand(2, 3, 24, 24)
    torch.compiler.reset()
    with torch.no_grad():
        torch.compile(net, fullgraph=True, backend="aot_eager")(x)
        torch.func.vmap(lambda image: net(image[None])[0])(x)
        torch.export.export(net, (x,))
