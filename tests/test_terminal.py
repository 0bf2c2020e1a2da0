"""Terminals that print few characters, names that are no text, signals, and the line after one photo."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pictures import picture
from refusals import contents
from rich.console import Console
from training_runs import train_options

from fastperc.photos import jobs
from fastperc.photos.photo import read_image

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}
UTF_8 = {"PYTHONUTF8": "1", "PYTHONIOENCODING": ""}


def fastperc(*arguments, **environment):
    command = [sys.executable, "-m", "fastperc", *map(os.fsencode, arguments)]
    return subprocess.run(command, capture_output=True, env=os.environ | environment)


UNICODE, BYTES = b"\xe6\x97\xa5 \xc3\xbc.png", b"no text \xff.png"


@pytest.mark.parametrize(
    ("name", "environment"),
    [(UNICODE, ASCII), (BYTES, ASCII), (BYTES, UTF_8)],
    ids=["unicode-ascii", "bytes-ascii", "bytes-utf-8"],
)
def test_names_that_the_terminal_cannot_print(here, model, name, environment):
    Path("data").mkdir()
    picture(128, 96).save(Path("data", os.fsdecode(name)))
    result = fastperc(b"stylize", b"data/" + name, b"-o", b"\xc3\xb6/", "--model", model, **environment)
    assert (result.returncode, result.stdout, result.stderr) == (0, b"", b"")
    assert read_image(Path("ö", os.fsdecode(name))).rgb.size == (128, 96)

    outputs = "--csv", "scores.csv", "--markdown", "scores.md"
    result = fastperc("sr", "eval", "--data", "data", "--methods", "bicubic", *outputs, **environment)
    assert result.returncode == 0, result.stderr.decode()
    for file in ("scores.csv", "scores.md"):
        assert name in Path(file).read_bytes()

    Path("data", os.fsdecode(name)).write_bytes(b"no image")
    result = fastperc(b"stylize", b"data/" + name, "--model", model, **environment)
    assert result.returncode == 2 and result.stderr.count(b"\n") == 1
    assert result.stderr.endswith(b".png: not an image, or in a format that Pillow cannot read\n")
    result = fastperc(b"stylize", b"data", "photo.png", "-o", "out", "--model", model, **environment)
    assert result.returncode == 2 and result.stderr.startswith(b"skipped data/")


@pytest.mark.parametrize("command", ["doctor", "tune --show", "bench --sizes 16,33x24 --device cpu --model"])
def test_commands_about_the_machine_print_on_a_terminal_without_unicode(here, model, command):
    result = fastperc(*command.split(), *([model] if "bench" in command else []), **ASCII)
    assert (result.returncode, result.stderr) == (0, b"") and result.stdout.isascii()
    assert b"\\x" not in result.stdout, "nothing had to be escaped"


@pytest.mark.parametrize(
    ("command", "name"), [("train", BYTES), ("sr train", UNICODE), ("figure2", BYTES)], ids=["train", "sr", "figure2"]
)
def test_training_on_a_terminal_without_unicode(here, photo_folder, vgg_file, command, name):
    picture(40, 30).save("painting.png")
    options = train_options(photo_folder, vgg_file, here)[1:]
    os.rename("painting.png", name)
    if command == "sr train":
        options = ["--data", str(photo_folder), "--size", "64", "--batch", "1", "--iterations", "2", "--device", "cpu"]
    else:
        options[options.index("--style") + 1] = name
        options += ["--iterations", "2"]
    result = fastperc(*command.split(), *options, "--workers", "0", "--out", b"run", **ASCII)
    assert result.returncode == 0, result.stderr.decode()
    assert result.stderr.isascii() and b"finished at iteration 2: run" in result.stderr
    bad = fastperc(*command.split(), "--resume", "--out", name, **ASCII)
    assert (bad.returncode, bad.stderr.count(b"\n")) == (2, 1) and b"holds no run to resume" in bad.stderr


SLOW = """
import sys, time
from fastperc.cli import main
from fastperc.photos import photo
from PIL import Image

def save(self, path, *arguments, **options):
    path.write_bytes(b"half of a")
    print("writing", flush=True)
    for _ in range(600):  # a signal just before a sleep is seen after it
        time.sleep(0.1)

Image.Image.save = save
sys.exit(main(sys.argv[1:]))
"""


def stopped_by(number, *arguments, before=()):
    """Runs a command that is stopped while it writes: its exit status and stderr."""
    command = [*before, sys.executable, "-c", SLOW, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "writing\n", process.stderr.read()
        process.send_signal(number)
        if before:
            time.sleep(1)
            assert process.poll() is None, "nohup"
            process.terminate()
        _, err = process.communicate(timeout=30)
    return process.returncode, err


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("command", ["stylize", "sr upscale", "sr eval"])
def test_a_signal_leaves_nothing_half_written(here, model, sr_model, command, name):
    Path("out").mkdir()
    Path("data").mkdir()
    picture(128, 96).save("data/a.png")
    Path("out/a.png").write_bytes(b"what was there")
    before = contents(here)
    options = {
        "stylize": ["data/a.png", "-o", "out", "--model", model],
        "sr upscale": ["data/a.png", "-o", "out", "--model", sr_model],
        "sr eval": ["--data", "data", "--methods", "bicubic", "--pictures", "out"],
    }[command]
    status, err = stopped_by(getattr(signal, name), *command.split(), *options)
    assert (status, err.splitlines()[-1]) == (128 + getattr(signal, name), f"fastperc {command}: stopped by {name}")
    assert contents(here) == before


def test_nohup_ignores_a_closed_terminal(here, model):
    command = "trap '' HUP; exec \"$@\""
    arguments = "stylize", "photo.png", "-o", "out.png", "--model", model
    status, err = stopped_by(signal.SIGHUP, *arguments, before=["sh", "-c", command, "sh"])
    assert status == 143 and err.endswith("stopped by SIGTERM\n")


def test_a_terminal_shows_where_the_picture_is(run, here, model, vgg_options, monkeypatch):
    monkeypatch.setattr(jobs, "console", Console(force_terminal=True, stderr=True))
    said = []
    monkeypatch.setattr(jobs, "say", said.append)
    assert run("stylize", "photo.png", "--model", model).status == 0
    assert run("optimize", "photo.png", "--style", "photo.png", "--style-size", 16, "--iterations", 1, "-o", "o.png",
               *vgg_options).status == 0  # fmt: skip
    picture(32, 24).save("second.png")
    assert run("stylize", "photo.png", "second.png", "-o", "out/", "--model", model).status == 0
    lines = [line.rpartition(" in ") if "pictures" not in line else line.partition(" s, ") for line in said]
    assert [line[0] for line in lines[:2]] == ["wrote photo-wave.png", "wrote o.png"]
    assert all(line[2].endswith(" s") and float(line[2][:-2]) < 60 for line in lines[:2])
    assert lines[2][0].startswith("wrote 2 pictures in ") and lines[2][2] == "in out"


@pytest.mark.skipif(not Path("/dev/ptmx").exists(), reason="no pseudo-terminals here")
def test_one_photo_in_a_real_terminal(here, model):
    import pty

    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "fastperc", "stylize", "photo.png", "--model", model]
    process = subprocess.run(command, stdout=follower, stderr=follower)
    os.close(follower)
    shown = b""
    try:
        while part := os.read(leader, 65536):
            shown += part
    except OSError:  # the terminal is closed
        pass
    os.close(leader)
    assert process.returncode == 0
    assert b"wrote photo-wave.png in " in shown
