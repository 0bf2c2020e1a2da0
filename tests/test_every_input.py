"""Each file or folder that a command reads: missing, empty, a folder, a pipe, unreadable, cut short, huge or a loop."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from pictures import picture
from refusals import check_refused
from style_nets import DECONVS, EXAMPLE, EXAMPLE_NORMS, PyTorchNet
from torch7_files import Johnson, saved

import fastperc

LAYERS = "--style-layers relu1_2,relu2_2 --content-layer relu2_2"
TRAIN = "--size 16 --batch 1 --workers 0 --iterations 1 --out new"
STYLE = f"--width 4 {LAYERS} {TRAIN}"
SR = TRAIN.replace("16", "64")

# Commands with a name for one input, and the file or folder that it stands for.
COMMANDS = {
    "stylize {} -o new.png --model model": "photo.png",
    "stylize photo.png -o new.png --model {}": "model",
    "stylize photo.png -o new.png --model model --mask {}": "mask.png",
    "styles -o new.png --size 16 --photo {}": "photo.png",
    "bench --sizes 16 --device cpu --model {}": "model",
    "export -o new.pt2 --model {}": "model",
    "convert {} -o new.safetensors": "example.pth",
    "convert -o new.pt2 {}": "candy.t7",
    f"optimize {{}} -o new.png --style painting.png --iterations 1 --vgg vgg {LAYERS}": "photo.png",
    f"optimize photo.png -o new.png --style {{}} --iterations 1 --vgg vgg {LAYERS}": "painting.png",
    f"optimize photo.png -o new.png --style painting.png --iterations 1 --vgg {{}} {LAYERS}": "vgg",
    "sr upscale {} -o new.png --model sr": "photo.png",
    "sr upscale photo.png -o new.png --model {}": "sr",
    "sr eval --methods bicubic --csv new.csv --data {}": "photos",
    "sr eval --data photos --csv new.csv --methods {}": "sr",
    f"train --data photos --vgg vgg --style {{}} {STYLE}": "painting.png",
    f"train --style painting.png --vgg vgg --data {{}} {STYLE}": "photos",
    f"train --style painting.png --data photos --vgg {{}} {STYLE}": "vgg",
    f"train --style painting.png --data photos --vgg vgg --init {{}} {STYLE}": "start",
    f"sr train --data {{}} {SR}": "photos",
    f"sr train --data photos --init {{}} {SR}": "sr",
    f"sr train --data photos --loss feature --vgg {{}} {SR}": "vgg",
    f"figure2 --data photos --vgg vgg --style {{}} {STYLE}": "painting.png",
    f"figure2 --style painting.png --vgg vgg --data {{}} {STYLE}": "photos",
    f"figure2 --style painting.png --data photos --vgg {{}} {STYLE}": "vgg",
}


@pytest.fixture(scope="module")
def project(vgg_file, model, sr_model, tmp_path_factory):
    """A folder with every input of ``COMMANDS``."""
    folder = tmp_path_factory.mktemp("inputs") / "project"
    (folder / "photos").mkdir(parents=True)
    picture(70, 66).save(folder / "photo.png")
    picture(40, 30).save(folder / "painting.png")
    picture(40, 30).convert("L").save(folder / "mask.png")
    picture(70, 66).save(folder / "photos" / "a.jpg")
    fastperc.save(fastperc.TransformNet("paper", width=4), folder / "start")
    torch.save(PyTorchNet().state([*EXAMPLE, *DECONVS], EXAMPLE_NORMS), folder / "example.pth")
    saved(Johnson().checkpoint(), folder / "candy.t7")
    for source, name in ((vgg_file, "vgg"), (model, "model"), (sr_model, "sr")):
        shutil.copy(source, folder / name)
    return folder


def spoil(path, kind):
    """Puts something of that kind in the place of ``path``."""
    if kind == "cut":
        os.truncate(path, path.stat().st_size // 2)
        return
    if kind == "unreadable":
        path.chmod(0)
        if os.access(path, os.R_OK):
            pytest.skip("root reads everything")
        return
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind != "missing":
        path.touch()
        os.truncate(path, {"empty": 0, "huge": 1 << 40}[kind])


@pytest.mark.parametrize("kind", ["missing", "empty", "folder", "pipe", "loop", "huge", "cut", "unreadable"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_spoiled_input_is_refused_in_one_line(run, project, tmp_path, monkeypatch, command, kind):
    if kind == "cut" and COMMANDS[command] == "photos":
        pytest.skip("a folder cannot be cut")
    shutil.copytree(project, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    spoil(Path(COMMANDS[command]), kind)
    photos_as_input = kind == "folder" and command.startswith(("stylize {}", "sr upscale {}"))
    says = "new.png: several images need a folder as output" if photos_as_input else f"{COMMANDS[command]}: "
    check_refused(run, tmp_path / "here", *command.format(COMMANDS[command]).split(), says=says)


@pytest.mark.parametrize("kind", ["empty", "pipe", "loop", "huge", "unreadable"])
@pytest.mark.parametrize("cache", ["auto", "off"])
@pytest.mark.parametrize("command", ["train", "sr train"])
def test_a_single_photo_that_is_spoiled_is_refused(run, project, tmp_path, monkeypatch, command, cache, kind):
    shutil.copytree(project, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    spoil(Path("photos/a.jpg"), kind)
    task = f"--style painting.png --vgg vgg {STYLE}" if command == "train" else SR
    options = f"{command} --data photos --cache {cache} {task}".split()
    check_refused(run, tmp_path / "here", *options, says="photos: none of the 1 images can be read")
