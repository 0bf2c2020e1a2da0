"""accelerate(net): the same training as the network's own, shared state, and what must be left alone."""

from __future__ import annotations

import copy
import pickle
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import error, no_worse
from torch import nn
from two_processes import in_two_processes

from fastperc import accelerate, backends, ops

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from gallery import SIZES, networks

NETWORKS = networks(0.5)


class Small(nn.Module):
    """What most tests need: a norm, a skip, one module called twice, a dropout, and both styles."""

    def __init__(self, channels=32):
        super().__init__()
        self.head = nn.Conv2d(3, channels, 3, padding=1)
        self.twice = nn.Conv2d(channels, channels, 3, padding=1, padding_mode="reflect")
        self.norm = nn.BatchNorm2d(channels)
        self.slopes = nn.PReLU(channels)
        self.drop = nn.Dropout(0.3)
        self.tail = nn.Sequential(nn.Conv2d(channels, 3, 1), nn.LeakyReLU(0.2, inplace=True))

    def forward(self, x, scale=1.0, *, skip=True):
        y = F.relu(self.head(x))
        z = self.slopes(self.norm(self.twice(y)))
        z = self.twice(z) * 0.5 + y if skip else z
        z = self.drop(z)
        return self.tail(z) * scale


def outcome(net, x, dtype=torch.float32, seed=1, autocast=False):
    """The output, the gradients to the input and the parameters, and the buffers.

    The input is in channels-last memory: in another order of elements a dropout would drop others.
    """
    x = x.to(dtype).clone(memory_format=torch.channels_last).requires_grad_()
    net.zero_grad()
    torch.manual_seed(seed)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = net(x)
    incoming = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    y.backward(incoming.to(y.dtype))
    gradients = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    return y.detach(), [x.grad, *gradients], [b.clone() for b in net.buffers() if b.is_floating_point()]


def near(ours, stock):
    """Asserts that two outcomes in float32 are the same but for rounding. A bias before a norm has no gradient."""
    assert error(ours[0], stock[0]) < 1e-5
    scale = max(one.norm() for one in stock[1])
    for mine, theirs in zip(ours[1], stock[1], strict=True):
        assert error(mine, theirs) < 1e-4 or (mine - theirs).norm() < 1e-5 * scale
    assert all(error(mine, theirs) < 1e-5 for mine, theirs in zip(ours[2], stock[2], strict=True))


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_of_the_gallery(name, monkeypatch):
    monkeypatch.setattr(sys.modules[ops.norm_relu.__module__], "FEWEST_FUSED_ELEMENTS", 0)
    net = NETWORKS[name]()
    for module in net.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.InstanceNorm2d)):
            module.eps = 1e-2  # of maps as small as these, variances are near 0
    x = torch.rand(2, 3, *SIZES[name].small)
    exact = outcome(copy.deepcopy(net).double(), x, torch.float64)
    stock = outcome(copy.deepcopy(net), x)
    net = accelerate(net)
    ours = outcome(net, x)
    no_worse(ours[0], stock[0], exact[0])
    scale = max(one.norm() for one in exact[1])
    for mine, theirs, wanted in zip(ours[1], stock[1], exact[1], strict=True):
        own, peer = ((one.double() - wanted).norm() / scale for one in (mine, theirs))
        switched = 3e-2 * wanted.norm() / scale  # of the gradient: a few elements whose ReLU rounding has switched
        assert own <= 1.5 * peer + 1e-6 or own <= switched
    for mine, theirs, wanted in zip(ours[2], stock[2], exact[2], strict=True):
        no_worse(mine, theirs, wanted)
    assert list(net.state_dict()) == list(NETWORKS[name]().state_dict())


@pytest.mark.parametrize("batch", [1, 3])
def test_train_and_eval_modes(batch):
    stock = Small()
    net = accelerate(copy.deepcopy(stock))
    x = torch.rand(batch, 3, 17, 21)
    for mode in (True, False, True):
        assert net.train(mode) is net and stock.train(mode)
        assert net.training == net.original.training == net.norm.training == mode
        near(outcome(net, x), outcome(stock, x))
    net.original.eval()
    assert not net.training
    net.norm.train()  # one part alone
    stock.eval().norm.train()
    near(outcome(net, x), outcome(stock, x))


def test_it_fuses():
    net, x = accelerate(Small()), torch.rand(2, 3, 67, 71)
    with backends.recorded() as choices:
        net(x)
    run = [(choice.operation, choice.implementation) for choice in choices]
    assert run.count(("conv3x3", "winograd")) == 2 and ("norm_relu", "native") in run


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 16, 1, 1), (2, 48, 9, 11)])
def test_1x1_convolutions(shape, bias):
    """They run as matrix products: the same bits each time, gradients of gradients, and an activation in place."""
    torch.manual_seed(3)
    stock = nn.Sequential(nn.Conv2d(shape[1], 32, 1, bias=bias), nn.ReLU(True), nn.Conv2d(32, 16, 1), nn.Softplus())
    net, x = accelerate(copy.deepcopy(stock)), torch.randn(shape)
    exact = outcome(copy.deepcopy(stock).double(), x, torch.float64)
    outcomes = outcome(net, x), outcome(net, x), outcome(stock, x), exact
    for mine, same, theirs, wanted in zip(*([y, *gradients] for y, gradients, _ in outcomes)):
        assert torch.equal(mine, same)
        no_worse(mine, theirs, wanted)

    def penalty(net):
        leaf = x.clone(memory_format=torch.channels_last).requires_grad_()
        (gradient,) = torch.autograd.grad(net(leaf).sum(), leaf, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), next(net.parameters()))[0]

    assert error(penalty(net), penalty(stock)) < 1e-5


def test_arguments():
    stock = Small().eval()
    net, x = accelerate(copy.deepcopy(stock)), torch.rand(1, 3, 9, 8)
    near((net(x, 0.5), [x], []), (stock(x, 0.5), [x], []))
    near((net(x, skip=False), [x], []), (stock(x, skip=False), [x], []))
    scale = torch.rand(1)
    near((net(x, scale=scale), [x], []), (stock(x, scale=scale), [x], []))
    with pytest.raises(TypeError):
        net(x, unknown=1)


def test_state_is_shared():
    net = Small()
    fast = accelerate(net)
    assert accelerate(fast) is fast and fast.original is net
    assert list(fast.state_dict()) == list(net.state_dict())
    assert [*map(id, fast.parameters())] == [*map(id, net.parameters())] and [*fast.buffers()]
    other = Small()
    fast.load_state_dict(other.state_dict())
    assert torch.equal(net.twice.weight, other.twice.weight)
    fast.double()
    assert net.twice.weight.dtype == torch.float64 and fast(torch.rand(1, 3, 8, 8).double()).dtype == torch.float64
    outer = nn.Sequential(accelerate(Small()))
    outer.load_state_dict({f"0.{name}": value for name, value in other.state_dict().items()})
    assert torch.equal(outer[0].original.twice.weight, other.twice.weight)
    assert [name for name, _ in outer.named_parameters()] == [f"0.{name}" for name, _ in other.named_parameters()]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies(copied):
    net = accelerate(Small())
    x = torch.rand(2, 3, 12, 14)
    net(x)
    other = copied(net)
    assert other.original is not net.original and other._modules is other.original._modules
    assert next(other.parameters()) is next(other.original.parameters())
    near(outcome(other, x), outcome(net, x))
    other.eval()
    assert net.training and not other.original.training


def test_hooks_are_called():
    stock, calls = Small(), []
    net = accelerate(copy.deepcopy(stock))
    x = torch.rand(2, 3, 12, 14)
    for one in (net, stock):
        one(x)
        one.twice.register_forward_hook(lambda module, inputs, output: calls.append(1) or 2 * output)
    near(outcome(net, x), outcome(stock, x))
    assert len(calls) == 4
    for one in (net.original, stock):
        one.register_forward_pre_hook(lambda module, inputs: calls.append(2))
    near(outcome(net, x), outcome(stock, x))
    assert calls.count(2) == 2


@pytest.mark.parametrize("change", ["parametrized", "pruned", "replaced", "subclass", "parameter"])
def test_layers_that_are_not_plain(change):
    class Doubled(nn.Conv2d):
        def _conv_forward(self, input, weight, bias):
            return super()._conv_forward(input, 2 * weight, bias)

    def changed(net):
        torch.manual_seed(5)
        if change == "parametrized":
            torch.nn.utils.parametrizations.weight_norm(net.twice)
        elif change == "pruned":
            torch.nn.utils.prune.random_unstructured(net.twice, "weight", 0.5)
        elif change == "replaced":
            net.twice = nn.Conv2d(32, 32, 5, padding=2)
        elif change == "subclass":
            net.twice = Doubled(32, 32, 3, padding=1)
        elif change == "parameter":
            net.twice.weight = nn.Parameter(torch.randn(32, 32, 3, 3))

    import torch.nn.utils.prune

    x, stock = torch.rand(2, 3, 12, 14), Small()
    early, late = copy.deepcopy(stock), accelerate(copy.deepcopy(stock))
    late(x)
    changed(stock)
    changed(early)
    changed(late.original)
    late.original.norm.load_state_dict(stock.norm.state_dict())
    wanted = outcome(stock, x)
    near(outcome(accelerate(early), x), wanted)
    near((*outcome(late, x)[:2], wanted[2]), wanted)


def test_what_cannot_be_traced():
    class Branches(nn.Module):
        def forward(self, x):
            if x.sum() > 0:
                return x
            return -x

    with pytest.raises(
        TypeError, match=r"test_accelerate.py, line \d+: `if x.sum\(\) > 0:`.*Rewrite that line, or use"
    ):
        accelerate(Branches())


def test_memory_formats():
    net = accelerate(Small())
    x = torch.rand(2, 3, 12, 14)
    assert net(x).is_contiguous()
    assert net(x.contiguous(memory_format=torch.channels_last)).is_contiguous(memory_format=torch.channels_last)


def test_a_changed_input_in_place():
    """The sum is read after its first operand has changed."""

    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(32, 32, 3, padding=1)

        def forward(self, x):
            x = x * 1
            y = self.conv(x)
            z = x.relu_()
            return F.relu(y) + z + x

    stock, x = InPlace(), torch.randn(1, 32, 8, 9)
    with torch.no_grad():
        assert error(accelerate(copy.deepcopy(stock))(x), stock(x)) < 1e-6


def test_autocast():
    stock = Small()
    stock.drop.eval()
    net, x = accelerate(copy.deepcopy(stock)), torch.rand(2, 3, 24, 22)
    exact = outcome(copy.deepcopy(stock).double(), x, torch.float64)
    peer, ours = outcome(stock, x, autocast=True), outcome(net, x, autocast=True)
    assert ours[0].dtype == peer[0].dtype == torch.bfloat16
    no_worse(ours[0], peer[0], exact[0], 4e-3)
    for mine, theirs, wanted in zip(ours[1], peer[1], exact[1]):
        assert (mine - wanted).norm() <= 1.5 * (theirs - wanted).norm() + 4e-3 * max(g.norm() for g in exact[1])


def test_under_no_grad_and_compile():
    stock = Small().eval()
    net, x = accelerate(copy.deepcopy(stock)), torch.rand(1, 3, 9, 11)
    with torch.no_grad():
        assert error(net(x), stock(x)) < 1e-5
    exported = torch.export.export(net, (x,)).module()
    assert error(exported(x), stock(x)) < 1e-5


def distributed(rank):
    torch.manual_seed(0)
    stock = Small().eval()
    stock.norm.train()
    net = nn.parallel.DistributedDataParallel(accelerate(copy.deepcopy(stock)))
    torch.manual_seed(1)
    x = torch.rand(2, 3, 12, 10)
    net(x[rank : rank + 1]).square().mean().backward()
    stock(x[rank : rank + 1]).square().mean().backward()
    return [p.grad for p in net.parameters()], [p.grad for p in stock.parameters()], list(net.module.state_dict())


def test_two_processes(tmp_path):
    (first, one, keys), (second, other, _) = in_two_processes(distributed, tmp_path)
    assert keys == list(Small().state_dict())
    for mine, same, a, b in zip(first, second, one, other):
        assert torch.equal(mine, same)
        assert (mine - (a + b) / 2).norm() < 1e-5 * max(p.norm() for p in one)


class ByValue(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(32, 32, 3, padding=1)

    def forward(self, x):
        return self.conv(x) if x.mean() > 0 else x


def test_a_module_that_cannot_be_traced_is_left_as_it_is():
    net = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), ByValue(), nn.Conv2d(32, 3, 3, padding=1))
    x = torch.rand(2, 3, 9, 11)
    no_worse(accelerate(net)(x), net(x), copy.deepcopy(net).double()(x.double()))
