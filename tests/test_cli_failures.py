"""Failures while a command runs: one line on stderr, status 1, and nothing half-written."""

from __future__ import annotations

import errno
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pictures import picture
from PIL import Image
from refusals import contents

FAILURES = {
    "full disk": (OSError(errno.ENOSPC, "No space left on device"), "new/out.png: No space left on device"),
    "encoder": (OSError("encoder error -2"), "new/out.png: encoder error -2"),
    "memory": (MemoryError(), "out of memory; try a smaller --size or --tile"),
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
    def tiles(self, *arguments, **keywords):
        raise error

    monkeypatch.setattr("fastperc.engine.engine.Engine.tiles", tiles)
    refused("stylize", "photo.png", "-o", "new.png", "--model", model, says=says, status=1)


def test_a_photo_too_large_for_memory_is_not_called_damaged(refused, model, monkeypatch):
    def load(self):
        raise MemoryError

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", load)
    refused("stylize", "photo.png", "-o", "new.png", "--model", model, says="out of memory", status=1)


@pytest.mark.parametrize(
    ("command", "advice"),
    [
        (["sr", "upscale", "photo.png"], "try a smaller --tile"),
        (["sr", "eval", "--data", "."], "try a smaller image"),
        (["optimize", "photo.png", "-o", "new.png", "--style", "photo.png"], "try a smaller --size"),
    ],
    ids=["upscale", "eval", "optimize"],
)
def test_out_of_memory_names_options_of_the_command(refused, monkeypatch, command, advice):
    def find_device(name):
        raise MemoryError

    monkeypatch.setattr("fastperc.devices.find_device", find_device)
    refused(*command, says=f"out of memory; {advice}", status=1)


def test_an_interruption_is_one_line(refused, here, model, monkeypatch):
    def tiles(self, *arguments, **keywords):
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


def test_the_installed_command_refuses_in_one_line(here, model):
    command = Path(sys.executable).with_name("fastperc")
    if not command.exists():
        pytest.skip("fastperc is not installed beside this interpreter")
    picture(32, 24).save("bad.tif")
    samples = struct.pack("<HHI", 277, 3, 1)  # samples per pixel: Pillow also logs an error if there are too many
    Path("bad.tif").write_bytes(Path("bad.tif").read_bytes().replace(samples + b"\3", samples + b"\x75"))
    result = subprocess.run([command, "stylize", "bad.tif", "--model", model], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "fastperc stylize: bad.tif: not an image, or in a format that Pillow cannot read\n"
