"""The command line on good input, its help, and the time it takes to start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import picture, pixels

import fastperc
from fastperc.devices import find_device
from fastperc.photos.photo import read_image


def pixels_of(path):
    return pixels(read_image(path).rgb)


def test_stylize_one(run, here, model):
    assert run("stylize", "photo.png", "--model", model) == (0, "", "")
    assert read_image("photo-wave.png").rgb.size == (32, 24)
    assert sorted(path.name for path in here.iterdir()) == ["photo-wave.png", "photo.png"]


def test_stylize_in_tiles(run, here, model):
    picture(70, 53).save("large.png")
    for tile in ("off", "auto", "24"):
        assert run("stylize", "large.png", "-o", f"{tile}.png", "--model", model, "--tile", tile).status == 0
    assert (pixels_of("auto.png") == pixels_of("off.png")).all()
    assert np.abs(pixels_of("24.png") - pixels_of("off.png")).max() <= 1


def test_stylize_options(run, here, model):
    assert run("stylize", "photo.png", "-o", "new/out.jpg", "--model", model, "--size", 64, "--keep-colors").status == 0
    assert read_image("new/out.jpg").rgb.size == (64, 48)
    assert run("stylize", "photo.png", "-o", "same.png", "--model", model, "--strength", 0).status == 0
    assert (pixels_of("same.png") == pixels_of("photo.png")).all()


@pytest.mark.parametrize("name", ["a b.png", "[red]{x}%s.png", "日本 ü.png", ":dog:.PNG", "-dash.png", "new\nline.png"])
def test_any_name(run, here, model, name):
    Path("photo.png").rename(name)
    assert run("stylize", "--model", model, "-o", "out", "--", name) == (0, "", "")
    assert [path.name for path in Path("out").iterdir()] == [name]


def test_a_folder_whose_photos_are_read_only(run, here, model):
    Path("photos").mkdir()
    Path("photo.png").rename("photos/photo.png")
    Path("photos/back").symlink_to(here / "photos")
    os.chmod("photos/photo.png", 0o444)
    assert run("stylize", "photos", "--model", model).status == 0
    assert [path.name for path in Path("photos-wave").rglob("*")] == ["photo.png"]


def test_a_bad_file_among_several_is_named_and_the_rest_is_done(run, here, model):
    Path("bad[red]\n.png").write_bytes(b"no image")
    status, out, err = run("stylize", "bad[red]\n.png", "photo.png", "-o", "out", "--model", model)
    assert (status, out) == (2, "")
    assert err.splitlines()[0] == "skipped bad[red] .png: not an image, or in a format that Pillow cannot read"
    assert [path.name for path in Path("out").iterdir()] == ["photo.png"]


def test_optimize(run, here, vgg_options):
    picture(24, 20, seed=1).save("style.png")
    options = "optimize", "photo.png", "--style", "style.png", "--style-size", 24, *vgg_options
    assert run(*options, "-o", "out.png", "--iterations", 2).status == 0
    assert pixels_of("out.png").shape == (24, 32, 3)
    assert (pixels_of("out.png") != pixels_of("photo.png")).any()


def test_apples_gpu_has_to_be_asked_for(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.mps, "is_available", lambda: True)
    assert find_device(None) == torch.device("cpu")
    assert capsys.readouterr().err == "using the CPU; Apple's GPU is untested, and --device mps tries it\n"


def test_doctor_prints_operation_backend_and_reason(run):
    status, out, err = run("doctor")
    assert (status, err) == (0, "")
    assert f"fastperc      {fastperc.__version__}" in out and torch.__version__ in out
    table = [line.split(maxsplit=3) for line in out.split("\n\n")[1].splitlines()]
    assert table[0] == ["operation", "device", "backend", "reason"]
    assert ["tv_loss", "cpu"] in [row[:2] for row in table[1:]]
    for _, _, backend, reason in table[1:]:
        assert backend in ("native", "triton", "reference") and reason


# Help, and the time it takes to start


def python(code, *arguments):
    result = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_fastperc_imports_nothing_heavy():
    heavy = {"torch", "triton", "numpy", "PIL", "rich", "safetensors"}
    code = "import sys, fastperc, fastperc.cli; fastperc.cli.build_parser(); print(*sys.modules)"
    assert not heavy & set(python(code).split())


def test_help_takes_less_than_a_tenth_of_a_second():
    """In processor time: on a busy machine the time on the wall says nothing."""
    code = "import time; from fastperc.cli import main\ntry: main(['--help'])\nfinally: print(time.process_time())"

    def seconds():
        lines = python(code).splitlines()
        assert lines[0].startswith("usage: fastperc")
        return float(lines[-1])

    assert min(seconds() for _ in range(3)) < 0.1


ALL_COMMANDS = [
    *("stylize", "styles", "train", "figure2", "sr", "sr train", "sr upscale", "sr eval", "optimize", "convert"),
    *("export", "push", "tune", "bench", "doctor", "completion"),
]


@pytest.mark.parametrize("command", ALL_COMMANDS)
def test_help_of_each_command(run, command):
    status, out, err = run(*command.split(), "--help")
    assert (status, err) == (0, "") and out.startswith(f"usage: fastperc {command}")
    assert max(map(len, out.splitlines())) <= 120
    assert out.isascii(), "a terminal without Unicode would show a traceback"


def test_help_states_the_exit_statuses(run):
    assert "Exit status: 0 success, 1 failure while running, 2 bad input, 130 Ctrl-C." in run("--help").out


def test_version(run):
    assert run("--version") == (0, f"fastperc {fastperc.__version__}\n", "")
