"""The loss network: every weight format, and activations against plain functions in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import SHALLOW_VGG, error
from safetensors.torch import load_file, save_file

from fastperc import InputError, VGG16Features, use_backend
from fastperc.models import vgg

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
    assert asked == [vgg.TORCHVISION_URL]
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


@pytest.mark.parametrize("layers", [["relu9_9"], ["relu1_2", "pool5"], []], ids=str)
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
