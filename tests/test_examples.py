"""The scripts in ``examples``, each run as its reader runs it, on tiny pictures."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch
from clips import make_animation, make_film
from pictures import picture
from PIL import Image

from fastperc import load
from fastperc.models.vgg_weights import convolutions, indices, names

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture(scope="module")
def vgg(tmp_path_factory):
    """A file of small random weights under torchvision's names for VGG-16."""
    index = dict(zip(names("VGG-16"), indices("VGG-16", batch_norm=False)))
    tensors = {}
    for name, c_in, c_out in convolutions("VGG-16"):
        tensors[f"features.{index[name]}.weight"] = torch.randn(c_out, c_in, 3, 3) * (2 / (9 * c_in)) ** 0.5
        tensors[f"features.{index[name]}.bias"] = torch.zeros(c_out)
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save(tensors, path)
    return path


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A reader's working folder, with photos."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "photos").mkdir()
    for seed in range(3):
        picture(64, 48, seed).save(tmp_path / "photos" / f"{seed}.png")
    picture(64, 48, 7).save("photo.jpg")
    return tmp_path


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a script with arguments, as the main program, and returns what it printed."""

    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        printed = capsys.readouterr()
        return printed.out + printed.err

    return run


def test_stylize(run):
    assert "painted.jpg: 64×48" in run("stylize.py", "photo.jpg")
    run("stylize.py", "photo.jpg", "-o", "small.png", "--size", 32, "--strength", 0.5, "--style", "starry_night")
    assert Image.open("painted.jpg").size == (64, 48) and Image.open("small.png").size == (32, 24)


def test_train_and_resume(run, vgg):
    options = "--style", "photo.jpg", "--data", "photos", "--out", "run", "--vgg", vgg
    options += "--iterations", 2, "--size", 32, "--batch", 1
    run("train.py", *options)
    assert load("run/model.safetensors").config["preset"] == "instance"
    assert Image.open("run/painted.jpg").size == (64, 48)
    assert "finished at iteration 2" in run("train.py", *options, "--resume")


def test_own_loop(run, vgg):
    options = "--steps", 2, "--size", 32, "--batch", 2, "--vgg", vgg
    assert "style" in run("own_loop.py", "--style", "photo.jpg", "--data", "photos", *options)
    load("mine.safetensors")
    run("own_loop.py", "--style", "photo.jpg", "--data", "photos", *options, "--batch", 8)  # more than there are photos
    Path("empty").mkdir()
    with pytest.raises(SystemExit):
        run("own_loop.py", "--style", "photo.jpg", "--data", "empty", *options)


def test_video_of_an_animation(run):
    make_animation(Path("clip.gif"))
    assert "out.gif: 4 frames" in run("video.py", "clip.gif", "-o", "out.gif", "--smooth", 0.5)
    run("video.py", "clip.gif", "-o", "frames/", "--size", 32)
    assert [path.name for path in sorted(Path("frames").iterdir())] == [f"00000{i}.png" for i in (1, 2, 3, 4)]
    assert Image.open("frames/000004.png").size == (32, 24)


def test_video_of_a_film(run):
    pytest.importorskip("av")
    make_film(Path("clip.mp4"))
    assert "out.mp4: 10 frames" in run("video.py", "clip.mp4", "-o", "out.mp4")


def test_freeze_your_network(run):
    out = run("freeze_your_network.py", "--size", 32, "--runs", 1)
    assert float(re.search(r"differ by (\S+)", out)[1]) < 1e-5
    assert "blocks.0.body.1" in out and "training step" in out


def test_lpips_distance(run, vgg):
    pytest.importorskip("torchmetrics")
    picture(64, 48, 8).save("other.png")
    out = run("lpips_distance.py", "photo.jpg", "other.png", "--vgg", vgg, "--steps", 3)
    first, last = re.findall(r"^(0\.\d+)", out, re.MULTILINE)
    assert float(last) < float(first) and Image.open("closer.png").size == (64, 48)


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_docstring_and_list(script):
    """Each script begins with its command, and README lists it."""
    first = script.read_text(encoding="utf-8").split('"""')[1]
    commands = re.findall(r"^(python examples/.*)$", first, re.MULTILINE)
    assert commands and all(shlex.split(command)[1] == f"examples/{script.name}" for command in commands)
    assert f"]({script.name})" in (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert f"test_{script.stem}" in Path(__file__).read_text(encoding="utf-8")
