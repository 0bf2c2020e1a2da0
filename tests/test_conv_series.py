"""Layers of frozen networks that run as one call: bit for bit what they are one by one."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from fastperc import _native, freeze
from fastperc.ops.common import why_not_cpp
from fastperc.rewriting.replay import Replay
from fastperc.rewriting.series import Layer, Series

pytestmark = pytest.mark.skipif(why_not_cpp(torch.empty(0)) is not None, reason="there is no compiled module")


class Block(nn.Module):
    """An inverted residual block, as MobileNetV2 has it."""

    def __init__(self, channels, wide, out, kernel=3, stride=1, padding=None):
        super().__init__()
        padding = kernel // 2 if padding is None else padding
        self.expand = nn.Sequential(nn.Conv2d(channels, wide, 1), nn.ReLU6()) if wide > channels else nn.Identity()
        self.depthwise = nn.Sequential(nn.Conv2d(wide, wide, kernel, stride, padding, groups=wide), nn.LeakyReLU(0.2))
        self.project, self.skips = nn.Conv2d(wide, out, 1), (channels, stride, padding) == (out, 1, kernel // 2)

    def forward(self, x):
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.skips else y


class Outside(nn.Module):
    """Wide maps that others read too: a step that is no layer, the result, and a skip."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = Block(16, 64, 16), Block(16, 64, 24, stride=2), nn.Conv2d(24, 24, 1)
        self.wide = nn.Conv2d(24, 96, 1)
        self.depthwise = nn.Conv2d(96, 96, 3, 1, 1, groups=96)
        self.last = nn.Conv2d(96, 32, 1)

    def forward(self, x):
        y = self.b(self.a(x))
        y = self.c(y) + y
        wide = self.wide(y)
        deep = self.depthwise(wide)
        return self.last(deep), deep.mean((2, 3)), wide + self.depthwise(wide)


def network(*layers):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), *layers).eval()


NETWORKS = {
    "strides": lambda: network(
        Block(16, 16, 16), Block(16, 96, 24, stride=2), Block(24, 144, 24), Block(24, 144, 40, 5, 2)
    ),
    "odd": lambda: network(Block(16, 37, 19), Block(19, 51, 19, 5), Block(19, 70, 23, 7), Block(23, 70, 23, 7, 2)),
    "paddings": lambda: network(Block(16, 48, 24, 3, 1, 0), Block(24, 96, 24, 3, 2, 2), Block(24, 96, 24, 5, 1, 3)),
    "outside": lambda: network(Outside()),
    "single": lambda: network(nn.Conv2d(16, 32, 1), nn.Conv2d(32, 32, 1), nn.Conv2d(32, 32, 3, 1, 1, groups=32)),
}
LARGE, SMALL = (1, 3, 141, 187), (2, 3, 37, 30)  # strips of rows, or layer by layer


@pytest.fixture(autouse=True)
def by_our_kernels(monkeypatch):
    monkeypatch.setattr(_native, "winograd_lanes", lambda: 16)  # those that a processor without AVX2 leaves to oneDNN


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def parts(y):
    return y if isinstance(y, tuple) else (y,)


def same(y, expected):
    return all(torch.equal(a, b) for a, b in zip(parts(y), parts(expected), strict=True))


def series(frozen):
    (choice,) = frozen._choices.values()
    steps = choice.program._series or []
    return [step.args[0] for step in steps if isinstance(step.args[0], Series)]


@pytest.mark.parametrize("shape", [LARGE, SMALL], ids=["large", "small"])
@pytest.mark.parametrize("name", NETWORKS)
def test_equal_to_layer_by_layer(name, shape, threads):
    net, x = NETWORKS[name](), torch.rand(shape)
    frozen = freeze(net, tune=False)
    for count in (1, 2, 3):
        threads(count)
        frozen(x)
    (choice,) = frozen._choices.values()
    expected, plain = [], [x.detach() for x in parts(net(x))]
    inputs = [x, torch.rand(shape) - 0.5]
    for one in inputs:  # one by one
        choice.program._series, choice.program._finished = None, 0
        expected.append(frozen(one))
    assert not series(frozen)
    choice.program._finished = 2
    for count in (1, 2, 3, 8, 1):
        threads(count)
        for one, y in zip(inputs, expected):
            result = frozen(one)
            assert same(result, y) and series(frozen)
    for y, true in zip(parts(expected[0]), plain):
        assert (y - true).abs().max() <= 1e-5 * true.abs().max()


def test_several_threads_at_once():
    frozen = freeze(NETWORKS["strides"](), tune=False)
    inputs = [torch.rand(LARGE) for _ in range(4)]
    expected = [frozen(x) for x in inputs]
    wrong = []

    def repeat(x, y):
        wrong.extend(i for i in range(10) if not same(frozen(x), y))

    workers = [threading.Thread(target=repeat, args=pair) for pair in zip(inputs, expected)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert series(frozen) and not wrong


def test_results_are_new_memory():
    net, x = NETWORKS["outside"](), torch.rand(SMALL)
    frozen = freeze(net, tune=False)
    results = [frozen(x) for _ in range(5)]
    assert series(frozen) and all(same(result, results[0]) for result in results)
    assert len({y.data_ptr() for result in results for y in result}) == 15


def test_inputs_of_other_strides_run_layer_by_layer():
    frozen, shape = freeze(nn.Sequential(nn.Conv2d(16, 32, 1), nn.Conv2d(32, 16, 1)), tune=False), (1, 16, 5, 7)
    dense = torch.rand(shape).contiguous(memory_format=torch.channels_last)
    expected = frozen(dense)
    a, b = frozen._network({"input": dense}).layers.values()
    layers = [Replay(lambda values: a(values[0]), 0, None), Replay(lambda values: b(values[1]), 1, None)]
    part = torch.cat([dense, dense], 1).contiguous(memory_format=torch.channels_last)[:, 16:]
    with torch.no_grad():
        for _ in range(2):
            values = [dense, None, None]
            values[1] = layers[0](values)
            assert torch.equal(layers[1](values), expected)
        whole = Series([Layer(layers[0], 1, [0]), Layer(layers[1], 2, [1])])
        for x, inside in ((dense, None), (part, torch.Tensor), (dense, None)):
            values = [x, None, None]
            whole(values)
            assert torch.equal(values[2], expected) and (values[1] is None) == (inside is None)
