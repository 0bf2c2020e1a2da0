"""The super-resolution networks against an independent float64 implementation, and against the paper's Table 2."""

from __future__ import annotations

import copy

import oracle
import pytest
import torch
import torch.nn.functional as F
from cases import error
from variants import activations

from fastperc import SRCNN, SuperResolutionNet
from fastperc.models import super_resolution


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("upsample", ["transposed", "nearest"])
@pytest.mark.parametrize("scale", [4, 8])
def test_matches_the_oracle(scale, upsample, training):
    for _ in range(50):  # away from where rounding switches a ReLU, which changes gradients
        net = SuperResolutionNet(scale, width=4, upsample=upsample).train(training)
        weights = oracle.Weights(copy.deepcopy(net.state_dict()), "batch")
        x = torch.rand(2, 3, 17, 18)
        expected = oracle.super_resolution_net(x.double(), weights, scale, training, upsample)
        if weights.margin > 5e-7:
            break
    else:
        pytest.fail("no network whose ReLUs are all away from 0")
    y = net(x)
    y.sum().backward()
    expected.sum().backward()
    assert y.shape == (2, 3, 17 * scale, 18 * scale)
    assert error(y, expected) < 1e-5
    for name, parameter in net.named_parameters():
        if not name.endswith(("conv.bias", "conv1.bias", "conv2.bias")):  # before a norm: no gradient but rounding
            assert error(parameter.grad, weights.tensors[name].grad) < 5e-4, name


@pytest.mark.parametrize(("scale", "count"), [(4, 401_859), (8, 438_915)])
@pytest.mark.parametrize("upsample", ["transposed", "nearest"])
def test_parameter_counts(scale, count, upsample):
    assert sum(parameter.numel() for parameter in SuperResolutionNet(scale, upsample=upsample).parameters()) == count


def layers_of_table_2(net, x):
    net.down = torch.nn.Sequential()
    return activations(net, x)


@pytest.mark.parametrize(("scale", "side"), [(4, 72), (8, 36)])
def test_activations_of_table_2(scale, side):
    ups = [(64, side * 2**i, side * 2**i) for i in range(1, scale.bit_length())]
    net = SuperResolutionNet(scale)
    assert layers_of_table_2(net, torch.rand(1, 3, side, side)) == [(64, side, side)] * 5 + ups + [(3, 288, 288)]


@pytest.mark.parametrize("kernel_sizes", [(9, 5, 5), (9, 1, 5)], ids=["9-5-5", "9-1-5"])
def test_srcnn_works_on_luma_alone(kernel_sizes):
    net = SRCNN(4, kernel_sizes)
    x = torch.rand(1, 3, 17, 19)
    bicubic = F.interpolate(x, scale_factor=4, mode="bicubic", antialias=True)
    y = net(x)
    assert y.shape == (1, 3, 68, 76)
    change = y - bicubic
    assert error(change[:, :1].expand_as(change), change) < 1e-5  # the same in R, G and B: chroma untouched

    weights = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64).view(1, 3, 1, 1)
    luma = (bicubic.double() * weights).sum(1, keepdim=True)
    for i, conv in enumerate((net.conv1, net.conv2, net.conv3)):
        luma = F.conv2d(
            luma.clamp_min(0) if i else luma, conv.weight.double(), conv.bias.double(), padding=kernel_sizes[i] // 2
        )
    assert error((y.double() * weights).sum(1, keepdim=True), luma) < 1e-5


def test_srcnn_has_the_published_number_of_weights():
    def count(net):
        return sum(parameter.numel() for name, parameter in net.named_parameters() if name.endswith("weight"))

    assert count(SRCNN()) == 57_184 and count(SRCNN(kernel_sizes=(9, 1, 5))) == 8_032


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("make", [lambda: SuperResolutionNet(4, width=4), SRCNN], ids=["sr", "srcnn"])
def test_half_precision(make, dtype):
    net, x = make().eval(), torch.rand(1, 3, 20, 24)
    with torch.inference_mode():
        expected = net(x)
        half = net.to(dtype)(x.to(dtype))
    assert half.dtype == dtype and error(half, expected) < 3e-2


@pytest.mark.parametrize("scale", [0, 1, 3, 6])
def test_refuses_a_scale_that_is_no_power_of_two(scale):
    with pytest.raises(ValueError, match=str(scale)):
        super_resolution.SuperResolutionNet(scale)


def test_refuses_another_upsampling():
    with pytest.raises(ValueError, match="upsample must be 'transposed' or 'nearest', got 'bilinear'"):
        SuperResolutionNet(upsample="bilinear")


@pytest.mark.parametrize("net", [SuperResolutionNet(4, width=4), SRCNN()], ids=["sr", "srcnn"])
def test_refuses_what_is_no_image(net):
    with pytest.raises(ValueError, match=r"\[N, 3, H, W\]"):
        net(torch.rand(1, 1, 32, 32))
