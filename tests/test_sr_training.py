"""``fastperc sr train`` as a user runs it."""

from __future__ import annotations

import json

import pytest
import torch
from cases import error
from pictures import picture
from PIL import Image
from training_runs import training_metadata

from fastperc import SRCNN, SuperResolutionNet, checkpoints, load, save
from fastperc.photos.photo import Photo
from fastperc.training.step import train_step
from fastperc.training.super_resolution import SuperResolutionRecipe


@pytest.fixture
def train(run, photo_folder, tmp_path):
    """Trains on the test's photos into ``tmp_path / NAME``; later options replace earlier ones."""

    def train(name, *options):
        basic = ["--data", photo_folder, "--out", tmp_path / name, "--device", "cpu", "--workers", 0]
        basic += ["--size", 64, "--batch", 1, "--iterations", 2]
        return run("sr", "train", *basic, *options)

    return train


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
    recipe = training_metadata(tmp_path / "run" / "model.safetensors")
    assert (recipe["step"], recipe["scale"], recipe["loss"], recipe["blur"]) == (2, 4, "pixel", 1.0)
    with Image.open(tmp_path / "run" / "previews" / "000002.png") as sheet:
        assert sheet.size == (4 * 68 - 4, 3 * 68 - 4), "rows: inputs, outputs, photos"


def test_the_second_upsampling(train, tmp_path):
    assert train("run", "--upsample", "nearest").status == 0
    net = load(tmp_path / "run" / "model.safetensors")
    assert net.config == {"scale": 4, "width": 64, "upsample": "nearest"} and net.up[0].upsample == "nearest"
    assert train("run", "--resume", "--iterations", 3).status == 0
    status, _, err = train("run", "--resume", "--iterations", 4, "--upsample", "transposed")
    assert status == 2 and "upsample" in err


def test_feature_loss_from_a_trained_network_and_on(train, tmp_path, vgg_file):
    assert train("pixel", "--scale", 2, "--size", 32).status == 0
    start = tmp_path / "pixel" / "model.safetensors"
    options = ["--scale", 2, "--size", 32, "--loss", "feature", "--vgg", vgg_file, "--init", start, "--lr", 1e-9]
    status, _, err = train("feature", *options)
    assert status == 0 and "feature loss" in err
    trained, before = load(tmp_path / "feature" / "model.safetensors"), load(start)
    assert error(trained.head.weight, before.head.weight) < 1e-5, "it started there"
    assert training_metadata(tmp_path / "feature" / "model.safetensors")["init"] == "model.safetensors"
    start.unlink()
    assert train("feature", *options, "--iterations", 3, "--resume").status == 0, (
        "and no longer needs the network it started from"
    )
    assert training_metadata(tmp_path / "feature" / "model.safetensors")["step"] == 3


def test_it_learns():
    """Sixty steps on one photo bring the error well below where it began, by pixels."""
    torch.manual_seed(0)
    recipe = SuperResolutionRecipe(data="", scale=2, size=64)
    _, _, loss, degrade, _ = recipe.task()
    net = SuperResolutionNet(2, width=8)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    photos = Photo(picture(64, 64)).tensor()
    totals = [train_step(net, loss, optimizer, photos, degrade(photos), amp=False).total.item() for _ in range(60)]
    assert totals[-1] < 0.2 * totals[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--size", 66), "a side that is a multiple of 4, 64 pixels or more, not 66"),
        (("--size", 60), "a side that is a multiple of 4, 64 pixels or more, not 60"),
        (("--scale", 8), "a side that is a multiple of 8, 128 pixels or more, not 64"),
        (("--upsample", "nearest", "--arch", "srcnn"), "--upsample is for the paper's network, not for srcnn"),
        (("--scale", 3), "argument --scale: invalid choice: 3"),
        (("--loss", "style"), "argument --loss: invalid choice: 'style'"),
        (("--init", "nowhere.safetensors"), "nowhere.safetensors: no such file"),
        (("--loss", "feature", "--vgg", "nowhere.npz"), "nowhere.npz: no such file"),
    ],
    ids=["not-a-multiple", "too-small", "too-small-x8", "upsample", "scale", "loss", "init", "vgg"],
)
def test_bad_options_are_refused(train, tmp_path, options, message):
    status, out, err = train("run", *options)
    assert (status, out) == (2, "") and message in err and len(err.splitlines()) == 1
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
