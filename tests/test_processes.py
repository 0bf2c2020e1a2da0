"""Processes that train together: how they join, what they agree on, and training as ``torchrun`` starts it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from cases import error
from pictures import picture
from training_runs import finish, tensors, training_metadata
from two_processes import COUNT, in_two_processes

from fastperc.cli import main
from fastperc.errors import InputError
from fastperc.training import Recipe, train
from fastperc.training.processes import Processes, join_processes


def agreements(rank):
    """What two processes find out together: two flags, a mean, and when each ran a block that the first runs first."""
    processes = Processes(torch.device("cpu"), rank, COUNT)
    times = []
    with processes.first_before_others():
        times.append(time.monotonic())
        time.sleep(0.2 if rank == 0 else 0)
        times.append(time.monotonic())
    mean = processes.mean(torch.tensor([1.0, 4.0]) * rank)
    return processes.any(rank == 1), processes.any(False), mean, times, refusal()


def refusal():
    """Why two processes do not train on a batch of three."""
    with pytest.raises(InputError) as refused:
        train(Recipe(data="", batch=3), Path("never made"))
    return str(refused.value)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    return in_two_processes(agreements, tmp_path_factory.mktemp("processes"))


def test_processes_agree(both):
    for in_one, in_none, mean, _, _ in both:
        assert in_one is True and in_none is False and mean.tolist() == [0.5, 2.0]


def test_the_first_process_is_done_before_the_others_begin(both):
    (_, first_ended), (second_began, _) = (times for _, _, _, times, _ in both)
    assert first_ended <= second_began


def test_a_batch_that_cannot_be_shared_is_refused(both):
    for *_, message in both:
        assert message == "a batch of 3 cannot be shared evenly by 2 processes"
    assert not Path("never made").exists()


def test_a_group_that_exists_is_used_and_left_alone(tmp_path):
    dist.init_process_group("gloo", (tmp_path / "store").as_uri(), rank=0, world_size=1)
    try:
        with join_processes("cpu") as processes:
            assert processes == Processes(torch.device("cpu"), 0, 1)
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


def test_alone_without_torchrun(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with join_processes("cpu") as processes:
        assert processes == Processes(torch.device("cpu")) and processes.is_first and not dist.is_initialized()
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(InputError, match="WORLD_SIZE is 'many' in the environment"), join_processes("cpu"):
        pass
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(InputError, match="start them by torchrun --nproc-per-node=2"), join_processes("cpu"):
        pass


@pytest.fixture(scope="module")
def options(vgg_file, tmp_path_factory):
    """The command line of a small run, without ``--out``; its loss is a mean over photos."""
    folder = tmp_path_factory.mktemp("photos")
    for i in range(5):
        picture(60 + 7 * i, 50, seed=i).save(folder / f"{i}.png")
    style = tmp_path_factory.mktemp("style") / "painting.png"
    picture(70, 50, seed=9).save(style)
    return [
        *("train", "--style", str(style), "--data", str(folder), "--vgg", str(vgg_file), "--device", "cpu"),
        *("--preset", "paper", "--width", "4", "--style-layers", "relu1_2", "--content-layer", "relu1_2"),
        *("--size", "32", "--batch", "4", "--iterations", "4", "--checkpoint-every", "4", "--convention", "paper"),
        *("--workers", "0", "--sync-bn"),
    ]


def start(options, out, *more):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nproc-per-node={COUNT}",
        "--standalone",  # which binds a free port itself
    ]
    command += ["-m", "fastperc", *options, "--out", str(out), *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)


def losses(out):
    return np.genfromtxt(out / "losses.csv", delimiter=",", names=True)


def check_similar(out, expected_out):
    """The losses and the networks of two runs differ by rounding alone. Where a bias before a norm goes, which changes
    nothing but the norm's mean, rounding decides: Adam moves it by a whole step."""
    table, expected_table = losses(out), losses(expected_out)
    assert table.dtype.names == ("iteration", "total", "content", "style", "tv")
    assert table["iteration"].tolist() == expected_table["iteration"].tolist()
    for name in table.dtype.names:
        np.testing.assert_allclose(table[name], expected_table[name], rtol=2e-3)
    net, expected_net = tensors(out / "model.safetensors"), tensors(expected_out / "model.safetensors")
    assert net.keys() == expected_net.keys()
    for name, tensor in net.items():
        if name.endswith(("conv.bias", "conv1.bias", "conv2.bias", "running_mean")):
            assert (tensor - expected_net[name]).abs().max() < 2e-3 * len(table), name
        else:
            assert error(tensor, expected_net[name]) < 1e-2, name


@pytest.mark.slow
def test_two_processes_train_as_one_does_and_go_on(options, tmp_path, capsys):
    for more in (), ("--resume", "--iterations", "6"):
        two = start(options, tmp_path / "two", *more)
        assert main([*options, "--out", str(tmp_path / "one"), *more]) == 0
        status, errors = finish(two)
        assert status == 0, errors
        for text in ("5 photos · painting.png", "cpu · 2 processes", f"finished at iteration {6 if more else 4}"):
            assert errors.count(text) == 1, "the first process alone prints"
        assert errors.count(" · from iteration 4") == len(more[:1])
        assert "2 processes" not in capsys.readouterr().err
        check_similar(tmp_path / "two", tmp_path / "one")
    names = [sorted(path.name for path in (tmp_path / run).rglob("*")) for run in ("one", "two")]
    assert names[0] == names[1], "the first process alone writes"


def test_a_signal_to_the_launcher_stops_all_and_saves(options, tmp_path):
    out = tmp_path / "run"
    process = start(options, out, "--iterations", "100000", "--checkpoint-every", "100000")
    while not (out / "losses.csv").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, errors = finish(process)
    step = training_metadata(out / "model.safetensors")["step"]
    assert step == losses(out)["iteration"][-1] < 100000
    assert errors.count(f"stopped at iteration {step}") == 1 and "SIGKILL" not in errors
    assert not [path for path in out.rglob(".*")]


@pytest.mark.parametrize("device", ["cuda:1", "cuda"])
def test_each_process_has_a_gpu_of_its_own(monkeypatch, device):
    for name, value in dict(RANK=9000, LOCAL_RANK=9000, WORLD_SIZE=9001).items():
        monkeypatch.setenv(name, str(value))
    message = "give --device cuda, not cuda:1" if device == "cuda:1" else r"process 9000 finds \d+ GPUs here"
    with pytest.raises(InputError, match=message), join_processes(device):
        pass
