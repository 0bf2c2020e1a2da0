"""GPUs that no kernel is for: AMD's by ROCm, which PyTorch calls CUDA, and Apple's. Plain PyTorch runs everything.

CPU tensors say that they are on such a GPU.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from pretend import PretendDevice
from steps import batches, objective
from torch import nn

from fastperc import GramLoss, SuperResolutionNet, TransformNet, TVLoss, VGG16Features, backends, freeze, reference
from fastperc.losses import PerceptualLoss
from fastperc.tools import doctor
from fastperc.training import step
from fastperc.training.perturb import StabilityLoss
from fastperc.training.step import TrainStep, adam

GPUS = {"rocm": "cuda", "mps": "mps"}
PLAIN = ("gram_loss", "gram_matrix")  # whose native implementation is made of PyTorch's own products


def refuse(*arguments, **options):
    raise RuntimeError("no such operator in this build")


@pytest.fixture(params=GPUS)
def gpu(request, monkeypatch):
    """The device's type, in a block that pretends it is there."""
    device = GPUS[request.param]
    monkeypatch.setattr(backends, "interpreted", lambda: False)
    for operator in ("cudnn_convolution_relu", "cudnn_convolution_add_relu"):
        monkeypatch.setattr(torch, operator, refuse)
    autocast, enabled = torch.autocast, torch.is_autocast_enabled
    if request.param == "rocm":
        monkeypatch.setattr(torch.version, "hip", "6.4.43482")
        monkeypatch.setattr(torch.version, "cuda", None)
        monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "AMD Instinct MI300X")
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (1 << 37, 1 << 38))
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)  # so that no graph is recorded
    monkeypatch.setattr(torch, "autocast", lambda device, *options, **more: autocast("cpu", *options, **more))
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device="cpu": enabled("cpu"))
    with PretendDevice(device):
        yield device


def chosen(run):
    """The backends of all operations of ``run``, but for native ones that are PyTorch's own products."""
    with backends.recorded() as choices:
        run()
    return {choice.backend for choice in choices if choice.operation not in PLAIN or choice.backend != "native"}


ENGINES = {
    "paper": (lambda: TransformNet("paper", width=4), "auto", None),
    "paper-tiles": (lambda: TransformNet("paper", width=4), 16, None),
    "instance": (lambda: TransformNet("instance", width=4), "auto", None),
    "instance-tiles": (lambda: TransformNet("instance", width=4), 16, None),
    "instance-tiles-fp16": (lambda: TransformNet("instance", width=4), 16, torch.float16),
    "examples": (lambda: TransformNet("examples", width=4), "auto", torch.bfloat16),
    "sr": (lambda: SuperResolutionNet(4, width=4), "auto", None),
}


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine(gpu, name):
    make, tile, dtype = ENGINES[name]
    net = make().eval().to(gpu)
    engine = freeze(net, dtype)
    x = torch.rand(1, 3, 40, 36, device=gpu)
    picture = []
    assert chosen(lambda: picture.append(engine(x, tile))) == {"reference"}
    assert picture[0].device.type == gpu and "reference" in engine.explain(32, 32)
    with torch.no_grad():
        assert (picture[0] - net(x)).abs().max() < (1e-4 if dtype is None else 0.1)


def perceptual(vgg_file):
    features = VGG16Features(vgg_file, ("relu1_2", "relu2_2"))
    return PerceptualLoss(features, torch.rand(1, 3, 32, 32), convention="relative")


STEPS = {
    "paper": (lambda: TransformNet("paper", width=4), perceptual, None),
    "instance-reflect-nearest": (
        lambda: TransformNet("instance", width=4, padding="reflect", upsample="nearest"),
        perceptual,
        None,
    ),
    "stability": (
        lambda: TransformNet("paper", width=4),
        lambda vgg_file: StabilityLoss(perceptual(vgg_file), 1.0, 0.1),
        "perturb",
    ),
    "sr": (
        lambda: SuperResolutionNet(4, width=4),
        lambda vgg_file: objective,
        partial(reference.degrade, scale=4, blur=1.0),
    ),
}


@pytest.mark.parametrize("amp", [False, True], ids=["fp32", "amp"])
@pytest.mark.parametrize("name", STEPS)
def test_a_training_step(gpu, name, amp, vgg_file, monkeypatch):
    make, make_loss, inputs = STEPS[name]
    net, loss = make().to(gpu), make_loss(vgg_file)
    if isinstance(loss, nn.Module):
        loss.to(gpu)
    transfer = step.DirectTransfer
    monkeypatch.setattr(step, "OverlappedTransfer", transfer)
    device = next(net.parameters()).device
    run = TrainStep(net, loss, adam(net.parameters(), 1e-3, device), amp, getattr(loss, "perturb", inputs))
    before = [parameter.detach().clone() for parameter in net.parameters()]
    terms = []
    assert chosen(lambda: terms.append(run(batches(1, 64)[0], 1e-3))) <= {"reference"}
    assert terms[0].total.isfinite()
    assert all((a != b).any() for a, b in zip(net.parameters(), before) if a.dim() > 1)


def test_losses_alone(gpu):
    x = torch.rand(2, 3, 20, 24, device=gpu).requires_grad_()
    gram = reference.gram_matrix(torch.rand(1, 3, 20, 24, device=gpu))
    assert chosen(lambda: (TVLoss()(x) + GramLoss()(x, gram)).backward()) == {"reference"}
    assert x.grad.isfinite().all()


def test_a_dtype_that_the_device_has_not_is_refused(gpu):
    net = TransformNet("paper", width=4)
    if gpu == "mps":
        with pytest.raises(ValueError, match="mps has no float64; choose another dtype or the CPU"):
            freeze(net, torch.float64, "mps")
    else:
        assert freeze(net, torch.float64, gpu)(torch.rand(1, 3, 20, 20, device=gpu)).isfinite().all()


def test_doctor(gpu, monkeypatch):
    if gpu == "cuda":
        properties = SimpleNamespace(
            name="AMD Instinct MI300X", major=9, minor=4, total_memory=192 << 30, gcnArchName="gfx942:sramecc+:xnack-"
        )
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
        expected, device = (
            "cuda:0        AMD Instinct MI300X, gfx942, 192 GiB, ROCm 6.4.43482; plain PyTorch runs here",
            "cuda:0",
        )
    else:
        monkeypatch.setattr(torch.mps, "is_available", lambda: True)
        expected, device = "mps           Apple's GPU; plain PyTorch runs here, untested", "mps"
    lines = doctor.report().splitlines()
    assert expected in lines
    rows = [line.split() for line in lines if f" {device} " in line and not line.startswith("tuned")]
    assert len(rows) > 8 and {row[2] for row in rows if row[0] not in PLAIN} == {"reference"}
    assert not any("CUDA" in line for line in lines if line.startswith(device))
