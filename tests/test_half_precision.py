"""Half precision on a processor that only emulates it: no convolution runs in it, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from cases import error
from torch.utils._python_dispatch import TorchDispatchMode

from fastperc import PerceptualLoss, TransformNet, VGG16Features, devices, freeze

HALF = [torch.bfloat16, torch.float16]
CPU = torch.device("cpu")


class Convolutions(TorchDispatchMode):
    """Collects the dtypes in which PyTorch convolves."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if "conv" in function.name():
            self.dtypes |= {x.dtype for x in arguments if isinstance(x, torch.Tensor)}
        return function(*arguments, **(keywords or {}))


@pytest.fixture(params=[False, True], ids=["emulated", "native"])
def native(request, monkeypatch):
    monkeypatch.setattr(devices, "_cpu_computes_in", lambda dtype: request.param)
    return request.param


@pytest.fixture
def net():
    return TransformNet("paper", width=8)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("preset", ["paper", "examples"])
def test_an_engine(preset, dtype, native):
    net, x = TransformNet(preset, width=8).eval(), torch.rand(1, 3, 32, 36)
    engine = freeze(net, dtype)
    with torch.no_grad(), Convolutions() as convolutions:
        y = engine(x)
        exact = net.double()(x.double())
    assert error(y, exact) < (5e-2 if native else 1e-5)
    assert engine.dtype == (dtype if native else torch.float32)
    assert native or not convolutions.dtypes & {*HALF}
    name = str(dtype).removeprefix("torch.")
    assert engine.explain(32, 32).startswith(f"{name} stored, float32 computed") == (not native)
    assert freeze(net.float()).explain(32, 32).startswith("layer")


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "half"])
def test_a_network_in_training(net, dtype, autocast, native):
    if native and dtype == torch.float16:
        pytest.skip("PyTorch's own")
    x = torch.rand(2, 3, 32, 36)
    net, x = (net, x) if autocast else (net.to(dtype), x.to(dtype))
    with Convolutions() as convolutions:
        with torch.autocast("cpu", dtype, enabled=autocast):
            y = net(x)
        y.float().square().mean().backward()
    assert y.dtype == dtype
    assert native or not convolutions.dtypes & {*HALF}
    assert all(p.grad is not None and p.grad.dtype == p.dtype and p.grad.isfinite().all() for p in net.parameters())


def test_a_loss(net, vgg_file, native):
    features = VGG16Features(vgg_file, ("relu1_2", "relu2_2"))
    loss = PerceptualLoss(features, torch.rand(1, 3, 40, 40), content_layer="relu2_2")
    y, x = torch.rand(2, 1, 3, 32, 36)
    y.requires_grad_()
    with Convolutions() as convolutions, torch.autocast("cpu", torch.bfloat16):
        total = loss(y, x).total
        total.backward()
    assert native or not convolutions.dtypes & {*HALF}
    exact = loss(y.detach(), x).total
    assert error(total.detach(), exact) < (3e-2 if native else 1e-6)


def test_the_answer_for_this_processor():
    assert devices.computes_in(torch.float32, CPU) and devices.computes_in(torch.float64, CPU)
    assert all(devices.computes_in(dtype, torch.device("cuda")) for dtype in HALF)
