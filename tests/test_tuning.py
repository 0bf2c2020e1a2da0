"""`fastperc tune`: what it measures, prints and keeps."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from fastperc import TransformNet, backends, dispatch, ops
from fastperc.backends import Implementation, Operation, TuningCases
from fastperc.dispatch import Key
from fastperc.engine import cuda
from fastperc.ops import OPERATIONS
from fastperc.tools import tuning

CPU = torch.device("cpu")


@pytest.fixture
def hasty(monkeypatch):
    monkeypatch.setattr(tuning, "ROUNDS", 1)
    monkeypatch.setattr(tuning, "SECONDS_A_ROUND", 0)


@pytest.fixture
def fake_operation(monkeypatch):
    """An operation whose native backend takes 3 ms and whose Triton kernel is for GPUs; returns the turns taken."""
    turns = []

    def implementation(backend, seconds, why_not=backends.never):
        def run(x):
            turns.append(backend)
            time.sleep(seconds)
            return x.sum()

        return Implementation(backend, run, why_not)

    implementations = (
        implementation("triton", 0, backends.why_not_triton),
        implementation("native", 0.003),
        implementation("reference", 0),
    )
    cases = TuningCases(lambda batch, size: [((batch, 3, size, size),)], lambda x: (x,))
    monkeypatch.setattr(tuning, "OPERATIONS", {"op": Operation("op", "Op", implementations, cases)})
    return turns


def test_measures_every_implementation_that_can_serve(fake_operation, monkeypatch):
    monkeypatch.setattr(tuning, "SECONDS_A_ROUND", 0)
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # which runs on the CPU, and is no candidate
    for grad in (False, True):
        times = tuning.measure(Key("op", "float32", "NCHW", grad, ((1, 3, 16, 16),)), CPU)
        assert set(times) == {"reference", "native"}
        assert times["native"] >= 3 and times["native"] > times["reference"] > 0
    turns = fake_operation[-2 * tuning.ROUNDS :]
    assert turns[:4] == ["native", "reference", "reference", "native"], "in an order that alternates"


def test_where_nothing_can_be_chosen_no_table_is_written(run, fake_operation, monkeypatch):
    record = tuning.OPERATIONS["op"]
    monkeypatch.setitem(tuning.OPERATIONS, "op", replace(record, implementations=record.implementations[-1:]))
    status, out, _ = run("tune", "--device", "cpu", "--size", 16)
    assert (status, out) == (0, "nothing to choose from: plain PyTorch alone runs on cpu\n")
    assert not dispatch.path_of(CPU).exists()


def test_tune(run, hasty):
    assert run("tune", "--show", "--device", "cpu").out == f"there is no table, {dispatch.path_of(CPU)}\n"
    status, out, err = run("tune", "--device", "cpu", "--size", 16, "--batch", 1)
    assert status == 0 and f"tuning  {len(list(tuning.cases(1, 16)))}" in err
    *rows, path = out.splitlines()
    assert path == str(dispatch.path_of(CPU))
    assert rows[0].split()[:5] == ["operation", "dtype", "layout", "pass", "shape"]
    table = dispatch.table(CPU)
    assert len(rows) == 1 + len(table.times)
    assert {key.operation for key in table.times} <= set(OPERATIONS)

    x = torch.rand(1, 3, 16, 16)
    by_backend = table.times[Key("tv_loss", "float32", "NCHW", False, ((1, 3, 16, 16),))]
    fastest = min(by_backend, key=by_backend.get)
    row = next(row for row in rows if row.startswith("tv_loss                float32   NCHW    fwd "))
    assert row.split()[5] == fastest and row.endswith(f"  {fastest}")
    assert OPERATIONS["tv_loss"].choose(x, "l2", "sum").name == fastest
    assert ops.tv_loss(x) > 0

    assert run("tune", "--show", "--device", "cpu").out.splitlines() == [*rows, f"{path}, {table.date}"]
    doctor = run("doctor").out
    assert path in doctor and "measured the fastest: " in doctor
    assert run("tune", "--clear", "--device", "cpu").out == f"removed {path}\n"
    assert run("tune", "--clear", "--device", "cpu") == (0, f"there was no table, {path}\n", "")
    assert "tuned cpu     no" in run("doctor").out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--size", 15], "--size must be at least 16, got 15"),
        (["--size", "large"], "--size"),
        (["--batch", 0], "0 is below 1"),
        (["--device", "abacus"], "no device 'abacus' here"),
        (["--show", "--clear"], "not allowed with"),
        (["photo.png"], "photo.png"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_bad_arguments(run, arguments, told):
    status, out, err = run("tune", "--device", "cpu", *arguments)
    assert (status, out) == (2, "") and told in err and err.count("\n") == 1
    assert not dispatch.path_of(CPU).exists()


def test_a_cache_that_cannot_be_written_is_told_before_measuring(run, tmp_path, fake_operation, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    status, out, err = run("tune", "--device", "cpu")
    assert (status, out) == (2, "") and err.startswith("fastperc tune: ") and "cannot be written" in err
    assert not fake_operation


@pytest.mark.filterwarnings("default")
def test_a_damaged_table_is_a_line(run, tmp_path):
    path = dispatch.path_of(CPU)
    path.parent.mkdir(parents=True)
    path.write_text("no table")
    status, out, err = run("tune", "--show", "--device", "cpu")
    assert (status, out) == (0, f"there is no table, {path}\n")
    assert err.startswith(f"fastperc tune: {path}: ignored, not a table of `fastperc tune` or damaged")
    assert err.count("\n") == 1
    path.unlink()
    path.mkdir()
    assert run("tune", "--clear", "--device", "cpu") == (2, "", f"fastperc tune: {path}: is a folder, not a table\n")


@pytest.mark.parametrize("name", [name for name, operation in OPERATIONS.items() if operation.tuning_cases])
def test_a_call_is_looked_up_by_the_key_that_it_was_measured_by(name):
    operation, keys = OPERATIONS[name], [key for key in tuning.cases(1, 64) if key.operation == name]
    for key in keys:
        tensors = tuning.tensors_of(key, CPU)
        with torch.set_grad_enabled(key.grad):
            measured = operation.measured_by(*operation.tuning_cases.call(*tensors))
            assert dispatch.Key.of(name, measured[0], tuple(tuple(x.shape) for x in measured)) == key


def test_a_block_is_measured_with_the_gradients_of_its_weights():
    keys = [key for key in tuning.cases(1, 32) if key.operation == "conv_chain" and key.grad]
    for key in keys[:1] + keys[-1:] + keys[6:24:6]:
        if key.dtype == "float16":
            continue
        tensors = tuning.tensors_of(key, CPU)
        x, layers = OPERATIONS["conv_chain"].tuning_cases.call(*tensors)
        assert [layer.conv.weight for layer in layers] == tensors[1:] and x is tensors[0]
        tuning.backward(ops.conv_chain(x, layers), tensors)


def test_what_was_measured_of_the_stem_says_nothing_about_a_network():
    """Its chain has the stem's input."""
    net = TransformNet("paper")
    layers = [layer for module in net.children() for layer in layers_of(module)]
    x = torch.rand(1, 3, 64, 64)
    (stem,) = [key for key in tuning.cases(1, 64) if key[:4] == ("conv_chain", "float32", "NCHW", False)][:1]
    times = {"triton": 1.0, "composed": 2.0}
    dispatch.save(CPU, {stem: times})
    chain = OPERATIONS["conv_chain"]
    assert dispatch.ranking("conv_chain", chain.measured_by(x, layers)) == ()
    assert dispatch.ranking("conv_chain", chain.measured_by(x, layers[:1])) == ("triton", "composed")
    assert len(chain.measured_by(x, net.blocks[0].layers())) == 3 and chain.measured_by(x, layers[:2]) == ()


def layers_of(module):
    """The layers of a module, or of several in a row."""
    if isinstance(module, torch.nn.Sequential):
        return [layer for child in module for layer in layers_of(child)]
    return module.layers() if hasattr(module, "layers") else []


class FakeGraph:
    def __init__(self, run):
        self.replay = run


@pytest.fixture
def streams(monkeypatch):
    """Stand-ins for a GPU's streams."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())


def test_on_a_gpu_replays_of_graphs_are_timed(streams, monkeypatch):
    recorded = []
    monkeypatch.setattr(
        cuda, "record", lambda run, stream: (recorded.append(run) or FakeGraph(f"replay {run()}"), None)
    )
    runs = {"triton": lambda: 1, "reference": lambda: 2}
    assert tuning.replays(runs, torch.device("cuda")) == {"triton": "replay 1", "reference": "replay 2"}
    assert tuning.replays(runs, CPU) == runs and recorded == list(runs.values())


def test_where_one_cannot_be_recorded_all_are_timed_op_by_op(streams, monkeypatch):
    def record(run, stream):
        if run() == 2:
            raise RuntimeError("operation not permitted when stream is capturing")
        return FakeGraph(run), None

    monkeypatch.setattr(cuda, "record", record)
    runs = {"triton": lambda: 1, "reference": lambda: 2}
    assert tuning.replays(runs, torch.device("cuda")) == runs
