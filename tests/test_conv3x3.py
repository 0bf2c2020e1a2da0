"""3×3 convolutions by Winograd's algorithm against float64: outputs and gradients, in networks and in the loss."""

from __future__ import annotations

import copy
from itertools import pairwise
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from cases import LAYER_ERROR_4X4, NETWORK_ERROR_4X4, error, no_worse
from torch import nn
from torch.nn.utils import parametrizations

import fastperc
from fastperc import _native, backends, freeze, ops, use_backend
from fastperc.modules import Conv3x3, ConvBNReLU, ResidualBlock, SubpixelConvBNReLU
from fastperc.ops.conv3x3 import winograd
from fastperc.ops.vgg_chain import convolve_relu, pack
from fastperc.types import Epilogue, FrozenConv, Tap
from fastperc.weights import STYLES, SUPER_RESOLUTION

# batch, in, out, height, width: single, thin, odd, and large enough for several blocks of tiles and of their sums
SHAPES = [
    (1, 32, 32, 1, 1),
    (1, 32, 64, 2, 3),
    (2, 64, 32, 7, 5),
    (3, 96, 64, 1, 9),
    (2, 64, 96, 9, 2),
    (1, 160, 32, 12, 13),
    (2, 32, 32, 67, 71),
]
PADDINGS = [0, 1, 2]


def maps(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)


def parameters(i, o):
    return torch.randn(o, i, 3, 3) / (9 * i) ** 0.5, torch.randn(o)


def run(backend, x, weight, bias, padding, dtype=torch.float32):
    """The output, and the gradients to input, weight and bias."""
    leaves = [one.to(dtype).detach().requires_grad_() for one in (x, weight, bias)]
    with use_backend(backend):
        y = ops.conv3x3(*leaves, padding)
        incoming = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        return [y, *torch.autograd.grad(y, leaves, incoming)]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("shape", "padding"),
    [(shape, padding) for shape in SHAPES for padding in PADDINGS if min(shape[3:]) + 2 * padding >= 3],
    ids=lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else f"padding-{value}",
)
def test_matches_the_formula(shape, padding):
    n, i, o, h, w = shape
    x, (weight, bias) = maps(n, i, h, w), parameters(i, o)
    exact = run("reference", x, weight, bias, padding, torch.float64)
    stock = run("reference", x, weight, bias, padding)
    ours, again = run("native", x, weight, bias, padding), run("native", x, weight, bias, padding)
    assert ours[0].is_contiguous(memory_format=torch.channels_last)
    for mine, theirs, wanted, same in zip(ours, stock, exact, again):
        assert mine.shape == wanted.shape and mine.isfinite().all() and torch.equal(mine, same)
        no_worse(mine, theirs, wanted)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_weights_may_lie_in_any_order(layout):
    x, (weight, bias) = maps(1, 32, 12, 13), parameters(32, 64)
    expected = run("native", x, weight, bias, 1)
    weight = weight.contiguous(memory_format=layout)
    found = run("native", x, weight, bias, 1)
    assert all(torch.equal(a, b) for a, b in zip(found, expected))
    strided = torch.stack([weight, weight], dim=-1)[..., 0]
    assert all(torch.equal(a, b) for a, b in zip(run("native", x, strided, bias, 1), expected))


@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "weight and bias", "none"])
def test_only_the_gradients_that_are_wanted(wanted):
    x, (weight, bias) = maps(1, 32, 12, 13), parameters(32, 64)
    everything = dict(zip(("x", "weight", "bias"), run("native", x, weight, bias, 1)[1:]))
    leaves = {
        name: one.clone().requires_grad_(name in wanted.split())
        for name, one in {"x": x, "weight": weight, "bias": bias}.items()
    }
    with use_backend("native"):
        y = ops.conv3x3(*leaves.values(), 1)
    assert y.requires_grad == (wanted != "none")
    if y.requires_grad:
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)))
    for name, leaf in leaves.items():
        if leaf.requires_grad:
            assert error(leaf.grad, everything[name]) < 1e-6
        else:
            assert leaf.grad is None


def test_without_a_bias():
    x, (weight, _) = maps(2, 32, 12, 13), parameters(32, 32)
    with use_backend("native"):
        y = ops.conv3x3(x, weight.requires_grad_())
    y.sum().backward()
    assert error(y, F.conv2d(x.double(), weight.double(), padding=1)) < 1e-6
    exact = weight.detach().double().requires_grad_()
    F.conv2d(x.double(), exact, padding=1).sum().backward()
    assert error(weight.grad, exact.grad) < 1e-6


@pytest.mark.parametrize("padding", PADDINGS)
def test_gradients_of_gradients(padding):
    x, (weight, bias) = maps(2, 32, 9, 8), parameters(32, 32)

    def penalty(backend):
        leaves = [one.clone().requires_grad_() for one in (x, weight, bias)]
        with use_backend(backend):
            y = ops.conv3x3(*leaves, padding)
            gradients = torch.autograd.grad(y.pow(3).sum(), leaves, create_graph=True)
            return torch.autograd.grad(sum(one.square().sum() for one in gradients), leaves)

    for mine, theirs in zip(penalty("native"), penalty("reference")):
        assert error(mine, theirs) < 1e-5


def test_threads_do_not_change_a_bit():
    x, (weight, bias) = maps(2, 64, 70, 67), parameters(64, 64)
    results, threads = [], torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(run("native", x, weight, bias, 1))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


# By how the threads share them: one block of tiles; panels only; blocks and panels, with unequal shares of both.
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize(
    "shape",
    [(1, 32, 32, 3, 4), (1, 128, 160, 7, 7), (1, 64, 256, 14, 14), (2, 96, 224, 17, 15)],
    ids=lambda shape: "x".join(map(str, shape)),
)
def test_threads_share_panels_and_do_not_change_a_bit(shape, tile):
    n, i, o, h, w = shape
    x, (weight, bias), skip = maps(n, i, h, w), parameters(i, o), maps(n, o, h, w)
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(winograd(x, weight, bias, 1, epilogue=Epilogue(activation=None, skip=skip), tile=tile))
    finally:
        torch.set_num_threads(threads)
    truth = F.conv2d(x.double(), weight.double(), bias.double(), padding=1) + skip
    assert error(results[0], truth) < (LAYER_ERROR_4X4 if tile == 4 else 1e-6)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["x", "weight", "bias"])
def test_what_is_not_finite_reaches_what_it_would(where, value):
    x, (weight, bias) = maps(1, 32, 12, 13), parameters(32, 32)
    if where == "x":
        x[0, 7, 5, 6] = value
    elif where == "weight":
        weight[3, 7, 1, 2] = value
    else:
        bias[3] = value
    stock, ours = run("reference", x, weight, bias, 1), run("native", x, weight, bias, 1)
    for theirs, mine in zip(stock, ours):
        assert not mine[~theirs.isfinite()].isfinite().any()
    with use_backend("reference"):
        clean = ops.conv3x3(x, weight, bias).relu()
    conv = pack(FrozenConv(weight, bias, False), torch.float32)
    assert not convolve_relu(x, conv)[clean.isnan()].isfinite().any()


def chosen(call):
    with backends.recorded() as choices:
        call()
    return [choice.implementation for choice in choices if choice.operation == "conv3x3"]


@pytest.mark.parametrize(
    "cause", ["NCHW", "fp64", "bf16", "autocast", "in", "out", "small", "empty", "trace", "padding", "vmap"]
)
def test_the_rest_is_plain_pytorch(cause):
    x, (weight, bias), padding = maps(1, 32, 20, 20), parameters(32, 32), 1
    assert chosen(lambda: ops.conv3x3(x, weight, bias)) == ["winograd"]
    if cause == "NCHW":
        x = x.contiguous()
    elif cause in ("fp64", "bf16"):
        x, weight, bias = (one.to({"fp64": torch.float64, "bf16": torch.bfloat16}[cause]) for one in (x, weight, bias))
    elif cause == "in":
        x, weight = maps(1, 48, 20, 20), parameters(48, 32)[0]
    elif cause == "out":
        weight, bias = parameters(32, 40)
    elif cause == "small":
        x = maps(1, 32, 10, 10)
    elif cause == "empty":
        x = maps(0, 32, 20, 20)
    elif cause == "padding":
        padding = 3

    def call():
        with torch.autocast("cpu", torch.bfloat16, enabled=cause == "autocast"):
            return ops.conv3x3(x, weight, bias, padding)

    def stock():
        with torch.autocast("cpu", torch.bfloat16, enabled=cause == "autocast"):
            return F.conv2d(x, weight, bias, padding=padding)

    if cause == "trace":
        assert chosen(lambda: torch.jit.trace(lambda x: ops.conv3x3(x, weight, bias), x, check_trace=False)) == [
            "reference"
        ]
    elif cause == "vmap":
        assert chosen(lambda: torch.vmap(lambda one: ops.conv3x3(one, weight, bias))(x[None])) == ["reference"]
    else:
        assert chosen(call) == ["reference"]
        assert torch.equal(call(), stock())
        leaf = weight.clone().requires_grad_()
        weight = leaf
        assert torch.autograd.grad(call().float().sum(), leaf)[0].shape == leaf.shape


@pytest.mark.parametrize("shape", [(32, 40, 3, 3), (32, 32, 5, 5)])
def test_what_pytorch_refuses_is_refused(shape):
    x, weight = maps(1, 32, 4, 40), torch.randn(shape)
    with pytest.raises(RuntimeError) as ours:
        ops.conv3x3(x, weight, padding=0)
    with pytest.raises(RuntimeError) as stock:
        F.conv2d(x, weight)
    assert str(ours.value) == str(stock.value)


def test_a_frozen_weight_is_transformed_once_and_a_changed_one_again(monkeypatch):
    x, (weight, _) = maps(1, 32, 20, 20), parameters(32, 32)
    transform = Mock(wraps=_native.winograd_weights)
    monkeypatch.setattr(_native, "winograd_weights", transform)
    ops.conv3x3(x, weight)
    ops.conv3x3(x, weight)
    assert transform.call_count == 1
    weight.mul_(2)
    assert error(ops.conv3x3(x, weight), F.conv2d(x.double(), weight.double(), padding=1)) < 1e-6
    assert transform.call_count == 2


MODULES = {
    "conv": lambda: ConvBNReLU(32, 64, 3, padding=1),
    "residual": lambda: ResidualBlock(32),
    "residual-valid": lambda: ResidualBlock(32, 0),
    "residual-reflect": lambda: ResidualBlock(32, padding_mode="reflect"),
    "nearest": lambda: SubpixelConvBNReLU(32, 32, upsample="nearest"),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_train_as_their_stock_selves(name):
    module = MODULES[name]().to(memory_format=torch.channels_last)
    x, results = maps(2, 32, 17, 14), []
    for backend in ("reference", None):
        net, leaf = copy.deepcopy(module), x.clone().requires_grad_()
        with use_backend(backend) if backend else backends.recorded() as choices:
            y = net(leaf)
            y.square().sum().backward()
        results.append([y, leaf.grad, *(p.grad for p in net.parameters())])
    ours = [choice.implementation for choice in choices if choice.operation == "conv3x3"]
    assert ours == ["winograd"] * sum(isinstance(layer, Conv3x3) for layer in module.modules()) != []
    scale = max(one.norm() for one in results[0])
    for stock, mine in zip(*results):  # a bias before a norm has no gradient but rounding
        assert error(mine, stock) < 1e-4 or (mine - stock).norm() < 1e-5 * scale


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_the_module_is_a_conv2d(mode):
    """Its keys, hooks, parametrizations and dtypes, and what PyTorch makes of it."""
    stock = nn.Conv2d(32, 64, 3, padding=1, padding_mode=mode)
    ours, x = Conv3x3(32, 64, 1, padding_mode=mode), maps(1, 32, 20, 18)
    ours.load_state_dict(stock.state_dict())
    assert ours.extra_repr() == stock.extra_repr()
    assert chosen(lambda: ours(x)) == ["reference" if mode == "circular" else "winograd"]  # its padding leaves NHWC
    assert error(ours(x), stock(x)) < 1e-6
    assert torch.equal(copy.deepcopy(ours)(x), ours(x))
    assert error(ours.double()(x.double()), stock.double()(x.double())) < 1e-14
    ours, stock = ours.float(), stock.float()
    traced = torch.jit.trace(ours, x)
    assert torch.equal(traced(x), stock(x))
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), stock(x))
    exported = torch.export.export(ours, (x,)).module()
    assert torch.equal(exported(x), stock(x))
    seen = []
    ours.register_forward_hook(lambda module, inputs, output: seen.append(output))
    parametrizations.weight_norm(ours)
    y = ours(x)
    assert torch.equal(seen[0], y) and error(y, stock(x)) < 1e-5
    y.sum().backward()
    assert ours.parametrizations.weight.original1.grad.isfinite().all()


def test_the_loss_network_uses_it():
    convs = [
        FrozenConv(torch.randn(o, i, 3, 3) / (4.5 * i) ** 0.5, torch.randn(o), False) for i, o in pairwise((3, 32, 64))
    ]
    image, results = torch.rand(1, 3, 22, 23), []
    for backend, dtype in (("reference", torch.float64), ("reference", torch.float32), ("native", torch.float32)):
        leaf = image.to(dtype).requires_grad_()
        network = [FrozenConv(conv.weight.to(dtype), conv.bias.to(dtype), False) for conv in convs]
        with use_backend(backend), backends.recorded() as choices:
            features = ops.vgg_features(leaf, network, [Tap(1)])[Tap(1)]
            results.append([features, *torch.autograd.grad(features.square().sum(), leaf)])
        used = [choice.implementation for choice in choices if choice.operation == "vgg_conv"]
        # The first layer's input has three channels: "library" forward and, last, backward.
        assert used == (["library", "winograd", "winograd", "library"] if backend == "native" else [])
    for exact, stock, ours in zip(*results):
        no_worse(ours, stock, exact)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(
    ("shape", "padding"),
    [(shape, padding) for shape in SHAPES for padding in PADDINGS if min(shape[3:]) + 2 * padding >= 3],
    ids=lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else f"padding-{value}",
)
def test_tiles_of_4x4_match_the_formula(shape, padding, relu):
    n, i, o, h, w = shape
    x, (weight, bias) = maps(n, i, h, w), parameters(i, o)
    exact = F.conv2d(x.double(), weight.double(), bias.double(), padding=padding)
    skip = maps(*exact.shape)
    exact = (exact + skip).relu() if relu else exact + skip
    epilogue = Epilogue(None, None, skip)
    y, again = (winograd(x, weight, bias, padding, relu, epilogue=epilogue, tile=4) for _ in range(2))
    assert torch.equal(y, again) and error(y, exact) < LAYER_ERROR_4X4


@pytest.mark.parametrize("name", [name for name in (*STYLES, *SUPER_RESOLUTION) if not name.endswith("srcnn")])
def test_tiles_of_4x4_in_networks_that_ship(name):
    net = fastperc.load(name).eval()
    engine, x = freeze(net), torch.rand(1, 3, 128, 132) if name in STYLES else torch.rand(1, 3, 32, 36)
    assert "winograd_4x4" in {choice.implementation for choice in chosen_by(engine, x)}
    with torch.no_grad():
        y, exact = engine(x), net.double()(x.double())
    assert error(y, exact) < NETWORK_ERROR_4X4 and (y - exact).abs().max() < 0.01 / 255


def chosen_by(engine, x):
    with backends.recorded() as choices:
        engine(x)
    return choices
