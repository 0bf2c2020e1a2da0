"""The style networks against an independent float64 implementation, and against the paper's Table 1."""

from __future__ import annotations

import copy
import pickle

import oracle
import pytest
import torch
from cases import error
from variants import VARIANTS, activations, build_variant, variant_id

from fastperc import ResidualBlock, SubpixelConvBNReLU, TransformNet, use_backend
from fastperc.presets import PRESETS


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("variant", VARIANTS, ids=variant_id)
def test_matches_the_oracle(variant, training):
    _, residual, _ = variant
    net = build_variant(*variant).train(training)
    # The state before the forward: in training mode that updates the running statistics.
    before = copy.deepcopy(net)
    weights = oracle.Weights(before.state_dict(), net.config["norm"])
    x = torch.rand(2, 3, 36, 29)
    upstream = torch.randn(2, 3, 36, 29)

    x32 = x.clone().requires_grad_()
    y = net(x32)
    y.backward(upstream)
    x64 = x.double().requires_grad_()
    expected = oracle.transform_net(
        x64, weights, net.output, residual, training, net.config["upsample"], net.config["padding"]
    )
    expected.backward(upstream.double())

    assert y.shape == x.shape
    assert error(y, expected) < 1e-5
    stock = x.clone().requires_grad_()
    with use_backend("reference"):  # without AVX2 rounding alone makes more than 5e-4
        stock_net = copy.deepcopy(before)
        stock_net(stock).backward(upstream)
    assert error(x32.grad, x64.grad) < max(5e-4, 1.5 * error(stock.grad, x64.grad))
    of_stock = {name: parameter.grad for name, parameter in stock_net.named_parameters()}
    largest = max(w.grad.norm().item() for w in weights.tensors.values() if w.grad is not None)
    for name, parameter in net.named_parameters():
        gradient = weights.tensors[name].grad
        # A bias in front of a norm has no gradient but for rounding: there, measured against the largest gradient.
        if gradient.norm() < 1e-9 * largest:
            assert parameter.grad.norm() < 1e-5 * largest, name
        else:
            assert error(parameter.grad, gradient) < max(5e-4, 1.5 * error(of_stock[name], gradient)), name


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("size", [(16, 16), (17, 23), (31, 97), (40, 18), (101, 64)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_output_size_is_input_size(preset, size):
    net = TransformNet(preset, width=4).eval()
    with torch.inference_mode():
        assert net(torch.rand(2, 3, *size)).shape == (2, 3, *size)


@pytest.mark.parametrize(
    ("preset", "count"), [("paper", 1_679_235), ("eccv16", 1_679_235), ("instance", 424_899), ("examples", 1_679_235)]
)
def test_parameter_counts(preset, count):
    assert sum(parameter.numel() for parameter in TransformNet(preset).parameters()) == count


def test_activations_of_table_1():
    assert activations(TransformNet("paper"), torch.rand(1, 3, 256, 256)) == [
        *[(32, 256, 256), (64, 128, 128), (128, 64, 64)],
        *[(128, 64, 64)] * 5,
        *[(64, 128, 128), (32, 256, 256), (3, 256, 256)],
    ]


def test_activations_of_eccv16():
    assert activations(TransformNet("eccv16"), torch.rand(1, 3, 256, 256)) == [
        *[(32, 336, 336), (64, 168, 168), (128, 84, 84)],
        *[(128, side, side) for side in (80, 76, 72, 68, 64)],
        *[(64, 128, 128), (32, 256, 256), (3, 256, 256)],
    ]


def test_state_dict_is_that_of_a_stock_network():
    names = list(TransformNet("paper").state_dict())
    assert names[:4] == ["stem.conv.weight", "stem.conv.bias", "stem.norm.weight", "stem.norm.bias"]
    assert names[-2:] == ["head.weight", "head.bias"]
    assert "blocks.4.conv2.weight" in names and "up.1.norm.running_var" in names


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_precision_and_autocast(dtype):
    net = TransformNet("paper", width=8).eval()
    x = torch.rand(1, 3, 32, 32)
    with torch.inference_mode():
        expected = net(x)
        assert error(copy.deepcopy(net).to(dtype)(x.to(dtype)), expected) < 3e-2
        with torch.autocast("cpu", torch.bfloat16):
            assert error(net(x), expected) < 3e-2


def test_channels_last_gives_the_same():
    net = TransformNet("instance", width=8).eval()
    x = torch.rand(1, 3, 24, 28)
    with torch.inference_mode():
        expected = net(x)
        last = net.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    assert error(last, expected) < 1e-5


def test_compiles_exports_copies_and_pickles():
    torch.compiler.reset()
    net = TransformNet("instance", width=4).eval()
    x = torch.rand(1, 3, 20, 24)
    with torch.no_grad():
        expected = net(x)
        assert error(torch.compile(net, fullgraph=True, backend="aot_eager")(x), expected) < 1e-6
        assert error(torch.export.export(net, (x,)).module()(x), expected) < 1e-6
        for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            assert torch.equal(twin(x), expected)
            assert twin.config == net.config


def test_config_rebuilds_the_network():
    net = TransformNet("eccv16", "he", 12, upsample="nearest")
    assert TransformNet(**net.config).config == net.config and "output" not in net.config
    assert TransformNet(**TransformNet(output="caffe").config).output == "caffe"
    assert [p.shape for p in TransformNet(**net.config).parameters()] == [p.shape for p in net.parameters()]


def test_initialised_as_the_authors_did():
    net = TransformNet("paper")
    conv, up = net.blocks[0].conv1, net.up[0].conv
    for layer, fan_in in ((conv, 128 * 9), (up, 128 * 9)):
        assert 0.95 < layer.weight.abs().max() * fan_in**0.5 <= 1
        assert layer.bias.abs().max() * fan_in**0.5 <= 1
    gamma = torch.cat([block.norm1.weight for block in net.blocks])
    assert gamma.min() >= 0 and gamma.max() <= 1 and abs(gamma.mean() - 0.5) < 0.05


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (dict(preset="papers"), "papers"),
        (dict(residual="maybe"), "maybe"),
        (dict(norm="layer"), "layer"),
        (dict(padding="mirror"), "mirror"),
        (dict(upsample="bilinear"), "bilinear"),
        (dict(output="plain"), "output must be one of tanh, linear, caffe, got 'plain'"),
        (dict(width=0), "width"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refuses_what_it_does_not_know(arguments, told):
    with pytest.raises(ValueError, match=told):
        TransformNet(**arguments)


@pytest.mark.parametrize("shape", [(1, 1, 32, 32), (3, 32, 32), (1, 3, 15, 32), (1, 3, 32, 0)], ids=str)
def test_refuses_what_is_no_image(shape):
    with pytest.raises(ValueError, match=r"\[N, 3, H, W\].*got"):
        TransformNet("paper", width=4)(torch.rand(shape))


def test_a_block_without_padding_crops_its_skip():
    x = torch.rand(1, 8, 12, 14)
    assert ResidualBlock(8, padding=0)(x).shape == (1, 8, 8, 10)
    with torch.no_grad():
        block = ResidualBlock(8, padding=0).eval()
        block.norm2.weight.zero_()  # silences the convolutions: what is left is the skip
        assert torch.equal(block(x), x[..., 2:-2, 2:-2])


def test_both_ways_up_double_the_size():
    for upsample in ("transposed", "nearest"):
        assert SubpixelConvBNReLU(4, 6, upsample=upsample)(torch.rand(1, 4, 5, 7)).shape == (1, 6, 10, 14)


@pytest.mark.parametrize("preset", ["paper", "instance"])
def test_traces_and_transforms_as_plain_pytorch(preset):
    """What records or transforms operations sees PyTorch's own: torch.jit.trace, torch.func.vmap and grad."""
    net = TransformNet(preset, width=4).to(memory_format=torch.channels_last).eval()
    x = torch.rand(2, 3, 32, 32)
    traced = torch.jit.trace(net, x)
    assert "PythonOp" not in str(traced.inlined_graph) and error(traced(x), net(x)) < 1e-6

    def loss(x):
        return net(x[None]).square().sum()

    each = torch.func.vmap(torch.func.grad(loss))(x)
    leaf = x.clone().requires_grad_()
    net(leaf).square().sum().backward()
    assert error(each, leaf.grad) < 1e-4
