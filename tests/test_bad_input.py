"""Bad input is one line on stderr, a status, and nothing else: no traceback, nothing half-written."""

from __future__ import annotations

import errno
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import picture
from PIL import Image

import fastperc
from fastperc.weights import STYLES


@pytest.fixture
def refused(run, here):
    """Runs a command that must fail in one line on stderr and leave no trace in the folder."""

    def refused(*arguments, says, status=2):
        before = contents(here)
        result = run(*arguments)
        lines = result.err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("fastperc"), result.err
        assert says in lines[0]
        assert (result.status, result.out) == (status, "")
        assert contents(here) == before

    return refused


def contents(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


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
    "one pixel": "bad.png: 1×1 is too small, both sides need 16 pixels",
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
        (".", "photo.png: 32×24 is too small, both sides need 64 pixels"),
    ],
)
def test_eval_refuses_a_bad_folder(refused, here, folder, says):
    (here / "empty").mkdir()
    if folder == "bad":
        (here / "bad").mkdir()
        (here / "bad" / "bad.png").touch()
    refused("sr", "eval", "--data", folder, "--methods", "bicubic", "--csv", "new/a.csv", says=says)


def test_super_resolution_refuses_other_networks(refused, model, sr_model):
    refused("sr", "upscale", "photo.png", "--model", model, says="TransformNet, which is no super-resolution network")
    refused("sr", "upscale", "photo.png", "--model", sr_model, "--scale", 8, says="enlarges 4 times, not 8")
    refused("stylize", "photo.png", "--model", sr_model, says="SuperResolutionNet, which is no style network")


# Bad models


class Touch:
    """Unpickling it makes a file."""

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
    elif kind == "damaged state_dict":  # its list of entries
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
    "super-resolution": "holds a SuperResolutionNet, which is no style network",
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
    refused("stylize", "photo.png", "--style", "nonesuch", says=f"no style 'nonesuch'; there are {', '.join(STYLES)}")


# Bad VGG weights, data and layers


@pytest.mark.parametrize("command", ["optimize", "train"])
@pytest.mark.parametrize(
    ("vgg", "layers", "says"),
    [
        ("missing.npz", "relu2_2", "missing.npz: no such file"),
        ("photo.png", "relu2_2", "photo.png: not a file of tensors"),
        (None, "relu1_2,relu4_3", "has no conv3_1, so it cannot give relu4_3"),
        (None, "relu1_2,relu9_9", "no such VGG-16 layer: relu9_9; there are relu1_1"),
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
    "full.png": "full.png: is a folder or a device, a file name is needed",
    "/dev/full": "/dev/full: no image format is written as 'a name without a suffix'",
    "out.xyz": "out.xyz: no image format is written as '.xyz'",
    "photo.png": "photo.png: would overwrite",
    "": "argument -o/--out: an empty name",
}
# To stylize, these are folders to write photo.png in.
BAD_FOR_OPTIMIZE = {"folder.png": "folder.png: is a folder", "out": "out: no image format is written as 'a name"}


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
            says="cannot be written (" if out else "argument --out: an empty name")  # fmt: skip


# Failures while running: status 1


FAILURES = {
    "full disk": (OSError(errno.ENOSPC, "No space left on device"), "new/out.png: No space left on device"),
    "encoder": (OSError("encoder error -2"), "new/out.png: encoder error -2"),
    "memory": (MemoryError(), "out of memory; try a smaller --size"),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_a_failed_write_is_one_line_and_leaves_nothing_half_written(refused, here, model, monkeypatch, kind):
    failure, says = FAILURES[kind]

    def save(self, path, *args, **options):
        path.write_bytes(b"half of a")
        raise failure

    monkeypatch.setattr(Image.Image, "save", save)
    Path("new").mkdir()
    Path("new/out.png").write_bytes(b"what was there")
    refused("stylize", "photo.png", "-o", "new/out.png", "--model", model, says=says, status=1)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (
            RuntimeError("DefaultCPUAllocator:\n can't allocate memory: you tried"),
            "out of memory; try a smaller --size",
        ),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "out of memory; try a smaller --size"),
        (RuntimeError("first line\nsecond line"), "fastperc stylize: first line second line"),
        (FloatingPointError("not a number"), "fastperc stylize: not a number"),
    ],
    ids=["cpu-memory", "cuda-memory", "runtime", "arithmetic"],
)
def test_a_failure_of_the_network_is_one_line(refused, here, model, monkeypatch, error, says):
    def tiles(self, *arguments):
        raise error

    monkeypatch.setattr("fastperc.engine.engine.Engine.tiles", tiles)
    refused("stylize", "photo.png", "-o", "new.png", "--model", model, says=says, status=1)


def test_a_photo_too_large_for_memory_is_not_called_damaged(refused, model, monkeypatch):
    def load(self):
        raise MemoryError

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", load)
    refused("stylize", "photo.png", "-o", "new.png", "--model", model, says="out of memory", status=1)


def test_an_interruption_is_one_line(refused, here, model, monkeypatch):
    def tiles(self, *arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastperc.engine.engine.Engine.tiles", tiles)
    refused("stylize", "photo.png", "-o", "new.png", "--model", model, says="fastperc stylize: interrupted", status=130)


def test_a_full_disk_for_real(here, model):
    picture(400, 300).save("photo.png")
    Path("out.png").write_bytes(b"what was there")
    before = contents(here)
    limited = ["sh", "-c", 'ulimit -f 100; exec "$@"', "sh", sys.executable, "-m", "fastperc"]  # 50 kB a file
    options = ["stylize", "photo.png", "-o", "out.png", "--model", model, "--strength", "0"]
    result = subprocess.run([*limited, *options], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "fastperc stylize: out.png: File too large\n"
    assert contents(here) == before


# Bad options


BAD_OPTIONS = {
    "": "the following arguments are required: COMMAND",
    "paint photo.png": "invalid choice: 'paint'",
    "--nonesuch": "required: COMMAND",
    "stylize": "the following arguments are required: INPUT",
    "stylize photo.png --nonesuch": "unrecognized arguments: --nonesuch",
    "stylize photo.png --size 0": "argument --size: 0 is below 1",
    "stylize photo.png --size -5": "argument --size: -5 is not between 0 and 2^63",
    "stylize photo.png --size 1.5": "argument --size: invalid positive value: '1.5'",
    "stylize photo.png --size nan": "argument --size: invalid positive value: 'nan'",
    "stylize photo.png --size 99999999999999999999": "argument --size: 99999999999999999999 is not between",
    "stylize photo.png --strength 1.1": "argument --strength: 1.1 is not between 0 and 1",
    "stylize photo.png --strength -0.1": "argument --strength: -0.1 is not between 0 and 1",
    "stylize photo.png --strength nan": "argument --strength: nan is not between 0 and 1",
    "stylize photo.png --tile 15": "argument --tile: 15 is none of auto, off and the numbers from 16 up",
    "stylize photo.png --tile small": "argument --tile: invalid tile value: 'small'",
    "stylize photo.png --strength much": "argument --strength: invalid fraction value: 'much'",
    "stylize photo.png --style a --model b": "not allowed with argument",
    "stylize photo.png --model": "argument --model: expected one argument",
    "train --out run": "the following arguments are required: --style, --data",
    "train --style a --data b --out c --preset d": "argument --preset: invalid choice: 'd'",
    "train --style a --data b --out c --lr nan": "argument --lr: nan is not a number above 0",
    "train --style a --data b --out c --lr 0": "argument --lr: 0 is not a number above 0",
    "train --style a --data b --out c --tv-weight inf": "argument --tv-weight: inf is not a finite number from 0 up",
    "train --style a --data b --out c --style-weight -1": "argument --style-weight: -1 is not a finite number",
    "train --style a --data b --out c --seed 18446744073709551616": "argument --seed: 18446744073709551616 is not",
    "optimize photo.png --style a": "the following arguments are required: -o/--out",
    "optimize photo.png --style a -o b --iterations 0": "argument --iterations: 0 is below 1",
    "optimize photo.png --style a -o b --optimizer sgd": "argument --optimizer: invalid choice: 'sgd'",
    "sr": "fastperc sr: the following arguments are required: COMMAND",
    "sr nonesuch": "invalid choice: 'nonesuch'",
    "sr upscale": "fastperc sr upscale: the following arguments are required: INPUT",
    "sr upscale photo.png --scale 3": "argument --scale: invalid choice: 3",
    "sr upscale photo.png --method best": "argument --method: invalid choice: 'best'",
    "sr upscale photo.png --method pixel --model m": "not allowed with argument",
    "sr upscale photo.png --scale 16": "no 'pixel' network ships for ×16",
    "sr eval": "fastperc sr eval: the following arguments are required: --data",
    "sr eval --data . --methods ,": "argument --methods: no name given",
    "sr eval --data . --methods bicubic,best": "best: neither a method (bicubic, srcnn, pixel, feature) nor a file",
    "sr eval --data . --crop 1,2": "argument --crop: 1,2 is no square like 120,80,64",
    "sr eval --data . --crop 1,2,0": "argument --crop: 1,2,0 is no square like 120,80,64",
    "sr eval --data . --blur -1": "argument --blur: -1 is not a finite number from 0 up",
    "sr train --out run": "the following arguments are required: --data",
    "doctor now": "unrecognized arguments: now",
}


@pytest.mark.parametrize("line", BAD_OPTIONS, ids=lambda line: line or "nothing")
def test_bad_options(refused, line):
    refused(*line.split(), says=BAD_OPTIONS[line])


def test_bad_options_with_line_breaks_are_one_line(refused):
    refused("doctor", "a\nb", says="unrecognized arguments: a b (see fastperc --help)")


def test_an_empty_name_is_not_the_current_folder(refused, model):
    refused("stylize", "", "--model", model, says="argument INPUT: an empty name")


@pytest.mark.parametrize("size", [8, 15, 10**9, 2**62])
def test_sizes_that_no_network_takes(refused, model, size):
    says = "is too small" if size < 16 else "is larger than"
    refused("stylize", "photo.png", "-o", "new.png", "--model", model, "--size", size, says=says)


@pytest.mark.parametrize("device", ["nonesuch", "cuda:99", "meta", "gpu", "cpu:x", "xla", "vulkan", ""])
@pytest.mark.parametrize("command", ["stylize", "optimize", "train"])
def test_unknown_devices(refused, model, photo_folder, vgg_options, command, device):
    options = {
        "stylize": ["photo.png", "-o", "new.png", "--model", model],
        "optimize": ["photo.png", "-o", "new.png", "--style", "photo.png", *vgg_options],
        "train": ["--style", "photo.png", "--data", photo_folder, "--out", "run", "--size", 16, *vgg_options],
    }
    refused(command, *options[command], "--device", device, says=f"no device '{device}' here; use cpu")


def test_the_installed_command_refuses_in_one_line(here, model):
    command = Path(sys.executable).with_name("fastperc")
    if not command.exists():
        pytest.skip("fastperc is not installed beside this interpreter")
    picture(32, 24).save("bad.tif")
    samples = struct.pack("<HHI", 277, 3, 1)  # per pixel; too many is what Pillow also logs
    Path("bad.tif").write_bytes(Path("bad.tif").read_bytes().replace(samples + b"\3", samples + b"\x75"))
    result = subprocess.run([command, "stylize", "bad.tif", "--model", model], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "fastperc stylize: bad.tif: not an image, or in a format that Pillow cannot read\n"
