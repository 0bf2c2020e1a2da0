"""Saving and loading networks, reading fast_neural_style's state_dicts, and files that are refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import fastperc
from fastperc import SRCNN, InputError, SuperResolutionNet, TransformNet, checkpoints
from fastperc.weights import STYLES, SUPER_RESOLUTION


@pytest.mark.parametrize(
    "net",
    [
        TransformNet("eccv16", "he", 8, upsample="nearest"),
        SuperResolutionNet(8, width=4),
        SuperResolutionNet(4, 4, "nearest"),
        SRCNN(2, (9, 1, 5)),
    ],
    ids=lambda net: type(net).__name__,
)
def test_round_trip(tmp_path, net):
    path = tmp_path / "net.safetensors"
    fastperc.save(net, path, training={"step": 3})
    loaded = fastperc.load(path)
    assert type(loaded) is type(net) and loaded.config == net.config and not loaded.training
    for name, tensor in net.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["fastperc"] == fastperc.__version__ and metadata["network"] == type(net).__name__
    assert json.loads(metadata["training"]) == {"step": 3}


def test_half_on_disk_is_float32_in_use(tmp_path):
    net = TransformNet("paper", width=4)
    fastperc.save(net, tmp_path / "net.safetensors", dtype=torch.float16)
    loaded = fastperc.load(tmp_path / "net.safetensors").state_dict()
    assert loaded["head.weight"].dtype == torch.float32
    assert torch.equal(loaded["head.weight"], net.state_dict()["head.weight"].half().float())
    assert loaded["stem.norm.num_batches_tracked"].dtype == torch.int64


class Example(torch.nn.Module):
    """The network of the fast_neural_style example, with the layer names and shapes of its state_dict."""

    def __init__(self, width: int) -> None:
        super().__init__()
        w = width

        def conv(c_in, c_out, k, stride=1):
            layer = torch.nn.Module()
            layer.conv2d = torch.nn.Conv2d(c_in, c_out, k, stride)
            return layer

        self.conv1, self.in1 = conv(3, w, 9), torch.nn.InstanceNorm2d(w, affine=True)
        self.conv2, self.in2 = conv(w, 2 * w, 3, 2), torch.nn.InstanceNorm2d(2 * w, affine=True)
        self.conv3, self.in3 = conv(2 * w, 4 * w, 3, 2), torch.nn.InstanceNorm2d(4 * w, affine=True)
        for i in range(1, 6):
            block = torch.nn.Module()
            block.conv1, block.in1 = conv(4 * w, 4 * w, 3), torch.nn.InstanceNorm2d(4 * w, affine=True)
            block.conv2, block.in2 = conv(4 * w, 4 * w, 3), torch.nn.InstanceNorm2d(4 * w, affine=True)
            setattr(self, f"res{i}", block)
        self.deconv1, self.in4 = conv(4 * w, 2 * w, 3), torch.nn.InstanceNorm2d(2 * w, affine=True)
        self.deconv2, self.in5 = conv(2 * w, w, 3), torch.nn.InstanceNorm2d(w, affine=True)
        self.deconv3 = conv(w, 3, 9)

    def forward(self, x):  # 0–255 to 0–255
        def run(layer, x):
            return layer.conv2d(torch.nn.functional.pad(x, [layer.conv2d.kernel_size[0] // 2] * 4, mode="reflect"))

        x = self.in1(run(self.conv1, x)).relu()
        x = self.in2(run(self.conv2, x)).relu()
        x = self.in3(run(self.conv3, x)).relu()
        for i in range(1, 6):
            block = getattr(self, f"res{i}")
            x = x + block.in2(run(block.conv2, block.in1(run(block.conv1, x)).relu()))
        x = self.in4(run(self.deconv1, torch.nn.functional.interpolate(x, scale_factor=2))).relu()
        x = self.in5(run(self.deconv2, torch.nn.functional.interpolate(x, scale_factor=2))).relu()
        return run(self.deconv3, x)


@pytest.mark.parametrize("width", [4, 16])
@pytest.mark.parametrize("flavour", ["today", "running-statistics", "data-parallel", "wrapped"])
def test_reads_the_fast_neural_style_example(tmp_path, width, flavour):
    example = Example(width)
    tensors = dict(example.state_dict())
    for name in [name for name in tensors if ".in" in f".{name}" and name.endswith("weight")]:
        if flavour == "running-statistics":
            tensors[name.replace("weight", "running_mean")] = torch.zeros_like(tensors[name])
            tensors[name.replace("weight", "running_var")] = torch.ones_like(tensors[name])
    if flavour == "data-parallel":
        tensors = {f"module.{name}": tensor for name, tensor in tensors.items()}
    torch.save({"state_dict": tensors} if flavour == "wrapped" else tensors, tmp_path / "example.model")

    net = fastperc.load(tmp_path / "example.model")
    assert net.config["preset"] == "examples" and net.config["width"] == width
    x = torch.rand(1, 3, 24, 32)
    with torch.inference_mode():
        assert torch.allclose(net(x), example(255 * x) / 255, atol=1e-5)


@pytest.mark.parametrize("name", STYLES)
def test_shipped_styles_load_by_name(name):
    net = fastperc.load(name)
    assert isinstance(net, TransformNet)
    with torch.inference_mode():
        y = net(torch.rand(1, 3, 40, 50))
    assert y.isfinite().all() and y.std() > 0.05
    training = checkpoints.read_training(STYLES[name])
    assert training["step"] > 0 and training["style"].startswith(name) and "/" not in json.dumps(training)


@pytest.mark.parametrize("name", SUPER_RESOLUTION)
def test_shipped_super_resolution_networks_load_by_name(name):
    net = fastperc.load(name)
    scale, _, method = name.removeprefix("x").partition("_")
    assert isinstance(net, SRCNN if method == "srcnn" else SuperResolutionNet) and net.config["scale"] == int(scale)
    training = checkpoints.read_training(SUPER_RESOLUTION[name])
    assert training["step"] == training["iterations"] > 0 and "/" not in json.dumps(training)
    assert training["loss"] == ("feature" if method == "feature" else "pixel")
    assert SUPER_RESOLUTION[name].stat().st_size < 2_000_000


def damaged(tmp_path, damage):
    """A file that cannot be loaded, and a pattern for the error message."""
    path = tmp_path / "net.safetensors"
    net = TransformNet("instance", width=4)
    if damage == "missing":
        return path, "no such file"
    if damage == "cut short":
        fastperc.save(net, path)
        path.write_bytes(path.read_bytes()[:-100])
        return path, "damaged or cut short"
    if damage == "noise":
        path.write_bytes(bytes(range(256)) * 4)
        return path, "not a file of tensors"
    if damage == "empty":
        path.touch()
        return path, "not a file of tensors"
    if damage == "nan":
        tensors, metadata = dict(net.state_dict()), {"fastperc": "0", "network": "TransformNet"}
        tensors["head.bias"] = torch.full((3,), float("nan"))
        save_file(tensors, path, {**metadata, "config": json.dumps(net.config)})
        return path, "head.bias has values that are not finite"
    if damage == "another network":
        torch.save(torch.nn.Linear(2, 2).state_dict(), path)
        return path, "neither a network saved by fastperc"
    if damage == "unknown class":
        save_file(dict(net.state_dict()), path, {"network": "Sorcerer", "config": "{}"})
        return path, "holds a Sorcerer"
    if damage == "bad config":
        save_file(dict(net.state_dict()), path, {"network": "TransformNet", "config": '{"colour": 3}'})
        return path, "config does not build"
    if damage == "missing tensor":
        tensors = dict(net.state_dict())
        del tensors["head.bias"]
        save_file(tensors, path, {"network": "TransformNet", "config": json.dumps(net.config)})
        return path, "lacks head.bias"
    if damage == "wrong shape":
        save_file(
            {**net.state_dict(), "head.bias": torch.zeros(4)},
            path,
            {"network": "TransformNet", "config": json.dumps(net.config)},
        )
        return path, r"head.bias is \[4\], the network's is \[3\]"
    if damage == "a number":
        torch.save(3, path)
        return path, "holds no state_dict"
    raise AssertionError(damage)


@pytest.mark.parametrize(
    "damage",
    [
        *("missing", "cut short", "noise", "empty", "nan", "another network", "unknown class", "bad config"),
        *("missing tensor", "wrong shape", "a number"),
    ],
)
def test_refuses(tmp_path, damage):
    path, message = damaged(tmp_path, damage)
    with pytest.raises(InputError, match=message):
        fastperc.load(path)


class Trap:
    """A pickle that runs code when opened."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path):
    torch.save({"weights": Trap(tmp_path / "sprung")}, tmp_path / "net.pth")
    with pytest.raises(InputError, match="could run somebody's code"):
        fastperc.load(tmp_path / "net.pth")
    assert not (tmp_path / "sprung").exists()


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    path, net = tmp_path / "net.safetensors", TransformNet("instance", width=4)
    fastperc.save(net, path)
    before = path.read_bytes()
    with torch.no_grad():
        net.head.bias[0] = float("inf")
    with pytest.raises(FloatingPointError, match=r"head\.bias"):
        fastperc.save(net, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_training_state_round_trips_bit_for_bit(tmp_path):
    def steps(net, optimizer, count):
        for i in range(count):
            optimizer.zero_grad()
            x = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(i))
            net(x).square().mean().backward()
            optimizer.step()

    net = TransformNet("paper", width=4).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    steps(net, optimizer, 2)
    checkpoints.save(net, tmp_path / "c.safetensors", training={"step": 2}, optimizer=optimizer)
    twin = TransformNet("paper", width=4).to(memory_format=torch.channels_last)
    other = torch.optim.Adam(twin.parameters(), lr=1e-3)
    checkpoints.load_training(tmp_path / "c.safetensors", twin, other)
    steps(net, optimizer, 2)
    steps(twin, other, 2)
    for name, tensor in net.state_dict().items():
        assert torch.equal(twin.state_dict()[name], tensor), name
    assert fastperc.load(tmp_path / "c.safetensors").config == net.config  # a checkpoint is a network too
