"""Commands whose output nobody reads to the end: quiet, and what they write to files is whole."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from training_runs import train_options, training_metadata

from fastperc.cli import PIPE_CLOSED


def with_closed_reader(stream, *arguments, cwd):
    """Runs ``fastperc`` with a pipe for ``stream`` that has no reader; its exit status and the other stream's text."""
    reader, writer = os.pipe()
    os.close(reader)
    other = {"stdout": "stderr", "stderr": "stdout"}[stream]
    command = [sys.executable, "-m", "fastperc", *map(str, arguments)]
    settings = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, **{stream: writer, other: subprocess.PIPE}, text=True, cwd=cwd, env=settings)
    os.close(writer)
    return done.returncode, getattr(done, other)


@pytest.mark.parametrize(
    "command", ["--help", "--version", "train --help", "doctor", "tune --show", "bench --sizes 16 --device cpu"]
)
@pytest.mark.parametrize("buffered", [True, False], ids=["buffered", "unbuffered"])
def test_a_closed_stdout_is_quiet(here, monkeypatch, command, buffered):
    monkeypatch.setenv("PYTHONUNBUFFERED", "" if buffered else "1")
    status, errors = with_closed_reader("stdout", *command.split(), cwd=here)
    assert errors == ""
    assert status == PIPE_CLOSED or (not buffered and "-" in command), "argparse ignores what it cannot write"


@pytest.mark.parametrize("command", ["figure2", "sr train", "train"])
def test_a_training_command_that_nobody_reads_leaves_its_files(photo_folder, vgg_file, here, command):
    options = train_options(photo_folder, vgg_file, here)[1:]
    if command == "sr train":
        options = ["--data", photo_folder, "--size", 64, "--batch", 1, "--device", "cpu"]
    options += ["--iterations", 1, "--workers", 0, "--out", "run"]
    status, errors = with_closed_reader("stdout", *command.split(), *options, cwd=here)
    assert status == (PIPE_CLOSED if command == "figure2" else 0), "figure2 alone prints a table"
    assert errors.splitlines()[-1].startswith("drew run" if command == "figure2" else "finished at iteration 1: run")
    assert Path("run", {"figure2": "figure2.png"}.get(command, "model.safetensors")).exists()


@pytest.mark.parametrize("command", ["tune --show", "doctor", "bench --sizes 16 --device cpu"])
def test_a_report_does_not_need_stderr(here, command):
    status, out = with_closed_reader("stderr", *command.split(), cwd=here)
    assert status == 0 and out


@pytest.mark.parametrize("command", ["doctor now", "stylize nowhere.png", "train --out run"])
def test_a_refusal_that_nobody_reads_is_quiet(here, command):
    status, out = with_closed_reader("stderr", *command.split(), cwd=here)
    assert status in (2, PIPE_CLOSED) and out == ""


def test_work_goes_on_where_nobody_reads_its_progress(photo_folder, vgg_file, here):
    options = train_options(photo_folder, vgg_file, here)
    assert with_closed_reader("stderr", *options, "--out", "run", "--workers", 0, cwd=here) == (0, "")
    assert training_metadata(Path("run/model.safetensors"))["step"] == 12


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no full device here")
@pytest.mark.parametrize("command", ["--version", "tune --show", "doctor", "train --help"])
@pytest.mark.parametrize("buffered", [True, False], ids=["buffered", "unbuffered"])
def test_an_output_on_a_full_disk_is_one_line(here, monkeypatch, command, buffered):
    monkeypatch.setenv("PYTHONUNBUFFERED", "" if buffered else "1")
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "fastperc", *command.split()], stdout=full, stderr=subprocess.PIPE)
    if buffered or "-" not in command:  # argparse ignores what it cannot write
        assert done.returncode == 1 and done.stderr.endswith(b": No space left on device\n")
    assert done.stderr.count(b"\n") <= 1
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-m", "fastperc", *command.split()], stderr=full, stdout=subprocess.PIPE)
    assert done.returncode == 0 and done.stdout, "stderr has nothing to say"
