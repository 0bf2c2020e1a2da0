"""Files of tensors and tables that somebody made to do harm: refused in one line, quickly and in little memory."""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from refusals import check_refused
from training_runs import train_options

import fastperc
from fastperc import InputError, checkpoints, dispatch, files
from fastperc.files import check_writable, read_tensors, write_atomically, write_tensors
from fastperc.models import VGG16Features
from fastperc.training.log import lines_up_to

CPU = torch.device("cpu")
NOT_TEXT = os.fsdecode(b"no text \xff")


@pytest.fixture(autouse=True)
def quickly():
    start = time.monotonic()
    yield
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    "config",
    [
        {"preset": "paper", "width": 60_000},
        {"preset": "paper", "width": 10**12},
        {"preset": "paper", "width": -4},
        {"preset": "paper", "width": 2.5},
        {"preset": "paper", "width": 1e400},
        {"preset": ["paper"], "width": 4},
        [4],
    ],
    ids=str,
)
def test_a_config_of_another_size_takes_no_memory(model, tmp_path, config):
    tensors, metadata = read_tensors(model)
    write_tensors(tmp_path / "in", tensors, metadata | {"config": json.dumps(config)})
    with pytest.raises(InputError, match="in: "):
        checkpoints.load(tmp_path / "in")


@pytest.mark.parametrize(
    "config", [{"scale": 1 << 20}, {"scale": 0}, {"scale": "4"}, {"kernel_sizes": [60_001] * 3}], ids=str
)
def test_srcnn_with_hostile_numbers(tmp_path, config):
    fastperc.save(fastperc.SRCNN(), tmp_path / "in")
    tensors, metadata = read_tensors(tmp_path / "in")
    write_tensors(tmp_path / "in", tensors, metadata | {"config": json.dumps(json.loads(metadata["config"]) | config)})
    with pytest.raises(InputError, match="in: "):
        checkpoints.load(tmp_path / "in")


@pytest.mark.parametrize("name", ["config", "training"])
def test_deeply_nested_metadata(model, tmp_path, name):
    tensors, metadata = read_tensors(model)
    write_tensors(tmp_path / "in", tensors, metadata | {name: "[" * 100_000})
    with pytest.raises(InputError, match="in: "):
        checkpoints.load(tmp_path / "in") if name == "config" else checkpoints.read_training(tmp_path / "in")


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_tensors_of_other_dtypes(model, tmp_path, dtype):
    tensors, metadata = read_tensors(model)
    write_tensors(tmp_path / "in", {name: x.to(dtype) for name, x in tensors.items()}, metadata)
    if dtype.is_floating_point:
        checkpoints.load(tmp_path / "in")
    else:
        with pytest.raises(InputError, match=f"in: .* is {dtype}, the network's is torch.float32"):
            checkpoints.load(tmp_path / "in")


def test_a_small_file_with_huge_tensors(tmp_path):
    torch.save({"conv1.conv2d.weight": torch.zeros(1).expand(1 << 40, 3, 9, 9)}, tmp_path / "in")
    with pytest.raises(InputError, match="in: its tensors are larger than what the file holds"):
        checkpoints.load(tmp_path / "in")
    torch.save({"conv1.conv2d.weight": torch.zeros(10_000, 3, 9, 9)}, tmp_path / "in")
    with pytest.raises(InputError, match="in: not a TransformNet: it lacks"):
        checkpoints.load(tmp_path / "in")


def test_a_zip_bomb(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "in", **{"conv1_1.weight": np.zeros((64, 3, 3, 3), np.float32)})
    monkeypatch.setattr(files, "MAX_EXPANDED", 2000)
    with pytest.raises(InputError, match=r"in\.npz: its content is far larger than the file"):
        VGG16Features(tmp_path / "in.npz", ("relu1_1",))


@pytest.mark.filterwarnings("ignore:.*ignored, not a table")
@pytest.mark.parametrize("kind", ["nested", "huge"])
def test_a_hostile_table_is_ignored(run, kind):
    path = dispatch.path_of(CPU)
    path.parent.mkdir(parents=True)
    path.write_text("[" * 100_000)
    if kind == "huge":
        os.truncate(path, 1 << 40)
    assert run("tune", "--show", "--device", "cpu").out == f"there is no table, {path}\n"


def test_losses_of_a_terabyte_are_not_read_whole(tmp_path):
    (tmp_path / "losses.csv").write_text("iteration,total\n1,2.5\n2,2.25\n3,2\n")
    os.truncate(tmp_path / "losses.csv", 1 << 40)
    assert lines_up_to(tmp_path / "losses.csv", 2) == ["iteration,total", "1,2.5", "2,2.25"]


def test_a_folder_whose_name_is_no_text(run, here, model, photo_folder, vgg_file):
    try:
        Path(NOT_TEXT).mkdir()
    except OSError:
        pytest.skip("names are text here")
    shutil.copy(model, Path(NOT_TEXT, "model.safetensors"))
    options = "--model", Path(NOT_TEXT, "model.safetensors")
    assert run("stylize", "photo.png", "-o", "out.png", *options).status == 0
    (here / NOT_TEXT / "model.safetensors").write_bytes(model.read_bytes()[:-10])
    check_refused(run, here, "stylize", "photo.png", *options, says="model.safetensors: damaged or cut short")
    options = [*train_options(photo_folder, vgg_file, here), "--iterations", "1", "--workers", "0"]
    run_folder = Path(NOT_TEXT, "run")
    assert run(*options, "--out", run_folder).status == 0
    assert run("train", "--resume", "--out", run_folder, "--iterations", 2).status == 0


def test_outputs_in_one_new_folder_at_once(tmp_path):
    errors = []

    def write(path):
        try:
            with write_atomically(check_writable(path)) as temporary:
                temporary.write_bytes(b"all")
        except Exception as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for i in range(100):
            threads = [threading.Thread(target=write, args=[tmp_path / f"{i}/new/out"]) for _ in range(6)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert (tmp_path / f"{i}/new/out").read_bytes() == b"all"
    finally:
        sys.setswitchinterval(interval)
    assert not errors
