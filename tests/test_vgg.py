"""The loss network: every weight format, and activations against plain functions in float64."""

from __future__ import annotations

import argparse

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import SHALLOW_VGG, error
from safetensors.torch import load_file, save_file

from fastperc import InputError, VGG16Features, VGGFeatures, use_backend
from fastperc.cli.options import add_vgg
from fastperc.models import vgg
from fastperc.models.vgg_weights import FIRST_FILTER, PREPROCESSING, convolutions, indices, names

LAYERS = ("relu1_1", "relu1_2", "relu2_1", "relu2_2")


def under_torchvision_names(tensors):
    index = {"1_1": 0, "1_2": 2, "2_1": 5, "2_2": 7}
    return {
        f"features.{index[name]}.{kind}": tensors[f"conv{name}.{kind}"].clone()
        for name, _, _ in SHALLOW_VGG
        for kind in ("weight", "bias")
    }


def activations(x, tensors, preprocessing):
    """relu1_1 … relu2_2 of ``x`` in float64; ``tensors`` under Caffe's names."""
    x = x.double()
    if preprocessing == "caffe":  # BGR, 0–255, minus the mean
        x = 255 * x.flip(1) - torch.tensor([103.939, 116.779, 123.68], dtype=torch.float64).view(1, 3, 1, 1)
    else:
        mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], dtype=torch.float64).view(
            2, 1, 3, 1, 1
        )
        x = (x - mean) / std
    result = {}
    for name, _, _ in SHALLOW_VGG:
        if name == "2_1":
            x = F.max_pool2d(x, 2)
        x = F.conv2d(x, tensors[f"conv{name}.weight"].double(), tensors[f"conv{name}.bias"].double(), padding=1).relu()
        result[f"relu{name}"] = x
    return result


def test_caffe_npz(vgg_file, vgg_tensors):
    x = torch.rand(2, 3, 21, 18)
    result = VGG16Features(vgg_file, LAYERS)(x)
    expected = activations(x, vgg_tensors, "caffe")
    assert list(result) == list(LAYERS)
    for layer in LAYERS:
        assert error(result[layer], expected[layer]) < 1e-5


@pytest.mark.parametrize("suffix", ["pth", "wrapped.pth", "safetensors"])
def test_torchvision_files(tmp_path, vgg_tensors, suffix):
    path, tensors = tmp_path / f"vgg16.{suffix}", under_torchvision_names(vgg_tensors)
    if suffix == "safetensors":
        save_file(tensors, path)
    else:
        torch.save({"state_dict": tensors} if suffix.startswith("wrapped") else tensors, path)
    x = torch.rand(1, 3, 16, 16)
    expected = activations(x, vgg_tensors, "torchvision")["relu2_2"]
    assert error(VGG16Features(path, ["relu2_2"])(x)["relu2_2"], expected) < 1e-5


def test_preprocessing_can_be_told(tmp_path, vgg_tensors):
    path = tmp_path / "caffe_weights_under_torchvision_names.pth"
    torch.save(under_torchvision_names(vgg_tensors), path)
    x = torch.rand(1, 3, 16, 16)
    result = VGG16Features(path, ["relu2_2"], preprocessing="caffe")(x)["relu2_2"]
    assert error(result, activations(x, vgg_tensors, "caffe")["relu2_2"]) < 1e-5
    with pytest.raises(ValueError, match="pixels"):
        VGG16Features(path, ["relu2_2"], preprocessing="pixels")


def genuine(first_filter):
    """``conv1_1.weight`` with a published first filter."""
    weight = 0.1 * torch.randn(64, 3, 3, 3)
    weight[0] = torch.tensor(FIRST_FILTER[first_filter]).view(3, 3, 3)
    return weight


RENAMINGS = {
    "torchvision": lambda name: name,
    "data-parallel": lambda name: f"module.{name}",
    "parallel-features": lambda name: name.replace("features.", "features.module."),
    "compiled": lambda name: f"_orig_mod.{name}",
    "in-a-loss": lambda name: f"loss.vgg.{name}",
    "features-only": lambda name: name.removeprefix("features."),
    "parallel-features-only": lambda name: name.replace("features.", "module."),
    "slices": lambda name: name.replace("features.", "slice1." if name < "features.5" else "slice2."),
}


@pytest.mark.parametrize("published", ["caffe", "caffe-rgb", "torchvision"])
@pytest.mark.parametrize("renaming", RENAMINGS)
def test_published_weights_are_known_under_every_name(tmp_path, vgg_tensors, renaming, published):
    """Caffe's weights under torchvision's names would give features 32 times too small."""
    first = genuine(published.removesuffix("-rgb"))
    tensors = {**vgg_tensors, "conv1_1.weight": first}
    stored = {**tensors, "conv1_1.weight": first.flip(1) if published == "caffe-rgb" else first}
    renamed = {RENAMINGS[renaming](name): tensor for name, tensor in under_torchvision_names(stored).items()}
    torch.save(renamed, tmp_path / "vgg.pth")
    x = torch.rand(1, 3, 16, 16)
    expected = activations(x, tensors, published.removesuffix("-rgb"))["relu2_2"]
    assert error(VGG16Features(tmp_path / "vgg.pth", ["relu2_2"])(x)["relu2_2"], expected) < 1e-5


@pytest.mark.parametrize("prefix", ["", "module.", "net.vgg."])
@pytest.mark.parametrize("published", ["caffe", "torchvision"])
def test_published_weights_are_known_under_caffes_names(tmp_path, vgg_tensors, published, prefix):
    tensors = {**vgg_tensors, "conv1_1.weight": genuine(published)}
    path, x = tmp_path / "vgg.safetensors", torch.rand(1, 3, 16, 16)
    save_file({prefix + name: tensor.half() for name, tensor in tensors.items()}, path)
    expected = activations(x, tensors, published)["relu2_2"]
    assert error(VGG16Features(path, ["relu2_2"])(x)["relu2_2"], expected) < 2e-3


def test_a_classifier_after_dropouts_is_caffes(tmp_path, vgg_tensors):
    tensors = {**under_torchvision_names(vgg_tensors), "classifier.1.weight": torch.full((4, 4), torch.nan)}
    torch.save(tensors, tmp_path / "vgg.pth")
    x = torch.rand(1, 3, 16, 16)
    expected = activations(x, vgg_tensors, "caffe")["relu1_2"]
    assert error(VGG16Features(tmp_path / "vgg.pth", ["relu1_2"])(x)["relu1_2"], expected) < 1e-5


def stub(indices, batch_norm):
    """The names of a VGG's features; no tensor of them is needed to tell what they are."""
    tensors = {
        f"features.{i}.{kind}": torch.zeros([1] * (4 if kind == "weight" else 1))
        for i in indices
        for kind in ("weight", "bias")
    }
    if batch_norm:
        for i in indices:
            tensors |= {f"features.{i + 1}.{kind}": torch.zeros(1) for kind in ("weight", "bias", "running_mean")}
    return tensors


OTHERS = {
    "VGG-19": [0, 2, 5, 7, 10, 12, 14, 16, 19, 21, 23, 25, 28, 30, 32, 34],
    "VGG-13": [0, 2, 5, 7, 10, 12, 15, 17, 20, 22],
    "VGG-11": [0, 3, 6, 8, 11, 13, 16, 18],
    "VGG-16 with batch norm": [0, 3, 7, 10, 14, 17, 20, 24, 27, 30, 34, 37, 40],
    "VGG-19 with batch norm": [0, 3, 7, 10, 14, 17, 20, 23, 27, 30, 33, 36, 40, 43, 46, 49],
    "another network": [0, 3, 6, 8, 10],  # AlexNet
}


@pytest.mark.parametrize("renaming", RENAMINGS)
@pytest.mark.parametrize("network", OTHERS)
def test_another_network_is_refused_by_name(tmp_path, network, renaming):
    tensors = stub(OTHERS[network], network.endswith("norm"))
    torch.save({RENAMINGS[renaming](name): tensor for name, tensor in tensors.items()}, tmp_path / "net.pth")
    with pytest.raises(InputError, match=rf"net\.pth: holds {network}; give the weights of VGG-16"):
        VGG16Features(tmp_path / "net.pth", ["relu1_1"])


def test_vgg19_is_refused_under_caffes_names_too(tmp_path, vgg_tensors):
    deeper = {f"conv{stage}_{i}.weight": torch.zeros(1) for stage in (3, 4, 5) for i in (1, 2, 3, 4)}
    save_file({**vgg_tensors, **deeper}, tmp_path / "net.safetensors")
    with pytest.raises(InputError, match="holds VGG-19"):
        VGG16Features(tmp_path / "net.safetensors", ["relu2_2"])


@pytest.mark.parametrize(
    "names", [["conv1.weight", "layer1.0.conv1.weight"], ["classifier.0.weight"], ["0.bias"]], ids=str
)
def test_a_file_without_vgg_is_refused(tmp_path, names):
    torch.save({name: torch.zeros(4, 4, 1, 1) for name in names}, tmp_path / "net.pth")
    with pytest.raises(InputError, match=f"holds no VGG-16.*its first tensor is {names[0]}"):
        VGG16Features(tmp_path / "net.pth", ["relu1_1"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, vgg_tensors, value):
    tensors = {**vgg_tensors, "conv1_2.bias": torch.full((64,), value)}
    save_file(tensors, tmp_path / "vgg.safetensors")
    with pytest.raises(InputError, match="conv1_2 has values that are not finite"):
        VGG16Features(tmp_path / "vgg.safetensors", ["relu2_2"])


def test_the_command_line_knows_each_preprocessing():
    parser = argparse.ArgumentParser()
    add_vgg(parser)
    (option,) = (action for action in parser._actions if action.dest == "vgg_preprocessing")
    assert option.choices == sorted(PREPROCESSING) and option.default is None


def test_fetches_once_and_keeps_the_convolutions(tmp_path, monkeypatch, vgg_tensors):
    asked = []

    def download(url, model_dir, **kwargs):
        asked.append(url)
        assert kwargs["weights_only"] and kwargs["check_hash"]
        return {**under_torchvision_names(vgg_tensors), "classifier.0.weight": torch.zeros(8, 8)}

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    for _ in range(2):
        features = VGG16Features(layers=["relu1_2"])
        assert sum(parameter.numel() for parameter in features.parameters()) == (3 * 9 + 1 + 64 * 9 + 1) * 64
    assert asked == [vgg.TORCHVISION_URLS["vgg16"]]
    (kept,) = (path for path in tmp_path.rglob("*") if path.is_file())
    assert set(load_file(kept)) == set(under_torchvision_names(vgg_tensors))


def test_no_network_is_told(tmp_path, monkeypatch):
    def unreachable(*arguments, **kwargs):
        raise OSError("Name or service not known")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", unreachable)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(InputError, match=r"could not be fetched .*Name or service.*--vgg"):
        VGG16Features()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_layer_beyond_the_weights_is_refused_by_name(vgg_file):
    with pytest.raises(InputError, match=r"no conv3_1, so it cannot give relu3_3, relu4_3"):
        VGG16Features(vgg_file)


def test_a_bias_without_its_weight_is_no_layer(tmp_path, vgg_tensors):
    path = tmp_path / "vgg.safetensors"
    save_file({**vgg_tensors, "conv3_1.bias": torch.zeros(256)}, path)
    with pytest.raises(InputError, match="no conv3_1"):
        VGG16Features(path, ["relu3_1"])


def test_other_shapes_are_refused(tmp_path, vgg_tensors):
    path = tmp_path / "vgg.safetensors"
    save_file({**vgg_tensors, "conv1_2.weight": torch.zeros(32, 64, 3, 3)}, path)
    with pytest.raises(InputError, match=r"conv1_2 has weight \[32, 64, 3, 3\]"):
        VGG16Features(path, ["relu2_2"])


@pytest.mark.parametrize("layers", [["relu9_9"], ["relu1_2", "pool6"], ["conv3_4"], []], ids=str)
def test_unknown_layers_are_refused(vgg_file, layers):
    with pytest.raises(ValueError, match="no such VGG-16 layer"):
        VGG16Features(vgg_file, layers)


def test_gradients_flow_to_the_image_alone(vgg_file):
    features = VGG16Features(vgg_file, ["relu2_2"]).train()
    x = torch.rand(1, 3, 16, 16, requires_grad=True)
    features(x)["relu2_2"].sum().backward()
    assert x.grad.any()
    assert not any(parameter.requires_grad for parameter in features.parameters())


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_computes_no_deeper_than_asked(vgg_file, backend):
    features = VGG16Features(vgg_file, ["relu1_2", "relu2_2"])
    features.convs["2_1"].weight.fill_(float("nan"))  # what is computed with it is seen
    with use_backend(backend):
        assert list(features(torch.rand(1, 3, 16, 16), ["relu1_2"])) == ["relu1_2"]
        assert features(torch.rand(1, 3, 16, 16), ["relu1_2"])["relu1_2"].isfinite().all()
        assert features(torch.rand(1, 3, 16, 16), ["relu2_2"])["relu2_2"].isnan().any()
    with pytest.raises(ValueError, match="relu2_1"):
        features(torch.rand(1, 3, 16, 16), ["relu2_1"])


def test_layers_of_the_paper_stand_where_torchvision_has_them():
    index = vgg.TORCHVISION_INDEX
    assert [index[name] + 1 for name in ("1_2", "2_2", "3_3", "4_3")] == [3, 8, 15, 22]  # the ReLU after each


# VGG-19, and layers other than those after a ReLU


def vgg19_tensors(depth=16):
    """Random weights of VGG-19's first convolutions, under Caffe's names."""
    generator = torch.Generator().manual_seed(4)
    tensors = {}
    for name, c_in, c_out in convolutions("VGG-19")[:depth]:
        tensors[f"conv{name}.weight"] = torch.randn(c_out, c_in, 3, 3, generator=generator) * (2 / (9 * c_in)) ** 0.5
        tensors[f"conv{name}.bias"] = torch.randn(c_out, generator=generator) * 0.01
    return tensors


def saved_vgg19(path, tensors):
    """``tensors`` in a file, under Caffe's names in ``.npz`` and ``.safetensors``, else under torchvision's."""
    if path.suffix == ".npz":
        np.savez(path, **{name: tensor.numpy() for name, tensor in tensors.items()})
    elif path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        prefix = "" if path.stem == "features" else "features."
        index = dict(zip(names("VGG-19"), indices("VGG-19", batch_norm=False)))
        renamed = {f"{prefix}{index[name[4:7]]}.{name[8:]}": tensor for name, tensor in tensors.items()}
        if prefix:
            renamed["classifier.0.weight"] = torch.zeros(4, 4)
        torch.save(renamed, path)
    return path


@pytest.mark.parametrize("file", ["whole.pth", "features.pth", "caffe.npz", "caffe.safetensors"])
@pytest.mark.parametrize("average_pool", [False, True], ids=["max", "average"])
def test_vgg19_gives_every_layer(tmp_path, file, average_pool):
    tensors, x = vgg19_tensors(depth=7), torch.rand(1, 3, 18, 21)
    path = saved_vgg19(tmp_path / file, tensors)
    layers = [
        layer for layer in vgg.taps_of("VGG-19") if layer[4:] < "3_4" and layer not in ("pool3", "pool4", "pool5")
    ]
    result = VGGFeatures("vgg19", path, layers, preprocessing="torchvision", average_pool=average_pool)(x)
    assert list(result) == layers and layers[:5] == ["conv1_1", "relu1_1", "conv1_2", "relu1_2", "pool1"]
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).double().view(2, 1, 3, 1, 1)
    y = (x.double() - mean) / std
    for layer in layers:
        if layer.startswith("conv"):
            y = F.conv2d(y, tensors[f"{layer}.weight"].double(), tensors[f"{layer}.bias"].double(), padding=1)
        else:
            y = y.relu() if layer.startswith("relu") else (F.avg_pool2d if average_pool else F.max_pool2d)(y, 2)
        assert error(result[layer], y) < 1e-5


def test_both_have_all_layers():
    for arch, deepest, layers in (("VGG-16", "5_3", 13 + 13 + 5), ("VGG-19", "5_4", 16 + 16 + 5)):
        taps = vgg.taps_of(arch)
        assert len(taps) == layers and list(taps)[-3:] == [f"conv{deepest}", f"relu{deepest}", "pool5"]


def test_vgg16_features_are_vgg_features(vgg_file):
    short, x = VGG16Features(vgg_file, LAYERS), torch.rand(1, 3, 16, 16)
    features = VGGFeatures("vgg16", vgg_file, LAYERS)
    assert isinstance(short, VGGFeatures) and list(short.state_dict()) == list(features.state_dict())
    assert all(torch.equal(short(x)[layer], features(x)[layer]) for layer in LAYERS)


@pytest.mark.parametrize("network", [*OTHERS, "VGG-16"])
def test_another_network_than_vgg19_is_refused_by_name(tmp_path, network):
    known = {**OTHERS, "VGG-16": [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]}
    torch.save(stub(known[network], network.endswith("norm")), tmp_path / "net.pth")
    if network == "VGG-19":
        with pytest.raises(InputError, match=r"conv1_1 has weight \[1, 1, 1, 1\].*VGG-19's are"):
            VGGFeatures("vgg19", tmp_path / "net.pth", ["relu1_1"])
        return
    with pytest.raises(InputError, match=rf"net\.pth: holds {network}; give the weights of VGG-19"):
        VGGFeatures("vgg19", tmp_path / "net.pth", ["relu1_1"])


def test_wrong_arguments_get_one_sentence(tmp_path, vgg_file):
    with pytest.raises(ValueError, match="arch must be one of vgg16, vgg19, got 'vgg11'"):
        VGGFeatures("vgg11", vgg_file)
    with pytest.raises(ValueError, match="no such VGG-16 layer: conv3_4"):
        VGGFeatures("vgg16", vgg_file, "conv3_4")
    with pytest.raises(InputError, match=r"missing\.pth"):
        VGGFeatures("vgg19", tmp_path / "missing.pth")
    with pytest.raises(ValueError, match=r"images of 1×16 are too small .* at least 2×2 pixels"):
        VGGFeatures("vgg16", vgg_file, "relu2_1")(torch.rand(1, 3, 1, 16))


def test_vgg19_is_fetched_where_no_file_is_given(tmp_path, monkeypatch):
    asked = []

    def download(url, model_dir, **kwargs):
        asked.append(url)
        return torch.load(saved_vgg19(tmp_path / "whole.pth", vgg19_tensors(depth=2)))

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    VGGFeatures("vgg19", layers="conv1_2")
    assert asked == [vgg.TORCHVISION_URLS["vgg19"]]
    assert [path.name for path in tmp_path.joinpath("hub").rglob("*.safetensors")] == [
        "vgg19_features-dcbb9e9d.safetensors"
    ]


def test_without_preprocessing_the_network_sees_the_image_itself(vgg_file, vgg_tensors):
    x = torch.rand(1, 3, 16, 16)
    result = VGGFeatures("vgg16", vgg_file, "conv1_1", preprocessing="none")(x)["conv1_1"]
    weight, bias = vgg_tensors["conv1_1.weight"].double(), vgg_tensors["conv1_1.bias"].double()
    assert error(result, F.conv2d(x.double(), weight, bias, padding=1)) < 1e-5
