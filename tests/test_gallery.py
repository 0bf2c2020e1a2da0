"""The networks of the gallery: their sizes, their published numbers of parameters, and their styles."""

from __future__ import annotations

import pytest
import torch
from gallery import CLASSIFIERS, SIZES, networks
from torch import nn

PARAMETERS = {  # as published, in millions
    "transformer_net": 1.679,
    "cyclegan": 11.378,
    "unet": 31.038,
    "unet_bilinear": 17.263,
    "edsr": 1.518,
    "resnet18": 11.690,
    "resnet50": 25.557,
    "mobilenet_v2": 3.505,
}
KEYS = {  # a few under which people's files hold their weights
    "transformer_net": ("conv1.conv2d.weight", "in1.weight", "res5.in2.bias", "deconv3.conv2d.bias"),
    "cyclegan": ("model.1.weight", "model.10.conv_block.1.weight", "model.26.bias"),
    "edsr": ("sub_mean.bias", "head.0.weight", "body.15.body.2.weight", "tail.0.2.weight", "tail.1.weight"),
    "rrdb": ("conv_first.weight", "body.2.rdb3.conv5.weight", "conv_up1.bias", "conv_hr.weight", "conv_last.bias"),
    "resnet18": ("layer2.0.downsample.1.running_var", "fc.weight"),
    "resnet50": ("bn1.num_batches_tracked", "layer4.2.conv3.weight"),
    "mobilenet_v2": ("features.0.0.weight", "features.1.conv.1.weight", "features.18.1.bias", "classifier.1.bias"),
}
EACH = pytest.mark.parametrize("name", networks())


def test_all_have_sizes():
    assert SIZES.keys() == networks().keys()


@EACH
def test_runs(name):
    network = networks(0.25)[name]().eval()
    x = torch.rand(2, 3, *SIZES[name].small)
    with torch.no_grad():
        y = network(x)
        assert torch.equal(networks(0.25)[name]().eval()(x), y), "the weights differ from call to call"
    assert y.isfinite().all() and y.std() > 1e-3
    assert y.dim() == (2 if name in CLASSIFIERS else 4) and len(y) == 2


@EACH
def test_running_statistics_are_not_the_initial_ones(name):
    for norm in networks(0.25)[name]().modules():
        if isinstance(norm, nn.BatchNorm2d):
            assert norm.running_mean.abs().max() > 1e-3 and (norm.running_var - 1).abs().max() > 1e-3
            assert norm.momentum == 0.1


@pytest.mark.parametrize("name", PARAMETERS)
def test_number_of_parameters(name):
    with torch.device("meta"):
        network = networks()[name].args[0]()  # without weights
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(PARAMETERS[name], abs=1e-3)


@pytest.mark.parametrize("name", KEYS)
def test_names_of_parameters(name):
    assert networks(0.25)[name]().state_dict().keys() >= set(KEYS[name])
