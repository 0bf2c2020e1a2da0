"""Networks recorded once and run at other sizes: torch.export, torch.jit.trace, ONNX, and torch.compile."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import error
from torch.export import Dim

from fastperc import SRCNN, ConvBNReLU, SuperResolutionNet, TransformNet, VGG16Features, freeze
from fastperc.presets import PRESETS

SIZES = [(2, 96, 100), (1, 97, 130), (3, 16, 16), (1, 33, 41), (2, 130, 61), (1, 64, 18)]  # N, H, W
EXAMPLE = torch.rand(2, 3, 96, 100)
DYNAMIC = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
BOUNDED = {0: Dim("n", min=1, max=64), 2: Dim("h", min=16, max=4096), 3: Dim("w", min=16, max=4096)}

NETWORKS = {
    **{preset: lambda preset=preset: TransformNet(preset, width=4) for preset in PRESETS},
    "reflect-batch": lambda: TransformNet("examples", width=4, norm="batch", upsample="transposed"),
    "x4": lambda: SuperResolutionNet(4, width=4),
    "srcnn": lambda: SRCNN(2),
}


def onnx(net, path, dynamo, example=EXAMPLE):
    """The network in ONNX Runtime, exported by the new or the old exporter of PyTorch."""
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    if dynamo:
        torch.onnx.export(net, (example,), path, dynamo=True, dynamic_shapes=(DYNAMIC,), verbose=False)
    else:
        axes = {name: {0: "n", 2: f"h{name}", 3: f"w{name}"} for name in ("x", "y")}
        names = dict(input_names=["x"], output_names=["y"], dynamic_axes=axes)
        torch.onnx.export(net, (example,), path, dynamo=False, opset_version=17, **names)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


RECORDERS = {
    "export": lambda net, path: torch.export.export(net, (EXAMPLE,), dynamic_shapes=(DYNAMIC,)).module(),
    "export-bounded": lambda net, path: torch.export.export(net, (EXAMPLE,), dynamic_shapes=(BOUNDED,)).module(),
    "export-strict": lambda net, path: torch.export.export(
        net, (EXAMPLE,), dynamic_shapes=(DYNAMIC,), strict=True
    ).module(),
    "trace": lambda net, path: torch.jit.trace(net, EXAMPLE, check_trace=False),
    "compile": lambda net, path: torch.compile(net, fullgraph=True, backend="aot_eager"),
    "onnx": lambda net, path: onnx(net, path, dynamo=True),
    "onnx-torchscript": lambda net, path: onnx(net, path, dynamo=False),
}
SLOW = ("onnx", "onnx-torchscript", "export-strict")


def is_slow(network, recorder):
    return recorder in SLOW or (recorder == "compile" and network != "srcnn")


CASES = [
    pytest.param(network, recorder, marks=[pytest.mark.slow] if is_slow(network, recorder) else [])
    for network in NETWORKS
    for recorder in RECORDERS
    if (network, recorder) != ("srcnn", "onnx-torchscript")  # has no antialiased bicubic, and says so
]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("network", "recorder"), CASES)
def test_recorded_once_and_right_at_six_sizes(tmp_path, network, recorder):
    torch.compiler.reset()
    net = NETWORKS[network]().eval()
    with torch.no_grad():
        for module in net.modules():  # so that the picture depends on every pixel much
            if isinstance(module, torch.nn.Conv2d):
                module.weight.mul_(3)
        recorded = RECORDERS[recorder](net, str(tmp_path / "net.onnx"))
        for n, height, width in SIZES:
            x = torch.rand(n, 3, height, width)
            assert error(recorded(x), net(x)) < 1e-4, (n, height, width)


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_trains_compiled_at_several_sizes(preset):
    torch.compiler.reset()
    net = TransformNet(preset, width=4)
    compiled = torch.compile(copy.deepcopy(net), fullgraph=True, backend="aot_eager")
    for n, height, width in ((2, 36, 29), (1, 50, 47), (2, 41, 66)):
        x = torch.rand(n, 3, height, width)
        leaves = [x.clone().requires_grad_(), x.clone().requires_grad_()]
        for module, leaf in zip((net, compiled), leaves):
            module(leaf).square().sum().backward()
        assert error(leaves[1].grad, leaves[0].grad) < 1e-4, (n, height, width)


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_a_module_exports_any_batch(norm):
    module = ConvBNReLU(3, 4, 3, padding=1, norm=norm).eval()
    exported = torch.export.export(module, (EXAMPLE,), dynamic_shapes=(DYNAMIC,)).module()
    for n in (1, 3):
        x = torch.rand(n, 3, 20, 21)
        assert error(exported(x), module(x)) < 1e-5


def test_the_loss_network_exports(vgg_file):
    features = VGG16Features(vgg_file, ["relu1_2", "relu2_2"])
    exported = torch.export.export(features, (EXAMPLE,), dynamic_shapes=(DYNAMIC,)).module()
    for n, height, width in SIZES:
        x = torch.rand(n, 3, height, width)
        assert error(exported(x)["relu2_2"], features(x)["relu2_2"]) < 1e-5


def test_an_image_too_small_for_the_network_is_refused_by_the_exported_one():
    exported = torch.export.export(
        TransformNet("paper", width=4).eval(), (EXAMPLE,), dynamic_shapes=(DYNAMIC,)
    ).module()
    with pytest.raises((AssertionError, RuntimeError), match="16"):
        exported(torch.rand(1, 3, 15, 40))


@pytest.mark.parametrize("net", [TransformNet("paper", width=4), SuperResolutionNet(2, width=4), SRCNN(2)], ids=type)
def test_scripting_says_that_it_is_not_supported(net):
    with pytest.raises(RuntimeError, match=r"^torch.jit.script cannot compile fastperc's networks; use torch.export"):
        torch.jit.script(net)


@pytest.mark.slow
@pytest.mark.parametrize("dynamo", [True, False], ids=["onnx", "onnx-torchscript"])
@pytest.mark.parametrize("preset", ["paper", "instance"])
def test_half_precision_in_onnx(tmp_path, preset, dynamo):
    """Batch norms keep their statistics in float32, which ONNX does not mix with half precision."""
    net = TransformNet(preset, width=4).eval().half()
    with torch.no_grad():
        recorded = onnx(net, str(tmp_path / "net.onnx"), dynamo, EXAMPLE.half())
        x = torch.rand(1, 3, 33, 41).half()
        assert error(recorded(x), copy.deepcopy(net).float()(x.float())) < 2e-2


class Wrapped(torch.nn.Module):
    def __init__(self, engine):
        super().__init__()
        self.engine = engine

    def forward(self, x):
        return self.engine(x)


def test_an_engine_says_that_it_cannot_be_exported():
    engine = freeze(TransformNet("paper", width=4).eval())
    for record in (
        lambda: torch.jit.trace(Wrapped(engine), EXAMPLE),
        lambda: torch.export.export(Wrapped(engine), (EXAMPLE,)),
    ):
        with pytest.raises(RuntimeError, match=r"export the network that was frozen"):
            record()
