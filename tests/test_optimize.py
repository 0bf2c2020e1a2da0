"""Optimising the pixels of a picture under the training objective."""

from __future__ import annotations

import warnings

import pytest
import torch

from fastperc import PerceptualLoss, VGG16Features
from fastperc.photos.optimize import optimize


@pytest.fixture(scope="module")
def loss(vgg_file):
    style = torch.rand(1, 3, 24, 24, generator=torch.Generator().manual_seed(3))
    return PerceptualLoss(VGG16Features(vgg_file, ["relu1_2", "relu2_2"]), style, convention="relative")


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize(("optimizer", "iterations"), [("lbfgs", 15), ("adam", 30)])
def test_the_loss_falls_and_pixels_stay_in_range(loss, optimizer, iterations, memory_format):
    content = torch.rand(1, 3, 24, 28).contiguous(memory_format=memory_format)
    before = loss(content, content).total.item()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = optimize(content, loss, iterations, optimizer)
    assert loss(image, content).total.item() < 0.7 * before
    assert image.shape == content.shape and not image.requires_grad
    assert image.min() >= 0 and image.max() <= 1
    assert torch.equal(image, optimize(content, loss, iterations, optimizer))


def test_a_loss_that_is_not_finite_is_an_error(loss):
    content = torch.full((1, 3, 16, 16), float("nan"))
    with pytest.raises(FloatingPointError, match="the loss is nan"):
        optimize(content, loss, 2)


def test_unknown_optimizer(loss):
    with pytest.raises(ValueError, match="sgd"):
        optimize(torch.rand(1, 3, 16, 16), loss, 1, "sgd")


def test_levels_instead_of_0_to_1_are_refused(loss):
    with pytest.raises(ValueError, match="must be RGB in 0–1, but it has values up to 255; divide levels by 255"):
        optimize(torch.full((1, 3, 16, 16), 255.0), loss, 1)
    optimize(torch.full((1, 3, 16, 16), 1.02), loss, 1)
