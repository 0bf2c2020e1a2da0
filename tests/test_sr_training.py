"""``fastperc sr train`` as a user runs it, and the small photos that its networks learn from."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from cases import error
from conftest import picture
from PIL import Image
from safetensors import safe_open

from fastperc import SRCNN, SuperResolutionNet, checkpoints, load, reference, save
from fastperc.photos.photo import Photo
from fastperc.training.step import train_step
from fastperc.training.super_resolution import SuperResolutionRecipe


@pytest.mark.parametrize("size", [(12, 9), (31, 50), (80, 64)], ids=lambda size: f"{size[0]}x{size[1]}")
def test_bicubic_is_pillows(size):
    """Pillow's cubic is the a = -½ one too, and antialiased."""
    channel = picture(64, 48).convert("L").convert("F")
    expected = torch.from_numpy(np.array(channel.resize(size[::-1], Image.Resampling.BICUBIC)))
    x = torch.from_numpy(np.array(channel))[None, None]
    assert error(reference.bicubic(x, size)[0, 0], expected) < 1e-5


def test_half_precision_is_resampled_in_float32():
    x = torch.rand(1, 3, 16, 16).half()
    assert torch.equal(reference.bicubic(x, (64, 64)), reference.bicubic(x.float(), (64, 64)))


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.5])
def test_gaussian_blur_is_the_sum_over_a_gaussian(sigma):
    """Against the two-dimensional sum, pixel by pixel, over the mirrored image."""
    x = torch.rand(2, 3, 14, 17, dtype=torch.float64)
    radius = int(np.ceil(4 * sigma))
    wide = torch.from_numpy(np.pad(x.numpy(), ((0, 0), (0, 0), (radius, radius), (radius, radius)), mode="reflect"))
    offsets = range(-radius, radius + 1)
    weights = {(i, j): np.exp(-(i * i + j * j) / (2 * sigma**2)) for i in offsets for j in offsets}
    expected = sum(
        weight * wide[:, :, radius + i : radius + i + 14, radius + j : radius + j + 17]
        for (i, j), weight in weights.items()
    ) / sum(weights.values())
    assert error(reference.gaussian_blur(x, sigma), expected) < 1e-12


@pytest.mark.parametrize("scale", [2, 4, 8])
def test_degraded_photos_are_small_and_have_levels(scale):
    x = Photo(picture(64, 48)).tensor()
    sharp, blurred = (reference.degrade(x, scale, blur) for blur in (0.0, 1.0))
    assert sharp.shape == (1, 3, 48 // scale, 64 // scale)
    for small in (sharp, blurred):
        assert torch.equal((small * 255).round() / 255, small)
    assert reference.tv_loss(blurred) < reference.tv_loss(sharp)


@pytest.fixture
def train(run, photo_folder, tmp_path):
    """Trains on the test's photos into ``tmp_path / NAME``, unless told otherwise."""

    def train(name, *options):
        basic = ["--data", photo_folder, "--out", tmp_path / name, "--device", "cpu", "--workers", 0]
        basic += ["--size", 64, "--batch", 1, "--iterations", 2]
        return run("sr", "train", *basic, *options)

    return train


def about(path):
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["training"])


@pytest.mark.parametrize(
    ("arch", "config"),
    [
        ("paper", {"scale": 4, "width": 64}),
        ("srcnn", {"scale": 4, "kernel_sizes": (9, 5, 5)}),
        ("srcnn-915", {"scale": 4, "kernel_sizes": (9, 1, 5)}),
    ],
)
def test_leaves_a_network_that_loads(train, tmp_path, arch, config):
    status, out, err = train("run", "--arch", arch)
    assert (status, out) == (0, "") and f"×4 · {arch} network · pixel loss" in err
    net = load(tmp_path / "run" / "model.safetensors")
    assert type(net) is (SuperResolutionNet if arch == "paper" else SRCNN) and net.config == config
    recipe = about(tmp_path / "run" / "model.safetensors")
    assert (recipe["step"], recipe["scale"], recipe["loss"], recipe["blur"]) == (2, 4, "pixel", 1.0)
    with Image.open(tmp_path / "run" / "previews" / "000002.png") as sheet:
        assert sheet.size == (4 * 68 - 4, 3 * 68 - 4), "what it sees, what it makes of that, the photos"


def test_feature_loss_from_a_trained_network_and_on(train, tmp_path, vgg_file):
    assert train("pixel", "--scale", 2, "--size", 32).status == 0
    start = tmp_path / "pixel" / "model.safetensors"
    options = ["--scale", 2, "--size", 32, "--loss", "feature", "--vgg", vgg_file, "--init", start, "--lr", 1e-9]
    status, _, err = train("feature", *options)
    assert status == 0 and "feature loss" in err
    trained, before = load(tmp_path / "feature" / "model.safetensors"), load(start)
    assert error(trained.head.weight, before.head.weight) < 1e-5, "it began there"
    assert about(tmp_path / "feature" / "model.safetensors")["init"] == "model.safetensors"
    start.unlink()
    assert train("feature", *options, "--iterations", 3, "--resume").status == 0, "and needs it no more"
    assert about(tmp_path / "feature" / "model.safetensors")["step"] == 3


def test_it_learns():
    """Sixty steps on one photo bring the error well below where it began, by pixels."""
    torch.manual_seed(0)
    recipe = SuperResolutionRecipe(data="", scale=2, size=64)
    _, _, loss, degrade = recipe.task()
    net = SuperResolutionNet(2, width=8)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    photos = Photo(picture(64, 64)).tensor()
    totals = [train_step(net, loss, optimizer, photos, degrade(photos), amp=False).total.item() for _ in range(60)]
    assert totals[-1] < 0.2 * totals[0]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--size", 66), "a side that is a multiple of 4, 64 pixels or more, not 66"),
        (("--size", 60), "a side that is a multiple of 4, 64 pixels or more, not 60"),
        (("--scale", 8), "a side that is a multiple of 8, 128 pixels or more, not 64"),
        (("--scale", 3), "argument --scale: invalid choice: 3"),
        (("--loss", "style"), "argument --loss: invalid choice: 'style'"),
        (("--init", "nowhere.safetensors"), "nowhere.safetensors: no such file"),
        (("--loss", "feature", "--vgg", "nowhere.npz"), "nowhere.npz: no such file"),
    ],
    ids=["not-a-multiple", "too-small", "too-small-x8", "scale", "loss", "init", "vgg"],
)
def test_what_cannot_be_is_refused(train, tmp_path, options, told):
    status, out, err = train("run", *options)
    assert (status, out) == (2, "") and told in err and len(err.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_another_network_cannot_be_started_from(train, tmp_path, sr_model):
    status, _, err = train("run", "--init", sr_model)
    assert status == 2 and "'width': 4}, which cannot start a SuperResolutionNet of {'scale': 4, 'width': 64}" in err


def test_a_style_is_not_resumed_as_super_resolution(train, tmp_path):
    out = tmp_path / "run"
    save(SuperResolutionNet(4, width=4), out / "checkpoint.safetensors", training=dict(style="a.jpg", data="b", step=3))
    status, _, err = train("run", "--resume")
    assert status == 2 and "not a checkpoint of such a training run" in err


def test_training_metadata_is_read_back(train, tmp_path):
    assert train("run", "--decay", "--seed", 7).status == 0
    recipe = checkpoints.read_training(tmp_path / "run" / "model.safetensors")
    assert recipe["decay"] is True and recipe["seed"] == 7 and "/" not in json.dumps(recipe)
