"""Networks that are wrapped, or have exchanged layers: saved, loaded and frozen, or refused in a sentence."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from cases import error
from torch import nn
from variants import build_variant

import fastperc
import fastperc.checkpoints
from fastperc import SRCNN, InputError, PerceptualLoss, TransformNet, VGG16Features, freeze

WRAPPERS = {
    "compile": torch.compile,
    "data-parallel": nn.DataParallel,
    "data-parallel-compile": lambda net: nn.DataParallel(torch.compile(net)),
    "compile-data-parallel": lambda net: torch.compile(nn.DataParallel(net)),
    "averaged": torch.optim.swa_utils.AveragedModel,
}


def compiled_inside(net):
    """``net`` with compiled layers."""
    net.stem = torch.compile(net.stem)
    net.blocks[0] = torch.compile(net.blocks[0])
    return net


WRAPPERS["compile-inside"] = compiled_inside


def build(**changes):
    return build_variant("paper", True, changes).eval()


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_networks_save_load_and_freeze(tmp_path, wrapper):
    net = build()
    wrapped = WRAPPERS[wrapper](copy.deepcopy(net)).eval()
    fastperc.save(wrapped, tmp_path / "net.safetensors")
    loaded = fastperc.load(tmp_path / "net.safetensors")
    for name, tensor in net.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    x = torch.rand(1, 3, 24, 24)
    assert torch.equal(freeze(wrapped)(x), freeze(net)(x))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_a_wrapped_state_dict_of_the_example_loads(tmp_path, prefix):
    shapes = {name: tensor.shape for name, tensor in TransformNet("examples", width=4).state_dict().items()}
    names = {ours: theirs for theirs, ours in fastperc.checkpoints.EXAMPLE_LAYERS.items()}
    tensors = {}
    for name, shape in shapes.items():
        layer, _, kind = name.rpartition(".")
        tensors[f"{prefix}{names[layer]}.{kind}"] = torch.rand(shape)
    torch.save(tensors, tmp_path / "net.pth")
    assert fastperc.load(tmp_path / "net.pth").config["preset"] == "examples"


def exchanged(**layers):
    net = build()
    for path, layer in layers.items():
        parent, _, name = path.replace("__", ".").rpartition(".")
        setattr(net.get_submodule(parent), name, layer)
    return net.eval()


def measured_instance_norm():
    norm = nn.InstanceNorm2d(8, affine=True, track_running_stats=True)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    return norm


def sync(net):
    return nn.SyncBatchNorm.convert_sync_batchnorm(net).eval()


FREEZABLE = {
    "identity-block": lambda: exchanged(blocks__1=nn.Identity()),
    "identity-norm": lambda: exchanged(stem__norm=nn.Identity()),
    "norm-without-scale": lambda: exchanged(stem__norm=nn.BatchNorm2d(8, affine=False)),
    "instance-norm-without-scale": lambda: exchanged(stem__norm=nn.InstanceNorm2d(8)),
    "instance-norm-with-statistics": lambda: exchanged(stem__norm=measured_instance_norm()),
    "conv-without-bias": lambda: exchanged(stem__conv=nn.Conv2d(3, 8, 9, padding=4, bias=False)),
}


@pytest.mark.parametrize("case", FREEZABLE)
def test_exchanged_layers_that_freeze(case):
    net, x = FREEZABLE[case](), torch.rand(2, 3, 24, 28)
    with torch.no_grad():
        assert error(freeze(net)(x), net(x)) < 1e-5


def test_synchronised_batch_norms_freeze():
    net, x = build(), torch.rand(1, 3, 24, 28)
    assert torch.equal(freeze(sync(copy.deepcopy(net)))(x), freeze(net)(x))


class Halved(TransformNet):
    def forward(self, x):
        return super().forward(x) / 2


UNFREEZABLE = {
    "group-norm": (lambda: exchanged(stem__norm=nn.GroupNorm(2, 8)), "not GroupNorm.* at stem.conv"),
    "batch-statistics": (
        lambda: exchanged(stem__norm=nn.BatchNorm2d(8, track_running_stats=False)),
        "not BatchNorm2d.* at stem.conv",
    ),
    "groups": (lambda: exchanged(down__0__conv=nn.Conv2d(8, 16, 3, 2, 1, groups=2)), "groups"),
    "dilation": (lambda: exchanged(blocks__0__conv1=nn.Conv2d(32, 32, 3, 1, 2, 2)), "dilation"),
    "another-block": (lambda: exchanged(blocks__0=nn.ReLU()), r"not ReLU\(\) at blocks.0"),
    "no-head": (lambda: exchanged(head=nn.Identity()), "without its first or last convolution"),
    "another-forward": (lambda: Halved("paper", width=8), "got Halved"),
    "srcnn": (SRCNN, "SRCNN cannot be traced at .*fastperc/models/common.py"),
    "a-name": (lambda: "great_wave", "got str"),
    "a-class": (lambda: TransformNet, "got type"),
    "a-state-dict": (lambda: build().state_dict(), "got OrderedDict"),
}


@pytest.mark.parametrize("case", UNFREEZABLE)
def test_freeze_refuses(case):
    make, message = UNFREEZABLE[case]
    with pytest.raises(TypeError, match=message) as caught:
        freeze(make())
    assert "\n" not in str(caught.value)


def test_freeze_takes_other_networks_that_hold_ours():
    net, x = nn.Sequential(build(), nn.Conv2d(3, 3, 1)).eval(), torch.rand(2, 3, 24, 28)
    assert error(freeze(net, tune=False)(x), net(x)) < 1e-5


UNSAVEABLE = {
    "identity-block": (lambda: exchanged(blocks__1=nn.Identity()), "blocks.1.conv1.weight"),
    "identity-norm": (lambda: exchanged(stem__norm=nn.Identity()), "stem.norm.weight"),
    "more-layers": (lambda: exchanged(extra=nn.Linear(2, 2)), "extra.weight"),
    "another-class": (lambda: Halved("paper", width=8), "got Halved"),
    "linear": (lambda: nn.Linear(2, 2), "got Linear"),
    "engine": (lambda: freeze(build()), "got Engine"),
    "state-dict": (lambda: build().state_dict(), "got OrderedDict"),
}


@pytest.mark.parametrize("case", UNSAVEABLE)
def test_save_refuses_what_load_could_not_rebuild(tmp_path, case):
    make, message = UNSAVEABLE[case]
    with pytest.raises(TypeError, match=re.escape(message)):
        fastperc.save(make(), tmp_path / "net.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_meta_tensors_are_refused(tmp_path):
    net = TransformNet("paper", width=4).to("meta")
    with pytest.raises(ValueError, match="meta device"):
        fastperc.save(net, tmp_path / "net.safetensors")
    with pytest.raises(ValueError, match="meta device"):
        freeze(net)
    assert fastperc.load("great_wave", device="meta").head.weight.is_meta


@pytest.mark.parametrize("device", ["quantum", *["cuda"] * (not torch.cuda.is_available())])
def test_a_missing_device_is_refused(device):
    for call in (lambda: fastperc.load("great_wave", device=device), lambda: freeze(build(), device=device)):
        with pytest.raises(InputError, match=f"no device '{device}' here; use cpu"):
            call()


def test_a_bare_state_dict_is_refused_with_advice(tmp_path):
    for net in (build(), torch.compile(build()), SRCNN()):
        torch.save(net.state_dict(), tmp_path / "net.pth")
        with pytest.raises(InputError, match=r"write it by fastperc\.save"):
            fastperc.load(tmp_path / "net.pth")


def test_a_wrapped_loss_network(vgg_file):
    features = VGG16Features(vgg_file, ["relu1_2", "relu2_2"])
    images = torch.rand(2, 1, 3, 24, 24)
    expected = PerceptualLoss(features, images[0])(images[0], images[1]).total
    for wrapper in ("compile", "data-parallel"):
        assert torch.equal(PerceptualLoss(WRAPPERS[wrapper](features), images[0])(images[0], images[1]).total, expected)


@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (0, 3, 32, 32), (3, 32, 32), (1, 1, 32, 32)], ids=str)
def test_a_style_that_is_not_one_painting_is_refused(vgg_file, shape):
    features = VGG16Features(vgg_file, ["relu1_2", "relu2_2"])
    with pytest.raises(ValueError, match=r"style must be one painting.*\[1, 3, H, W\], got shape"):
        PerceptualLoss(features, torch.rand(shape))
    with pytest.raises(ValueError, match="got ndarray"):
        PerceptualLoss(features, torch.rand(1, 3, 32, 32).numpy())
