"""Frozen networks that run again and again: from the third run on, prepared calls of the C++ kernels."""

from __future__ import annotations

import re
import threading

import pytest
import torch
from torch import nn

from fastperc import _native, backends, freeze
from fastperc.ops.common import why_not_cpp
from fastperc.rewriting.replay import Replay

pytestmark = pytest.mark.skipif(why_not_cpp(torch.empty(0)) is not None, reason="there is no compiled module")


class Block(nn.Module):
    """An inverted residual block, as MobileNetV2 has it."""

    def __init__(self, channels: int, activation: nn.Module) -> None:
        super().__init__()
        wide = 4 * channels
        self.expand = nn.Sequential(nn.Conv2d(channels, wide, 1), nn.BatchNorm2d(wide), activation)
        self.depthwise = nn.Sequential(nn.Conv2d(wide, wide, 3, 1, 1, groups=wide), nn.BatchNorm2d(wide), activation)
        self.project = nn.Sequential(nn.Conv2d(wide, channels, 1), nn.BatchNorm2d(channels))

    def forward(self, x):
        return x + self.project(self.depthwise(self.expand(x)))


def network(activation=None):
    torch.manual_seed(0)
    activation = activation or nn.ReLU6()
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, 2, 1), activation, Block(32, activation), Block(32, activation), nn.Conv2d(32, 24, 1)
    ).eval()


def replays(frozen):
    """The layers of the program of the only shape that ``frozen`` has run."""
    (choice,) = frozen._choices.values()
    return [run for run in choice.program._replays if isinstance(run, Replay)]


def prepared(frozen):
    return [run.prepared is not None for run in replays(frozen)]


@pytest.fixture(autouse=True)
def by_our_kernels(monkeypatch):
    monkeypatch.setattr(_native, "winograd_lanes", lambda: 16)  # those that a processor without AVX2 leaves to oneDNN


@pytest.mark.parametrize("activation", [nn.ReLU6(), nn.ReLU(), nn.LeakyReLU(0.1), nn.PReLU()], ids=lambda a: str(a)[:6])
def test_every_run_gives_the_same(activation):
    net, x = network(activation), torch.rand(2, 3, 22, 18)
    frozen = freeze(net, tune=False)
    first, second = frozen(x), frozen(x)
    assert len(replays(frozen)) == 8 and all(prepared(frozen))
    expected = net(x).detach()
    assert (first - expected).abs().max() <= 1e-5 * expected.abs().max()
    others = [frozen(x) for _ in range(3)]
    assert all(torch.equal(first, other) for other in (second, *others))
    assert len({y.data_ptr() for y in (first, second, *others)}) == 5


def test_other_inputs_shapes_and_threads():
    net = network()
    frozen = freeze(net, tune=False)
    threads = torch.get_num_threads()
    try:
        for shape in ((1, 3, 22, 18), (2, 3, 9, 30)):
            for count in (1, 2, 3, 2):
                torch.set_num_threads(count)
                x = torch.rand(shape)
                expected = net(x).detach()
                assert (frozen(x) - expected).abs().max() <= 1e-5 * expected.abs().max()
    finally:
        torch.set_num_threads(threads)


def test_constants_live_as_long_as_the_calls():
    net, x = network(nn.LeakyReLU(0.3)), torch.rand(1, 3, 22, 18)
    frozen = freeze(net, tune=False)
    expected, *_ = (frozen(x) for _ in range(3))
    _native.module._equal_slopes.cache_clear()
    rubbish = [torch.full((128,), float("nan")) for _ in range(100)]
    assert torch.equal(frozen(x), expected) and len(rubbish) == 100


def test_layers_of_more_than_a_kernel_are_not_prepared():
    net, x = network(nn.SiLU()), torch.rand(1, 3, 22, 18)
    frozen = freeze(net, tune=False)
    results = [frozen(x) for _ in range(4)]
    assert prepared(frozen) == [False, False, False, True, False, False, True, True]
    assert all(torch.equal(result, results[0]) for result in results)


def test_nothing_is_prepared_in_half_precision():
    frozen, x = freeze(network(), torch.bfloat16, tune=False), torch.rand(1, 3, 22, 18)
    results = [frozen(x) for _ in range(4)]
    assert all(torch.equal(result, results[0]) for result in results)
    if frozen.dtype == torch.bfloat16:
        assert not any(prepared(frozen))


def test_inputs_of_other_strides_run_unprepared():
    frozen, shape = freeze(nn.Conv2d(16, 16, 1), tune=False), (1, 16, 5, 7)
    dense = torch.rand(shape).contiguous(memory_format=torch.channels_last)
    expected = frozen(dense)
    (layer,) = frozen._network({"input": dense}).layers.values()
    run = Replay(lambda values: layer(values[0]), 0, None)
    part = torch.cat([dense, dense], 1).contiguous(memory_format=torch.channels_last)[:, 16:]
    with torch.no_grad():
        assert torch.equal(run([dense]), expected) and torch.equal(run([dense]), expected)
        assert run.prepared is not None and run._replayed(run.prepared, [part]) is None
        assert torch.equal(run([part]), expected) and torch.equal(run([dense]), expected)


def test_choices_that_are_asked_for_hold_afterwards():
    net, x = network(), torch.rand(1, 3, 22, 18)
    frozen = freeze(net, tune=False)
    for _ in range(3):
        frozen(x)
    text = frozen.explain(x)
    kernels = re.findall(r"conv_bn_relu +native +(\w+): ", text)
    assert kernels == ["stem", *2 * ["pointwise", "depthwise", "pointwise"], "pointwise"]
    with backends.use_implementation("conv_bn_relu", "reference"), backends.recorded() as choices:
        frozen(x)
    assert [choice.implementation for choice in choices] == ["reference"] * 8
    with backends.use_backend("reference"):
        expected = frozen(x)
    assert (frozen(x) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_several_threads_at_once():
    net = network()
    frozen = freeze(net, tune=False)
    inputs = [torch.rand(1, 3, 22, 18) for _ in range(6)]
    expected = [net(x).detach() for x in inputs]
    errors = []

    def repeat(x, y):
        errors.extend(float((frozen(x) - y).abs().max() / y.abs().max()) for _ in range(20))

    threads = [threading.Thread(target=repeat, args=pair) for pair in zip(inputs, expected)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 120 and max(errors) <= 1e-5


def test_a_layer_that_writes_to_a_place():
    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 3, 1, 1, groups=16)
            self.c = nn.Conv2d(32, 8, 1)

        def forward(self, x):
            return self.c(torch.cat([self.a(x), self.b(x)], 1))

    net, x = Dense().eval(), torch.rand(1, 16, 6, 9)
    frozen = freeze(net, tune=False)
    expected = net(x).detach()
    for _ in range(4):
        assert (frozen(x) - expected).abs().max() <= 1e-5
