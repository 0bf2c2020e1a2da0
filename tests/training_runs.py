"""Training commands small enough for a test, and what a run leaves in its folder."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pictures import picture
from safetensors import safe_open
from torch import Tensor

from fastperc import TVLoss
from fastperc.cli import main


def train_options(photos: Path, vgg: Path, folder: Path) -> list[str]:
    """The command line of twelve iterations, without ``--out``. The painting is drawn into ``folder``."""
    painting = folder / "painting.png"
    picture(70, 50, seed=9).save(painting)
    return [
        *("train", "--style", str(painting), "--data", str(photos), "--vgg", str(vgg), "--device", "cpu"),
        *("--preset", "paper", "--width", "4", "--style-layers", "relu1_2,relu2_2", "--content-layer", "relu2_2"),
        *("--size", "32", "--batch", "2", "--iterations", "12", "--checkpoint-every", "3"),
    ]


def run_here(options: list[str], out: Path, *more: str) -> int:
    """Runs the command in this process; returns its exit status.

    Its cache folder lies beside ``out``: fixtures of a module do not have the one that each test gets.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(out.parent / "cache"))
        return main([*options, "--out", str(out), "--workers", "0", *more])


def start(options: list[str], out: Path, *more: str, threads: int = 1) -> subprocess.Popen[str]:
    """Starts the command in a process of its own, with ``threads`` threads and a cache folder beside ``out``."""
    command = [sys.executable, "-m", "fastperc", *options, "--out", str(out), *more]
    settings = {"OMP_NUM_THREADS": str(threads), "XDG_CACHE_HOME": str(out.parent / "cache")}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=out.parent, env=os.environ | settings)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """The exit status of ``process`` and what it wrote to stderr."""
    _, errors = process.communicate(timeout=300)
    return process.returncode, errors


def tensors(path: Path) -> dict[str, Tensor]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def training_metadata(path: Path) -> dict[str, Any]:
    """The recipe and the step that a network or a checkpoint was saved with."""
    with safe_open(path, "pt") as file:
        return dict(json.loads(file.metadata()["training"]))


def losses(out: Path) -> tuple[list[str], list[list[float]]]:
    """The header and the rows of ``losses.csv`` in ``out``, which must end with a whole row."""
    text = (out / "losses.csv").read_text()
    assert text.endswith("\n")
    header, *rows = csv.reader(text.splitlines())
    return header, [[int(row[0]), *map(float, row[1:])] for row in rows]


def stop_in_iteration(monkeypatch: pytest.MonkeyPatch, iteration: int) -> None:
    """A signal comes in the ``iteration``-th call of the loss."""
    forward, calls = TVLoss.forward, []

    def forward_and_stop(self, x):
        calls.append(None)
        if len(calls) == iteration:
            signal.raise_signal(signal.SIGINT)
        return forward(self, x)

    monkeypatch.setattr(TVLoss, "forward", forward_and_stop)
