"""cuDNN's fused convolutions: each kind is tried once, and where cuDNN cannot compute it, plain PyTorch does.

The operators are replaced, and CPU tensors say that they are on a GPU.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import GPU, error
from pretend import PretendDevice
from torch import nn

from fastperc import _native, ops
from fastperc.ops import cudnn
from fastperc.ops.common import channels_last
from fastperc.ops.vgg_chain import VGG_CONV
from fastperc.types import RELU, Epilogue, Geometry, same_sides


class FakeOperators:
    """Stand-ins for the two operators; ``calls`` counts those that are no trials.

    Args:
        fails: from the number of input channels, the dtype and whether there is a skip: whether cuDNN has no engine.
        reads_output: whether the memory of the output is read, times 0, as PyTorch passes it.
    """

    def __init__(self, fails, reads_output):
        self.fails, self.reads_output, self.calls, self.trials = fails, reads_output, 0, 0

    def relu(self, x, weight, bias, *geometry):
        return self.compute(x, weight, bias, geometry, None)

    def add_relu(self, x, weight, skip, alpha, bias, *geometry):
        return self.compute(x, weight, bias, geometry, alpha * skip)

    def compute(self, x, weight, bias, geometry, skip):
        if x.shape[2] == cudnn.PROBE_SIDE:
            self.trials += 1
        else:
            self.calls += 1
        if self.fails(x.shape[1], x.dtype, skip is not None):
            raise RuntimeError("FIND was unable to find an engine to execute this computation\nand much more")
        y = F.conv2d(x, weight, bias, *geometry)
        if skip is not None:
            y += skip
        elif self.reads_output:
            y += 0 * torch.empty_like(y)
        return channels_last(y.relu())


@pytest.fixture
def pretend(monkeypatch):
    """Replaces the operators; CPU tensors say that they are on a GPU with cuDNN."""

    def start(fails=lambda *kind: False, reads_output=False):
        operators = FakeOperators(fails, reads_output)
        monkeypatch.setattr(torch, "cudnn_convolution_relu", operators.relu)
        monkeypatch.setattr(torch, "cudnn_convolution_add_relu", operators.add_relu)
        return operators

    monkeypatch.setattr(cudnn, "_reasons", {})
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    monkeypatch.setattr(_native, "why_not", lambda x: "only cuDNN and plain PyTorch run here")
    with PretendDevice("cuda:0"):
        yield start


def arguments(channels=4, dtype=torch.float32, out=8):
    like = dict(device="cuda:0", dtype=dtype)
    x, weight = torch.randn(2, channels, 9, 7, **like), torch.randn(out, channels, 3, 3, **like)
    return channels_last(x), channels_last(weight), torch.randn(out, **like)


def expected(x, weight, bias, skip=0):
    return (F.conv2d(x, weight, bias, padding=1) + skip).relu()


def test_runs_where_it_can_and_is_tried_once(pretend):
    operators = pretend()
    for _ in range(3):
        x, weight, bias = arguments()
        assert VGG_CONV.choose(x, weight, bias).name == "cudnn"
        assert torch.equal(VGG_CONV(x, weight, bias), expected(x, weight, bias))
    assert (operators.trials, operators.calls) == (1, 3)
    VGG_CONV(*arguments(channels=5)), VGG_CONV(*arguments(dtype=torch.bfloat16)), VGG_CONV(*arguments(out=6))
    assert operators.trials == 4, "once for each dtype and channels"


def test_plain_pytorch_runs_where_cudnn_has_no_engine(pretend):
    operators = pretend(fails=lambda channels, dtype, skip: dtype == torch.bfloat16 and channels == 3)
    x, weight, bias = arguments(3, torch.bfloat16)
    assert torch.equal(VGG_CONV(x, weight, bias), expected(x, weight, bias)) and operators.calls == 0
    reason = "not cudnn: cuDNN has no engine for this (FIND was unable to find an engine to execute this computation)"
    assert reason in VGG_CONV.reason(VGG_CONV.choose(x, weight, bias), x, weight, bias)
    assert VGG_CONV.choose(*arguments(3)).name == VGG_CONV.choose(*arguments(4, torch.bfloat16)).name == "cudnn"


def test_memory_of_the_output_that_holds_nan_does_no_harm(pretend, poisoned):
    """PyTorch passes it as a skip with the factor 0."""
    operators = pretend(reads_output=True)
    x, weight, bias = arguments()
    assert operators.relu(x, weight, bias, 1, 1, 1, 1).isnan().all(), "the stand-in does what is feared"
    operators.calls = 0
    assert torch.equal(VGG_CONV(x, weight, bias), expected(x, weight, bias)) and operators.calls == 0
    assert "reads the output's memory" in cudnn.why_not(x, weight)
    assert cudnn.why_not(x, weight, skip=True) is None, "the skip takes its place"


def test_a_frozen_networks_convolution_falls_back_too(pretend):
    operators = pretend(fails=lambda channels, dtype, skip: skip)
    x, weight, bias = arguments(8)
    padding, skip = same_sides(1), torch.randn(2, 8, 9, 7, device="cuda:0")
    with torch.no_grad():
        plain = ops.conv_bn_relu(x, weight, bias, Geometry(1, padding), Epilogue(activation=RELU))
        assert operators.calls == 1
        with_skip = ops.conv_bn_relu(x, weight, bias, Geometry(1, padding), Epilogue(activation=RELU, skip=skip))
        assert operators.calls == 1
    assert error(plain, expected(x, weight, bias)) < 1e-6 and error(with_skip, expected(x, weight, bias, skip)) < 1e-6


def test_nothing_is_tried_while_a_graph_is_recorded(pretend, monkeypatch):
    operators = pretend()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    x, weight, _ = arguments()
    assert cudnn.why_not(x, weight) is None and operators.trials == 0


@pytest.mark.parametrize(
    ("dtype", "change", "reason"),
    [
        (torch.float64, None, "nothing in float64"),
        (torch.float32, lambda m: m.setattr(torch.version, "hip", "6.4"), "MIOpen, not cuDNN"),
        (torch.float32, lambda m: m.setattr(torch.backends.cudnn, "enabled", False), "not available"),
        (torch.float32, lambda m: m.setattr(torch.backends.cudnn, "is_available", lambda: False), "not available"),
    ],
    ids=["fp64", "rocm", "disabled", "absent"],
)
def test_refuses(pretend, monkeypatch, dtype, change, reason):
    operators = pretend()
    if change:
        change(monkeypatch)
    x, weight, bias = arguments(dtype=dtype)
    assert reason in cudnn.why_not(x, weight) and operators.trials == 0
    assert torch.equal(VGG_CONV(x, weight, bias), expected(x, weight, bias))


@pytest.mark.skipif(not GPU, reason="cuDNN is a GPU's")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("channels", [3, 64, 128])
def test_cudnn_and_memory_that_holds_nan(channels, dtype):
    conv = nn.Conv2d(channels, 64, 3, padding=1).to("cuda", dtype, memory_format=torch.channels_last)
    for size in (32, 256):
        x = channels_last(torch.randn(4, channels, size, size, device="cuda", dtype=dtype))
        nan = torch.full((4, 64, size, size), torch.nan, device="cuda", dtype=dtype)
        del nan
        with torch.no_grad():
            y = VGG_CONV(x, conv.weight, conv.bias)
            exact = F.conv2d(x.double(), conv.weight.double(), conv.bias.double(), padding=1).relu()
        assert error(y, exact) < {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
