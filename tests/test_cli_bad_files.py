"""Bad photos, networks, weights, folders and outputs: one line on stderr, status 2, and no file written."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import picture
from PIL import Image

import fastperc
from fastperc.weights import STYLES

# Bad photos


def bad_photo(kind, path):
    if kind == "text":
        path.write_text("no image")
    elif kind == "empty":
        path.touch()
    elif kind == "truncated":
        picture(32, 24).save(path)
        path.write_bytes(path.read_bytes()[:-60])
    elif kind == "one pixel":
        picture(1, 1).save(path)
    elif kind == "dangling link":
        path.symlink_to("nowhere")
    elif kind == "folder without images":
        path.mkdir()
        (path / "notes.txt").touch()
    elif kind == "folder of a bad one":
        path.mkdir()
        (path / "bad.png").touch()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        assert kind == "missing"


BAD_PHOTOS = {
    "missing": "bad.png: no such file",
    "dangling link": "bad.png: no such file",
    "text": "bad.png: not an image",
    "empty": "bad.png: not an image",
    "truncated": "bad.png: damaged or cut short",
    "one pixel": "bad.png: 1×1 is too small; both sides need at least 16 pixels",
    "pipe": "bad.png: is a folder or a device",
}


@pytest.mark.parametrize("kind", [*BAD_PHOTOS, "folder without images", "folder of a bad one"])
def test_stylize_refuses_a_bad_photo(refused, here, model, kind):
    bad_photo(kind, here / "bad.png")
    folders = {"folder without images": "bad.png: no images", "folder of a bad one": "bad.png/bad.png: not an image"}
    refused("stylize", "bad.png", "-o", "new/out.png" if kind in BAD_PHOTOS else "new", "--model", model,
            says=(BAD_PHOTOS | folders)[kind])  # fmt: skip


@pytest.mark.parametrize("kind", BAD_PHOTOS)
def test_optimize_refuses_a_bad_photo(refused, here, vgg_options, kind):
    bad_photo(kind, here / "bad.png")
    refused("optimize", "bad.png", "--style", "photo.png", "-o", "new/out.png", *vgg_options, says=BAD_PHOTOS[kind])


@pytest.mark.parametrize("kind", sorted(BAD_PHOTOS.keys() - {"one pixel"}))  # a painting may have any size
def test_optimize_refuses_a_bad_painting(refused, here, vgg_options, kind):
    bad_photo(kind, here / "bad.png")
    refused("optimize", "photo.png", "--style", "bad.png", "-o", "new/out.png", *vgg_options, says=BAD_PHOTOS[kind])


@pytest.mark.parametrize("kind", ["missing", "text", "truncated", "pipe"])
def test_train_refuses_a_bad_painting(refused, here, photo_folder, vgg_options, kind):
    bad_photo(kind, here / "bad.png")
    refused("train", "--style", "bad.png", "--data", photo_folder, "--out", "new/run", "--size", 16, *vgg_options,
            says=BAD_PHOTOS[kind])  # fmt: skip


@pytest.mark.parametrize("kind", [*sorted(BAD_PHOTOS.keys() - {"one pixel"}), "folder without images"])
def test_upscale_refuses_a_bad_photo(refused, here, sr_model, kind):
    bad_photo(kind, here / "bad.png")
    says = (BAD_PHOTOS | {"folder without images": "bad.png: no images"})[kind]
    refused("sr", "upscale", "bad.png", "-o", "new/out.png" if kind in BAD_PHOTOS else "new", "--model", sr_model,
            says=says)  # fmt: skip


def test_upscale_refuses_a_photo_too_large(refused, here, sr_model):
    Image.new("L", (4000, 3000)).save("large.png")
    refused("sr", "upscale", "large.png", "--model", sr_model, says="large.png: 16000×12000 is larger than")


@pytest.mark.parametrize(
    ("folder", "says"),
    [
        ("nowhere", "nowhere: no such folder"),
        ("empty", "empty: no images in this folder"),
        ("bad", "bad.png: not an image"),
        (".", "photo.png: 32×24 is too small; both sides need at least 64 pixels"),
    ],
)
def test_eval_refuses_a_bad_folder(refused, here, folder, says):
    (here / "empty").mkdir()
    if folder == "bad":
        (here / "bad").mkdir()
        (here / "bad" / "bad.png").touch()
    refused("sr", "eval", "--data", folder, "--methods", "bicubic", "--csv", "new/a.csv", says=says)


def test_super_resolution_refuses_other_networks(refused, model, sr_model):
    refused(
        "sr", "upscale", "photo.png", "--model", model, says="TransformNet, which is not a super-resolution network"
    )
    refused("sr", "upscale", "photo.png", "--model", sr_model, "--scale", 8, says="enlarges 4 times, not 8")
    refused("stylize", "photo.png", "--model", sr_model, says="SuperResolutionNet, which is not a style network")


# Bad models


class Touch:
    """Unpickling it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def bad_model(kind, path, model):
    if kind == "folder":
        path.mkdir()
    elif kind == "truncated safetensors":
        path.write_bytes(model.read_bytes()[:-100])
    elif kind == "garbage":
        path.write_bytes(np.random.default_rng(0).bytes(5000))
    elif kind == "text":
        path.write_text("hello")
    elif kind == "photo":
        picture(32, 24).save(path, "PNG")
    elif kind == "truncated state_dict":
        torch.save(torch.nn.Linear(2, 3).state_dict(), path)
        path.write_bytes(path.read_bytes()[:-100])
    elif kind == "damaged state_dict":  # damages the zip file's list of entries
        torch.save(torch.nn.Linear(2, 3).state_dict(), path)
        path.write_bytes(path.read_bytes().replace(b"PK\1\2", b"PK\1\3"))
    elif kind == "another state_dict":
        torch.save(torch.nn.Linear(2, 3).state_dict(), path)
    elif kind == "numbered tensors":
        torch.save({0: torch.rand(3)}, path)
    elif kind == "module":
        torch.save(torch.nn.Linear(2, 3), path)
    elif kind == "super-resolution":
        fastperc.save(fastperc.SuperResolutionNet(4, width=2), path)
    elif kind == "not a number":
        net = fastperc.TransformNet("instance", width=4)
        state = {name: tensor.fill_(float("nan")) for name, tensor in net.state_dict().items()}
        from safetensors.torch import safe_open, save_file

        with safe_open(model, "pt") as file:
            save_file(state, path, file.metadata())
    elif kind == "code":
        torch.save({"weight": Touch(path.with_name("executed"))}, path)
    elif kind == "code in an old file":
        torch.save({"weight": Touch(path.with_name("executed"))}, path, _use_new_zipfile_serialization=False)
    elif kind == "code in a bare pickle":
        import pickle

        path.write_bytes(pickle.dumps(Touch(path.with_name("executed"))))
    else:
        assert kind == "missing"


BAD_MODELS = {
    "missing": "no such file",
    "folder": "is a folder",
    "truncated safetensors": "bad.model: damaged or cut short",
    "garbage": "not a file of tensors (.safetensors, .npz or PyTorch), or damaged",
    "text": "not a file of tensors",
    "photo": "not a file of tensors",
    "truncated state_dict": "not a file of tensors",
    "damaged state_dict": "not a file of tensors",
    "another state_dict": "neither a network saved by fastperc nor a state_dict of PyTorch's fast_neural_style example",
    "numbered tensors": "neither a network saved by fastperc nor",
    "module": "holds more than tensors",
    "super-resolution": "holds a SuperResolutionNet, which is not a style network",
    "not a number": "has values that are not finite",
    "code": "holds more than tensors, so opening it could run somebody's code",
    "code in an old file": "holds more than tensors",
    "code in a bare pickle": "not a file of tensors",
}


@pytest.mark.parametrize("kind", BAD_MODELS)
def test_stylize_refuses_a_bad_model(refused, here, model, kind):
    bad_model(kind, here / "bad.model", model)
    refused("stylize", "photo.png", "-o", "new/out.png", "--model", "bad.model", says=BAD_MODELS[kind])
    assert not Path("executed").exists()


def test_an_unknown_style_is_refused(refused):
    refused(
        "stylize",
        "photo.png",
        "--style",
        "nonesuch",
        says=f"no style 'nonesuch'; use {', '.join(STYLES)} or --model FILE",
    )


# Bad VGG weights, data and layers


@pytest.mark.parametrize("command", ["optimize", "train"])
@pytest.mark.parametrize(
    ("vgg", "layers", "says"),
    [
        ("missing.npz", "relu2_2", "missing.npz: no such file"),
        ("photo.png", "relu2_2", "photo.png: not a file of tensors"),
        (None, "relu1_2,relu4_3", "has no conv3_1, so it cannot give relu4_3"),
        (None, "relu1_2,relu9_9", "no such VGG-16 layer: relu9_9; there are "),
        (None, " , ", "--style-layers: no name given"),
    ],
    ids=["missing", "photo", "too-shallow", "unknown-layer", "no-layer"],
)
def test_bad_vgg(refused, photo_folder, vgg_file, command, vgg, layers, says):
    options = "--vgg", vgg or vgg_file, "--style-layers", layers, "--content-layer", "relu2_2", "--style", "photo.png"
    if command == "optimize":
        refused("optimize", "photo.png", "-o", "new/out.png", *options, says=says)
    else:
        refused("train", "--data", photo_folder, "--out", "new/run", "--size", 16, *options, says=says)


@pytest.mark.parametrize("kind", ["missing", "empty", "file", "unreadable photos"])
def test_train_refuses_bad_data(refused, here, vgg_options, kind):
    if kind == "file":
        Path("data").touch()
    elif kind != "missing":
        Path("data").mkdir()
    if kind == "unreadable photos":
        Path("data/a.jpg").write_bytes(b"no image")
    says = {"empty": "data: no images in this folder", "unreadable photos": "none of the 1 images can be read"}
    refused("train", "--style", "photo.png", "--data", "data", "--out", "run", "--size", 16, *vgg_options,
            says=says.get(kind, "data: no such folder"))  # fmt: skip


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--data", "nowhere"], "nowhere: no such folder"),
        (["--data", "."], ": no images in this folder"),
        (["--init", "nowhere"], "nowhere: no such file"),
    ],
    ids=["data", "no-photos", "init"],
)
@pytest.mark.parametrize("command", ["train", "figure2", "sr train"])
def test_nothing_is_downloaded_before_the_files_are_there(
    refused, here, monkeypatch, photo_folder, command, options, says
):
    def fetch():
        raise AssertionError

    monkeypatch.setattr("fastperc.models.vgg.fetch_torchvision_weights", fetch)
    if command == "figure2" and "--init" in options:
        pytest.skip("figure2 has no --init")
    Path("photo.png").unlink()
    task = ["--loss", "feature"] if command == "sr train" else ["--style", photo_folder / "0.jpg"]
    refused(*command.split(), "--data", photo_folder, *task, *options, "--out", "new/run", says=says)


def test_train_without_options_names_the_run_in_the_folder(refused, here):
    Path("run").mkdir()
    Path("run/checkpoint.safetensors").touch()
    for command in (["train"], ["sr", "train"]):
        refused(*command, "--out", "run", says="run: holds a run, which --resume continues; to begin another, the foll")


def test_train_refuses_a_folder_that_holds_a_run(refused, here, photo_folder, vgg_options):
    Path("run").mkdir()
    Path("run/checkpoint.safetensors").write_bytes(b"another run")
    options = "--style", "photo.png", "--data", photo_folder, "--out", "run", "--size", 16, *vgg_options
    refused("train", *options, says="run: holds a run already; continue it with --resume")
    refused("train", *options, "--resume", says="run/checkpoint.safetensors: not a file of tensors")


def test_train_refuses_crops_too_small_for_the_network(refused, photo_folder, vgg_options):
    refused("train", "--style", "photo.png", "--data", photo_folder, "--out", "run", "--size", 15, *vgg_options,
            says="at least 16 pixels, not 15")  # fmt: skip


# Bad outputs


LONG = "x" * 300
BAD_OUTPUTS = {
    "file/out.png": "file/out.png: cannot be written (",
    "file/new/out.png": "file/new/out.png: cannot be written (",
    "/proc/out.png": "/proc/out.png: cannot be written (",
    "/proc/new/out.png": "/proc/new/out.png: cannot be written (",
    f"{LONG}.png": "cannot be written (File name too long)",
    f"new/{LONG}/out.png": "cannot be written (File name too long)",
    "full.png": "full.png: is a folder or a device; give a file name",
    "/dev/full": "/dev/full: the name has no suffix; use .png or .jpg",
    "out.xyz": "out.xyz: cannot write an image as '.xyz'; use .png or .jpg",
    "photo.png": "photo.png: would overwrite",
    "": "argument -o/--out: the name is empty",
}
# For stylize these are output folders.
BAD_FOR_OPTIMIZE = {"folder.png": "folder.png: is a folder", "out": "out: the name has no suffix"}


@pytest.mark.parametrize(
    ("command", "out", "says"),
    [("stylize", *case) for case in BAD_OUTPUTS.items()]
    + [("optimize", *case) for case in (BAD_OUTPUTS | BAD_FOR_OPTIMIZE).items()],
    ids=lambda value: value.replace(LONG, "long"),
)
def test_bad_output(refused, here, model, vgg_options, command, out, says):
    Path("file").touch()
    Path("folder.png").mkdir()
    Path("full.png").symlink_to("/dev/full")
    network = ["--model", model] if command == "stylize" else ["--style", "photo.png", *vgg_options]
    refused(command, "photo.png", "-o", out, *network, says=says)


@pytest.mark.parametrize("out", ["file", "file/run", "/proc/run", "/dev/full", ""])
def test_train_refuses_a_bad_output(refused, here, photo_folder, vgg_options, out):
    Path("file").touch()
    refused("train", "--style", "photo.png", "--data", photo_folder, "--out", out, "--size", 16, *vgg_options,
            says="cannot be written (" if out else "argument --out: the name is empty")  # fmt: skip
