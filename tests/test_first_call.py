"""What the first call of a shape measures, and what a frozen network does with it."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from fastperc import freeze
from fastperc.engine import frozen_net
from fastperc.engine.frozen_net import FrozenNet
from fastperc.rewriting.program import Program


def network():
    torch.manual_seed(0)
    layers = [(nn.Conv2d(16, 16, 3, 1, 1), nn.ReLU()) for _ in range(3)]
    return nn.Sequential(*itertools.chain(*layers)).eval()


@pytest.fixture
def seconds(monkeypatch):
    """The times that are measured: of layers, of a program by how many groups run call by call, of the network."""
    given = {"layer": 2.0, "call by call": 1.0, 0: 1.0, 3: 2.0, "itself": 3.0}

    def whole(self, run, arguments):
        run(arguments)
        alone = sum(step.node not in run._fused for step in run.steps) // 2 if isinstance(run, Program) else "itself"
        return given[alone]

    apart = itertools.cycle(["call by call", "layer"])
    monkeypatch.setattr(FrozenNet, "_seconds", lambda self, run: given[next(apart)])
    monkeypatch.setattr(FrozenNet, "_seconds_whole", whole)
    return given


@pytest.mark.parametrize(
    "fused, alone, itself, chosen",
    [(1.0, 2.0, 3.0, 0), (2.0, 1.0, 3.0, 3), (2.0, 1.0, 0.9, None), (0.9, 1.0, 0.95, 0)],
    ids=["layers", "call by call", "the network itself", "layers that are nearly as fast"],
)
def test_the_whole_decides(seconds, fused, alone, itself, chosen):
    """Layers that are slower by themselves stay fused where the whole is faster with them."""
    seconds |= {0: fused, 3: alone, "itself": itself}
    net, x = network(), torch.rand(1, 16, 8, 8)
    frozen = freeze(net)
    with torch.no_grad():
        torch.testing.assert_close(frozen(x), net(x))
    (choice,) = frozen._choices.values()
    assert choice.seconds == (min(fused, alone), itself)
    assert choice.program is None if chosen is None else len(choice.alone) == chosen
    assert ("the network itself, channels-last:" if chosen is None else "fused layers:") in frozen.explain(x)
    assert frozen.explain(x).count("measured faster than one layer") == (3 if alone < fused else 0)


def test_layers_that_are_faster_are_measured_once(seconds):
    seconds |= {"layer": 1.0, "call by call": 1.0}
    frozen = freeze(network())
    frozen(torch.rand(1, 16, 8, 8))
    (choice,) = frozen._choices.values()
    assert choice.alone == () and choice.seconds == (1.0, 3.0)


def test_slow_calls_run_twice(monkeypatch):
    """A large picture's first call does not take many times as long as the second."""
    clock = itertools.count(step=frozen_net.TIMED_SECONDS)
    monkeypatch.setattr(frozen_net.time, "perf_counter", lambda: next(clock))
    runs = []
    frozen = freeze(network())
    assert frozen._seconds(lambda: runs.append(1)) == frozen_net.TIMED_SECONDS and len(runs) == 2
