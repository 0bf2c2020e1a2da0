"""Two processes against one: batch statistics over both, and training as a user starts it by ``torchrun``."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
from cases import error
from conftest import picture
from safetensors import safe_open
from torch import nn

from fastperc import backends, ops, use_backend
from fastperc.cli import main
from fastperc.collective import combine_over_processes
from fastperc.errors import InputError
from fastperc.training import Recipe, loop
from fastperc.training.processes import Processes, processes

COUNT = 2


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def join(rank, port):
    store = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", store, rank=rank, world_size=COUNT, timeout=timedelta(seconds=60))
    torch.set_num_threads(1)


def in_two_processes(work, folder):
    """``work(rank)`` in two processes that have joined; what it returns, by rank."""
    torch.multiprocessing.spawn(_worker, (free_port(), work, folder), COUNT)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(COUNT)]


def _worker(rank, port, work, folder):
    join(rank, port)
    torch.save(work(rank), folder / f"{rank}.pt")
    dist.destroy_process_group()


# Batches of the two processes, of different sizes, one of them empty, one of a single value a channel each.
SHARES = {"3+2": (3, 2, 33, 20), "4+0": (4, 0, 9, 8), "1+1": (1, 1, 1, 1)}
CASES = [
    ("native", "3+2", torch.float32, True),
    ("reference", "3+2", torch.float32, True),
    ("reference", "3+2", torch.float64, False),
    (None, "4+0", torch.float32, True),  # the empty batch is plain PyTorch's, the other the C++ kernel's
    (None, "1+1", torch.float32, False),
]


def case_id(case):
    backend, shares, dtype, relu = case
    return f"{backend or 'any'}-{shares}-{str(dtype).removeprefix('torch.')}{'-relu' * relu}"


def whole_batch(shares, channels=5):
    first, second, height, width = SHARES[shares]
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(first + second, channels, height, width, generator=generator, dtype=torch.float64) * 3 + 20
    incoming = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    return x, incoming


def norm_of(kind, dtype, channels=5):
    torch.manual_seed(3)
    norm = nn.BatchNorm2d(channels, momentum=0.3)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.normal_(norm.bias)
    return (nn.SyncBatchNorm.convert_sync_batchnorm(norm) if kind == "sync" else norm).to(dtype)


def outcome(norm, x, incoming, relu, dtype, skipped):
    """The output, the gradients to the input, weight and bias, and what the norm holds afterwards."""
    x = x.to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    skip = x.detach().flip(1) if skipped else None
    y = ops.norm_relu(x, norm, relu, skip)
    gradients = torch.autograd.grad(y, [x, norm.weight, norm.bias], incoming.to(dtype))
    return [y.detach(), *gradients, *norm.state_dict().values()]


def share_of(rank, shares, *tensors):
    first = SHARES[shares][0]
    return [tensor[:first] if rank == 0 else tensor[first:] for tensor in tensors]


def norms(rank):
    results = []
    for backend, shares, dtype, relu in CASES:
        x, incoming = share_of(rank, shares, *whole_batch(shares))
        norm = norm_of("sync", dtype)
        with use_backend(backend) if backend else backends.recorded():
            found = outcome(norm, x, incoming, relu, dtype, not relu)
        results.append((found, list(norm.state_dict())))
    return results


def gradients_of_gradients(rank):
    x = whole_batch("3+2")[0][:, :, :5, :4]
    (x,) = share_of(rank, "3+2", x)
    norm, results = norm_of("sync", torch.float64), []
    for dtype, backend in ((torch.float64, "reference"), (torch.float32, "native")):
        with use_backend(backend):
            results.append([one.double() for one in penalty(norm.to(dtype), x.to(dtype))])
    return results


def penalty(norm, x):
    """Gradients of a function of the gradient."""
    leaf = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    (gradient,) = torch.autograd.grad(ops.norm_relu(leaf, norm).pow(3).sum(), leaf, create_graph=True)
    return torch.autograd.grad(gradient.square().sum(), [leaf, *norm.parameters()])


def combined(rank):
    x = whole_batch("3+2")[0].float()
    (mine,) = share_of(rank, "3+2", x)
    variance, mean = torch.var_mean(mine, (0, 2, 3), correction=0)
    count = mine[:, 0].numel()
    return combine_over_processes(torch.stack([torch.full_like(mean, count), mean, variance * count]))


def work(rank):
    return norms(rank), gradients_of_gradients(rank), combined(rank), asks_others(rank)


def asks_others(rank):
    together = Processes(torch.device("cpu"), rank, COUNT)
    order = []
    with together.one_first():
        order.append(time.monotonic())
        time.sleep(0.2 if rank == 0 else 0)
        order.append(time.monotonic())
    return together.any(rank == 1), together.any(False), together.mean(torch.tensor([1.0, 4.0]) * rank), order


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    return in_two_processes(work, tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("index", range(len(CASES)), ids=[case_id(case) for case in CASES])
def test_norms_over_two_processes_are_those_of_the_whole_batch(both, index):
    _, shares, dtype, relu = CASES[index]
    x, incoming = whole_batch(shares)
    norm = norm_of("plain", torch.float64)
    exact = outcome(norm, x, incoming, relu, torch.float64, not relu)
    (first, keys), (second, _) = (results[0][index] for results in both)
    assert keys == list(norm.state_dict())
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    for mine, theirs, wanted in zip(first[:2], second[:2], exact[:2]):  # of the batch: one part each
        joined = torch.cat([mine, theirs])
        assert joined.dtype == dtype
        assert error(joined, wanted) < tolerance or (joined - wanted).norm() < 1e-4
    for mine, theirs, wanted in zip(first[2:4], second[2:4], exact[2:4]):  # of the parameters: what adds up
        assert error(mine + theirs, wanted) < 10 * tolerance or (mine + theirs - wanted).norm() < 1e-5
    for mine, theirs, wanted in zip(first[4:], second[4:], exact[4:]):
        assert torch.equal(mine, theirs) and error(mine, wanted) < tolerance


def test_gradients_of_gradients_over_two_processes(both):
    x = whole_batch("3+2")[0][:, :, :5, :4]
    with use_backend("reference"):
        exact = penalty(norm_of("plain", torch.float64), x)
    for index, tolerance in ((0, 1e-10), (1, 1e-4)):
        first, second = both[0][1][index], both[1][1][index]
        scale = max(one.norm() for one in exact)
        found = torch.cat([first[0], second[0]]), first[1] + second[1], first[2] + second[2]
        assert all((mine - wanted).norm() < tolerance * scale for mine, wanted in zip(found, exact))


def test_statistics_combine(both):
    x = whole_batch("3+2")[0].float().double()
    variance, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    first, second = both[0][2], both[1][2]
    assert first.dtype == torch.float32 and torch.equal(first, second)
    count = x[:, 0].numel()
    assert (first[0] == count).all() and error(first[1], mean) < 1e-6 and error(first[2], variance * count) < 1e-6


def test_processes_agree(both):
    for asked, unasked, mean, _ in (one[3] for one in both):
        assert asked is True and unasked is False and mean.tolist() == [0.5, 2.0]
    (_, first_done), (second_began, _) = (one[3][3] for one in both)
    assert first_done <= second_began


def test_one_process_normalises_as_batch_norm():
    """A group of one: PyTorch's own SyncBatchNorm refuses the CPU even then."""
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    try:
        x, incoming = whole_batch("3+2")
        results = [outcome(norm_of(kind, torch.float32), x, incoming, True, torch.float32, False) for kind in NORMS]
        assert all(torch.equal(a, b) for a, b in zip(*results))
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            ops.norm_relu(torch.rand(1, 5, 1, 1), norm_of("sync", torch.float32))
        with processes("cpu") as found:
            assert found == Processes(torch.device("cpu"), 0, 1)
        assert dist.is_initialized(), "somebody else's group is left alone"
    finally:
        dist.destroy_process_group()


NORMS = "sync", "plain"


def test_alone_without_torchrun(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with processes("cpu") as found:
        assert found == Processes(torch.device("cpu")) and found.first and not dist.is_initialized()
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(InputError, match="WORLD_SIZE is 'many' in the environment"), processes("cpu"):
        pass
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(InputError, match="start them by torchrun --nproc-per-node=2"), processes("cpu"):
        pass


@pytest.fixture(scope="module")
def options(vgg_file, tmp_path_factory):
    """The command line of a run small enough for a test, without --out; its loss is a mean over photos."""
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
        f"--master-port={free_port()}",
    ]
    command += ["-m", "fastperc", *options, "--out", str(out), *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)


def finish(process):
    _, errors = process.communicate(timeout=120)
    return process.returncode, errors


def left_by(out):
    """The losses and the network of a run."""
    table = np.genfromtxt(out / "losses.csv", delimiter=",", names=True)
    with safe_open(out / "model.safetensors", "pt") as file:
        about = json.loads(file.metadata()["training"])
        return table, {name: file.get_tensor(name) for name in file.keys()}, about


def alike(ours, alone):
    """Nearly the same run. Rounding alone decides where Adam moves a bias before a norm, and the mean with it."""
    (losses, net, _), (expected, whole, _) = left_by(ours), left_by(alone)
    assert losses.dtype.names == ("iteration", "total", "content", "style", "tv")
    assert losses["iteration"].tolist() == expected["iteration"].tolist()
    for name in losses.dtype.names:
        np.testing.assert_allclose(losses[name], expected[name], rtol=2e-3)
    assert net.keys() == whole.keys()
    for name, tensor in net.items():
        if name.endswith(("conv.bias", "conv1.bias", "conv2.bias", "running_mean")):
            assert (tensor - whole[name]).abs().max() < 2e-3 * len(losses), name
        else:
            assert error(tensor, whole[name]) < 1e-2, name


def test_two_processes_train_as_one_does_and_go_on(options, tmp_path, capsys):
    for more in (), ("--resume", "--iterations", "6"):
        two = start(options, tmp_path / "two", *more)
        assert main([*options, "--out", str(tmp_path / "one"), *more]) == 0
        status, errors = finish(two)
        assert status == 0, errors
        for told in ("5 photos · painting.png", "cpu · 2 processes", f"finished at iteration {6 if more else 4}"):
            assert errors.count(told) == 1, "the first process alone speaks"
        assert errors.count(" · from iteration 4") == len(more[:1])
        assert "2 processes" not in capsys.readouterr().err
        alike(tmp_path / "two", tmp_path / "one")
    names = [sorted(path.name for path in (tmp_path / run).rglob("*")) for run in ("one", "two")]
    assert names[0] == names[1], "the first process alone writes"


def test_a_signal_to_the_launcher_stops_all_and_saves(options, tmp_path):
    out = tmp_path / "run"
    process = start(options, out, "--iterations", "100000", "--checkpoint-every", "100000")
    while not (out / "losses.csv").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, errors = finish(process)
    losses, _, about = left_by(out)
    assert about["step"] == losses["iteration"][-1] < 100000
    assert errors.count(f"stopped at iteration {about['step']}") == 1 and "SIGKILL" not in errors
    assert not [path for path in out.rglob(".*")]


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path):
    recipe = Recipe(data="", batch=3)
    with pytest.raises(InputError, match="a batch of 3 cannot be shared evenly by 2 processes"):
        loop._train(recipe, tmp_path / "run", False, Processes(torch.device("cpu"), 1, 2))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("device", ["cuda:1", "cuda"])
def test_each_process_has_a_gpu_of_its_own(monkeypatch, device):
    for name, value in dict(RANK=9000, LOCAL_RANK=9000, WORLD_SIZE=9001).items():
        monkeypatch.setenv(name, str(value))
    told = "give --device cuda, not cuda:1" if device == "cuda:1" else r"process 9000 finds \d+ GPUs here"
    with pytest.raises(InputError, match=told), processes(device):
        pass
