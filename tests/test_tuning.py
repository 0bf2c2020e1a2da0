"""`fastperc tune`: what it measures, prints and keeps."""

from __future__ import annotations

import signal
import time
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from fastperc import TransformNet, backends, dispatch, ops
from fastperc.backends import Implementation, Operation, TuningCases
from fastperc.cli.terminal import Stopped
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
        (case,) = tuning.choices(CPU, [Key("op", "float32", "NCHW", grad, ((1, 3, 16, 16),))])
        times = tuning.measure(case, CPU)
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


def cases(count):
    """As many cases of the fake operation, of images of 16, 17, ... pixels."""
    keys = [Key("op", "float32", "NCHW", False, ((1, 3, 16, 16 + i),)) for i in range(count)]
    return tuning.choices(CPU, keys)


def seconds_a_pixel(monkeypatch, seconds):
    """Makes the native backend of the fake operation slow, in proportion to the pixels; returns the pixels called."""
    calls = []
    record = tuning.OPERATIONS["op"]

    def run(x):
        calls.append(x.numel())
        time.sleep(seconds * x.numel())
        return x.sum()

    slow = Implementation("native", run)
    implementations = (record.implementations[0], slow, record.implementations[2])
    monkeypatch.setitem(tuning.OPERATIONS, "op", replace(record, implementations=implementations))
    return calls


def test_what_would_take_too_long_is_tried_on_small_images_only(fake_operation, monkeypatch):
    monkeypatch.setattr(tuning, "SECONDS_A_CALL", 0.2)
    calls = seconds_a_pixel(monkeypatch, 5e-6)  # a call of the whole image would take a second
    key = Key("op", "bfloat16", "NCHW", False, ((1, 3, 256, 256),))
    (case,) = tuning.choices(CPU, [key])
    assert case.names == ("native", "reference")
    began = time.monotonic()
    times = tuning.measure(case, CPU)
    assert set(times) == {"reference"} and time.monotonic() - began < 0.7
    assert max(calls) == 3 * 64 * 64


def test_a_slow_case_ends_with_a_round(fake_operation, monkeypatch):
    monkeypatch.setattr(tuning, "MOST_SECONDS_A_CASE", 0.05)
    calls = seconds_a_pixel(monkeypatch, 1e-4)
    assert set(tuning.measure(*cases(1), CPU)) == {"native", "reference"}
    assert len(calls) == 2  # to warm up, and the round


def test_the_time_is_bounded_and_what_fits_is_measured(fake_operation, monkeypatch):
    slow = Key("op", "float32", "NCHW", False, ((4, 3, 128, 128),))
    seconds_a_pixel(monkeypatch, 1e-6)
    monkeypatch.setattr(tuning, "SECONDS_A_CASE", 0.05)
    measured = list(tuning.tune(CPU, [*tuning.choices(CPU, [slow]), *cases(2)], 0.3))
    assert [bool(one.times) for one in measured] == [False, True, True]
    assert all(0 <= one.seconds_left <= 0.3 for one in measured) and measured[-1].seconds_left == 0
    assert not any(one.times for one in tuning.tune(CPU, cases(2), 0))


def test_the_time_left_is_that_of_the_same_operation_or_else_the_mean():
    def case(operation, dtype="float32", grad=False):
        return tuning.Case(Key(operation, dtype, "NCHW", grad, ((1, 3, 16, 16),)), ("a", "b"))

    costs = {case("op"): 2.0, case("other"): 6.0}
    assert tuning.expected_cost(case("op", "bfloat16"), costs) == 2.0
    assert tuning.expected_cost(case("op", "bfloat16", grad=True), costs) == 4.0


def test_what_matters_comes_first(monkeypatch):
    monkeypatch.setattr(tuning, "computes_in", lambda dtype, device: dtype != torch.bfloat16)
    assert tuning.dtypes_by_importance(CPU) == ["float32", "float16", "bfloat16"]
    assert tuning.dtypes_by_importance(torch.device("cuda"))[-1] == "float32"
    dtypes = [case.key.dtype for case in tuning.choices(CPU, tuning.cases(1, 16))]
    assert dtypes == sorted(dtypes, key=["float32", "float16", "bfloat16"].index) and len({*dtypes}) == 3


def interrupt(monkeypatch, error, after):
    """Makes :func:`tuning.measure` raise ``error`` once ``after`` cases are measured."""
    measured = []

    def measure(case, *others):
        if len(measured) == after:
            raise error
        measured.append(case)
        return {"native": 1.0, "reference": 2.0}

    monkeypatch.setattr(tuning, "measure", measure)
    return measured


@pytest.mark.parametrize("after", [0, 2])
def test_ctrl_c_keeps_what_was_measured(run, fake_operation, monkeypatch, after):
    monkeypatch.setattr(tuning, "cases", lambda batch, size: [case.key for case in cases(3)])
    measured = interrupt(monkeypatch, KeyboardInterrupt(), after)
    status, out, err = run("tune", "--device", "cpu")
    path = dispatch.path_of(CPU)
    kept = f"kept in {path}" if after else "nothing to keep"
    assert (status, out) == (130, "")
    assert err == f"fastperc tune: interrupted; {after} of 3 cases measured, {kept}\n"
    assert path.exists() == bool(after)
    assert not after or set(dispatch.table(CPU).times) == {case.key for case in measured}


def test_a_signal_keeps_what_was_measured(run, fake_operation, monkeypatch):
    monkeypatch.setattr(tuning, "cases", lambda batch, size: [case.key for case in cases(3)])
    measured = interrupt(monkeypatch, Stopped(signal.SIGTERM), 1)
    assert run("tune", "--device", "cpu") == (143, "", "fastperc tune: stopped by SIGTERM\n")
    assert set(dispatch.table(CPU).times) == {case.key for case in measured}


def test_a_second_run_measures_what_was_left_out(run, fake_operation, monkeypatch):
    monkeypatch.setattr(tuning, "cases", lambda batch, size: [case.key for case in cases(3)])
    measured = []

    def measure(case, device, seconds_left):
        measured.append(case)
        return {"native": 1.0, "reference": 2.0} if len(measured) != 2 else {}

    monkeypatch.setattr(tuning, "measure", measure)
    status, out, err = run("tune", "--device", "cpu", "--minutes", 1)
    assert status == 0 and len(out.splitlines()) == 4
    assert err.splitlines()[-1] == "1 of 3 cases left out for lack of time; `fastperc tune` again measures them"
    assert run("tune", "--device", "cpu").status == 0 and measured[3:] == measured[1:2]
    assert len(dispatch.table(CPU).times) == 3
    assert run("tune", "--device", "cpu").status == 0 and measured[4:] == measured[:3], "all anew"


def test_tune(run, hasty):
    assert run("tune", "--show", "--device", "cpu").out == f"there is no table, {dispatch.path_of(CPU)}\n"
    status, out, err = run("tune", "--device", "cpu", "--size", 16, "--batch", 1)
    count = len(tuning.choices(CPU, tuning.cases(1, 16)))
    assert status == 0 and f"tuning  {count}/{count}" in err
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
        (["--minutes", 0], "0 is not a finite number above 0"),
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
