"""Norms and what follows them, in training, against float64: outputs, gradients and running statistics."""

from __future__ import annotations

import copy
from importlib import import_module

import pytest
import torch
from cases import GPU, dtype_id, error, no_worse
from norm_cases import ACTIVATIONS, DTYPES, ENDS, MORE_NORMS, NORMS, features, norm_of, run
from torch import nn

from fastperc import SuperResolutionNet, TransformNet, backends, ops, use_backend
from fastperc.modules import ConvBNReLU, ResidualBlock, SubpixelConvBNReLU
from fastperc.types import RELU

# batch, channels, height, width; the last large enough for several tasks
SHAPES = [(2, 3, 7, 11), (1, 1, 5, 9), (3, 70, 5, 6), (4, 16, 4, 5), (2, 5, 33, 65), (2, 8, 129, 67)]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_matches_the_formula(shape, dtype, kind, end):
    activation, with_skip = ENDS[end]
    matches(norm_of(kind, shape[1]), shape, dtype, activation, with_skip)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("with_skip", [False, True], ids=["bare", "skip"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", MORE_NORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_every_norm_and_activation(kind, activation, with_skip, dtype):
    if kind == "none" and not with_skip:
        pytest.skip("the activation by itself")
    matches(norm_of(kind, 7), (2, 7, 33, 30), dtype, ACTIVATIONS[activation], with_skip)


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("activation", [None, "relu", "prelu"])
@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", [(2, 3, 7, 11), (3, 70, 5, 6), (4, 64, 128, 128)], ids=str)
def test_on_a_gpu(shape, dtype, kind, activation, layout):
    """What tests/test_cuda_norms.py runs on the CPU."""
    last = None if activation is None else ACTIVATIONS[activation]
    matches(norm_of(kind, shape[1]), shape, dtype, last, activation == "relu", "cuda", layout)


def matches(norm, shape, dtype, activation, with_skip, device="cpu", layout=torch.channels_last):
    """Compares the native passes with float64 and with plain PyTorch, and with themselves."""
    x = features(shape).to(device, dtype).contiguous(memory_format=layout)
    skip = features(shape).to(device, dtype).contiguous(memory_format=layout) if with_skip else None
    exact, exact_statistics = run("reference", norm, x, activation, skip, torch.float64)
    stock, _ = run("reference", norm, x, activation, skip, torch.float32)
    ours, statistics = run("native", norm, x, activation, skip, dtype)
    again, _ = run("native", norm, x, activation, skip, dtype)
    rounding = {torch.float32: 4e-7, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    for mine, theirs, wanted, same in zip(ours, stock, exact, again):
        assert mine.isfinite().all() and torch.equal(mine, same)
        no_worse(mine, theirs, wanted, rounding)
    for mine, wanted in zip(statistics, exact_statistics):
        assert error(mine, wanted) < 1e-6


@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
def test_running_statistics_are_pytorchs(momentum):
    ours, stock = nn.BatchNorm2d(4, momentum=momentum), nn.BatchNorm2d(4, momentum=momentum)
    for _ in range(3):
        x = features((2, 4, 6, 5), offset=30)
        with use_backend("native"):
            ops.norm_relu(x, ours)
        stock(x)
    assert ours.num_batches_tracked == stock.num_batches_tracked == 3
    assert error(ours.running_mean, stock.running_mean) < 1e-6 and error(ours.running_var, stock.running_var) < 1e-6


def test_a_mean_far_from_zero_costs_no_digits():
    """A standard deviation of 1 about 1,000: where sums of squares would have lost it."""
    norm, x = norm_of("batch", 6), torch.randn(2, 6, 40, 30) + 1000
    x = x.contiguous(memory_format=torch.channels_last)
    exact, _ = run("reference", norm, x, RELU, None, torch.float64)
    stock, _ = run("reference", norm, x, RELU, None, torch.float32)
    ours, _ = run("native", norm, x, RELU, None, torch.float32)
    for mine, theirs, wanted in zip(ours, stock, exact):
        no_worse(mine, theirs, wanted)


@pytest.mark.parametrize("with_skip", [False, True], ids=["bare", "skip"])
@pytest.mark.parametrize("activation", ["none", *ACTIVATIONS])
@pytest.mark.parametrize("kind", MORE_NORMS)
def test_gradients_of_gradients(kind, activation, with_skip):
    x = features((2, 3, 4, 5))
    norm, skip = norm_of(kind, 3), x.flip(0) if with_skip else None
    activation = ACTIVATIONS.get(activation)
    slopes = [] if activation is None or activation.slopes is None else [activation.slopes.expand(3).clone()]
    if slopes:
        activation = activation._replace(slopes=slopes[0].requires_grad_())

    def penalty(backend):
        leaf = x.clone().requires_grad_()
        with use_backend(backend):
            y = ops.norm_relu(leaf, norm, activation, None if skip is None else skip * leaf.square().mean())
            (gradient,) = torch.autograd.grad(y.pow(3).sum(), leaf, create_graph=True)
            leaves = [leaf, *slopes, *(() if norm is None else norm.parameters())]
            return torch.autograd.grad(gradient.square().sum(), leaves)

    ours, stock = penalty("native"), penalty("reference")
    scale = max(one.norm() for one in stock)
    assert all((mine - theirs).norm() < 1e-5 * scale for mine, theirs in zip(ours, stock))


def test_threads_do_not_change_a_bit():
    norm, x = norm_of("batch", 8), features((2, 8, 130, 90))
    results, threads = [], torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(run("native", norm, x, RELU, None, torch.float32)[0])
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


def chosen(call):
    with backends.recorded() as choices:
        call()
    return [choice.implementation for choice in choices if choice.operation == "norm_relu"]


@pytest.mark.parametrize(
    "cause", ["eval", "NCHW", "subclass", "hook", "dtype of the skip", "fp64", "small", "small and bare", "few"]
)
def test_the_rest_is_plain_pytorch(cause):
    norm, x, activation, skip = nn.BatchNorm2d(4), features((1, 4, 800, 700)), RELU, None
    if cause == "eval":
        norm.eval()
    elif cause == "NCHW":
        x = x.contiguous()
    elif cause == "subclass":
        norm = nn.SyncBatchNorm.convert_sync_batchnorm(norm).eval()
    elif cause == "hook":
        norm.register_forward_hook(lambda module, inputs, output: 2 * output)
    elif cause == "dtype of the skip":
        activation, skip = None, x.flip(2).double()
    elif cause == "fp64":
        norm, x = norm.double(), x.double()
    elif cause == "small":
        x = features((1, 4, 40, 40))
    elif cause == "small and bare":
        x, activation = features((1, 4, 400, 400)), None
    elif cause == "few":
        norm, x = norm_of("instance", 4), features((4, 4, 3, 5))
    stock = copy.deepcopy(norm)
    assert chosen(lambda: ops.norm_relu(x, norm, activation, skip)) == ["reference"]
    expected = stock(x) if skip is None else stock(x) + skip
    norm = copy.deepcopy(stock)
    assert torch.equal(ops.norm_relu(x, norm, activation, skip), expected.relu() if activation else expected)


def test_an_output_that_changes_in_place_is_refused():
    """As PyTorch refuses it: the gradient of a ReLU after a skip reads the output."""
    x = features((2, 4, 9, 8)).requires_grad_()
    with use_backend("native"):
        y = ops.norm_relu(x, norm_of("batch", 4), RELU, x)
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("kind", NORMS)
def test_one_value_a_channel_is_refused_as_pytorch_does(kind):
    with pytest.raises(ValueError, match=r"more than 1 (value per channel|spatial element)"):
        ops.norm_relu(features((1, 4, 1, 1)), norm_of(kind, 4))


MODULES = {
    "conv": lambda: ConvBNReLU(3, 8, 3, padding=1),
    "conv-instance-bare": lambda: ConvBNReLU(3, 8, 3, stride=2, norm="instance", relu=False),
    "residual": lambda: ResidualBlock(3),
    "residual-valid": lambda: ResidualBlock(3, 0, norm="instance"),
    "he": lambda: ResidualBlock(3, residual="he"),
    "plain": lambda: ResidualBlock(3, residual=False),
    "transposed": lambda: SubpixelConvBNReLU(3, 8),
    "nearest": lambda: SubpixelConvBNReLU(3, 8, upsample="nearest", norm="instance"),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_train_as_their_stock_selves(name, monkeypatch):
    for fewest in ("FEWEST_ELEMENTS", "FEWEST_FUSED_ELEMENTS"):
        monkeypatch.setattr(import_module("fastperc.ops.norm_relu"), fewest, 0)
    module = MODULES[name]().to(memory_format=torch.channels_last)
    x = features((2, 3, 17, 12))
    results = []
    for backend in ("reference", None):
        net = copy.deepcopy(module)
        leaf = x.clone().requires_grad_()
        with use_backend(backend) if backend else backends.recorded() as choices:
            y = net(leaf)
            y.square().sum().backward()
        results.append(
            [
                y,
                leaf.grad,
                *(p.grad for p in net.parameters()),
                *(b for b in net.buffers() if b.dtype.is_floating_point),
            ]
        )
    assert "native" in {choice.implementation for choice in choices}
    scale = max(one.norm() for one in results[0])
    for stock, ours in zip(*results):  # a bias before a norm has no gradient but rounding
        assert error(ours, stock) < 1e-4 or (ours - stock).norm() < 1e-5 * scale


@pytest.mark.parametrize(
    "make", [lambda: TransformNet("instance", width=4), lambda: SuperResolutionNet(4, width=4)], ids=["style", "sr"]
)
def test_checkpointing_and_networks(make):
    """Recomputed under torch.utils.checkpoint, the gradients are those without."""
    net = make().to(memory_format=torch.channels_last)
    x = torch.rand(1, 3, 40, 40)
    gradients = []
    for checkpointed in (False, True):
        net.zero_grad()
        y = torch.utils.checkpoint.checkpoint(net, x, use_reentrant=False) if checkpointed else net(x)
        y.square().sum().backward()
        gradients.append([p.grad.clone() for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
