"""The fastest measured backend runs: the table's rules and its file."""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from fastperc import TVLoss, devices, dispatch, ops, use_backend
from fastperc.backends import Implementation, Operation
from fastperc.dispatch import Key
from fastperc.ops import OPERATIONS
from fastperc.tools import tuning
from fastperc.types import RELU

CPU = torch.device("cpu")
IMAGE = (4, 3, 256, 256)


def key(*shapes, grad=False, dtype="float32", layout="NCHW"):
    return Key("op", dtype, layout, grad, shapes or (IMAGE,))


def operation(**reasons):
    """An operation "op" of some tensors: an implementation for each backend, and plain PyTorch."""
    implementations = [
        Implementation(backend, lambda *xs, backend=backend: backend, lambda *xs, reason=reason: reason)
        for backend, reason in reasons.items()
    ]
    plain = Implementation("reference", lambda *xs: "reference")
    return Operation("op", "Op", (*implementations, plain), measured_by=lambda *xs: xs)


def chosen(*shapes, **reasons):
    """What runs on tensors of ``shapes``; by rule of thumb the native backend."""
    return operation(**(reasons or {"native": None}))(*(torch.empty(shape) for shape in shapes or (IMAGE,)))


def measured(*fastest_first):
    return {backend: 1.0 + i for i, backend in enumerate(fastest_first)}


# The rules


def test_by_rule_of_thumb_where_nothing_was_measured():
    assert dispatch.table(CPU) is None
    assert chosen() == "native"


def test_the_fastest_measured_wins():
    dispatch.save(CPU, {key(): measured("reference", "native")})
    assert chosen() == "reference"
    dispatch.save(CPU, {key(): measured("native", "reference")})
    assert chosen() == "native"
    dispatch.save(CPU, {key(): measured("triton", "native", "reference")})
    assert chosen(native=None, triton=None) == "triton"


def test_the_fastest_is_passed_over_where_it_cannot_serve():
    dispatch.save(CPU, {key(): measured("triton", "reference", "native")})
    assert chosen(native=None, triton="broken") == "reference"
    dispatch.save(CPU, {key(): measured("native", "triton", "reference")})
    assert chosen(triton=None, native="broken") == "triton"
    assert chosen(triton="broken", native="broken") == "reference"


def test_a_forced_backend_beats_the_table():
    dispatch.save(CPU, {key(): measured("reference", "native")})
    with use_backend("native"):
        assert chosen() == "native"


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        ([(4, 3, 256, 256)], "reference"),
        ([(1, 3, 512, 512)], "reference"),
        ([(4, 3, 200, 300)], "reference"),
        ([(4, 6, 300, 300)], "reference"),
        ([(4, 3, 64, 64)], None),
        ([(4, 13, 256, 256)], None),
        ([(0, 3, 256, 256)], None),
        ([(1, 64, 2000, 2000)], "native"),
        ([(1, 64, 1024, 1024), (1, 128, 512, 512)], None),
    ],
    ids=lambda value: " ".join("x".join(map(str, shape)) for shape in value) if isinstance(value, list) else "",
)
def test_a_measurement_carries_to_sizes_that_are_near(shapes, expected):
    entries = {
        key((4, 3, 256, 256)): measured("reference", "native"),
        key((1, 64, 1024, 1024)): measured("native", "reference"),
    }
    assert next(iter(dispatch.Table(Path(), "", entries).nearest(key(*shapes))), None) == expected


@pytest.mark.parametrize(
    "other",
    [key(grad=True), key(dtype="float16"), key(layout="NHWC"), key(IMAGE, IMAGE), key()._replace(operation="o")],
)
def test_a_measurement_holds_for_nothing_else(other):
    dispatch.save(CPU, {key(): measured("reference", "native")})
    assert dispatch.table(CPU).nearest(other) == {}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_ask_for_what_is_tuned(name, monkeypatch):
    """The key that an operation looks up is the one that its cases are measured under."""
    dispatch.save(CPU, {key(): measured("native", "reference")})
    asked = []
    monkeypatch.setattr(dispatch, "_measured", lambda device, key: asked.append(key) or ())
    operation = OPERATIONS[name]
    for case in tuning.cases(batch=2, size=16):
        if case.operation == name:
            operation(*operation.tuning_cases.call(*tuning.tensors_of(case, CPU)))
            assert {key for key in asked if key.operation == name} == {case}
            asked.clear()


@pytest.mark.parametrize("native", [True, False])
def test_under_autocast_the_loss_network_is_looked_up_in_the_dtype_it_computes_in(native, monkeypatch):
    monkeypatch.setattr(devices, "_cpu_computes_in", lambda dtype: native)
    dispatch.save(CPU, {key(): measured("native", "reference")})
    asked = []
    monkeypatch.setattr(dispatch, "_measured", lambda device, key: asked.append(key) or ())
    case = next(case for case in tuning.cases(1, 16) if case.operation == "vgg_loss" and case.dtype == "float32")
    with torch.autocast("cpu", torch.bfloat16):
        ops.vgg_loss(*OPERATIONS["vgg_loss"].tuning_cases.call(*tuning.tensors_of(case, CPU)))
    assert [key.dtype for key in asked if key.operation == "vgg_loss"] == ["bfloat16" if native else "float32"]


def test_threads_read_one_table(monkeypatch):
    dispatch.save(CPU, {key(): measured("reference", "native")})
    reads, read = [], dispatch._read
    monkeypatch.setattr(dispatch, "_read", lambda *arguments: reads.append(time.sleep(0.02)) or read(*arguments))
    found = []
    threads = [threading.Thread(target=lambda: found.append(chosen())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["reference"] * 8 and len(reads) == 1


# Compiled graphs


OP = Operation("op", "Op", (Implementation("native", lambda x: x + 1), Implementation("reference", lambda x: x)))


def one_if_native(x):
    return OP(x)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_a_compiled_graph_of_known_shapes_is_chosen_for(dynamic):
    dispatch.save(CPU, {key((1, 3, 32, 32)): measured("reference", "native")})
    torch.compiler.reset()
    compiled = torch.compile(one_if_native, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    assert compiled(torch.zeros(1, 3, 32, 32)).any() == dynamic, "one graph for all sizes goes by rule of thumb"
    assert compiled(torch.zeros(1, 3, 400, 400)).all()


@pytest.mark.parametrize("fastest", ["native", "reference"])
def test_an_operation_compiles_with_a_table(fastest):
    shape = (1, 3, 16, 16)
    entries = {key(shape, grad=True)._replace(operation="tv_loss"): measured(fastest)}
    dispatch.save(CPU, entries)
    torch.compiler.reset()
    compiled = torch.compile(TVLoss(), fullgraph=True, backend="aot_eager")
    for size in (16, 24, 40):  # the second compilation is of dynamic shapes
        x = torch.rand(1, 3, size, size, requires_grad=True)
        y = x.detach().clone().requires_grad_()
        compiled(x).backward()
        TVLoss()(y).backward()
        assert torch.allclose(x.grad, y.grad, atol=1e-6)
    graph = str(torch.export.export(TVLoss(), (torch.rand(shape, requires_grad=True),)).graph)
    assert ("tv_loss_fwd" in graph) == (fastest == "native")


# The file


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: "",
        lambda content: "{",
        lambda content: "[]",
        lambda content: "{}",
        lambda content: content[: len(content) // 2],
        lambda content: content.replace(": 1.0", ": -1.0"),
        lambda content: content.replace(": 1.0", ": NaN"),
        lambda content: content.replace(": 1.0", ': "fast"'),
        lambda content: content.replace("[[4, 3,", "[[Infinity,"),
        lambda content: content.replace("[[4, 3,", "[[4,"),
        lambda content: content.replace('{"native"', '[{"native"').replace("}}", "}]}"),
        lambda content: "\udcff" + content,
    ],
    ids=["empty", "cut", "list", "no-header", "half", "negative", "nan", "word", "infinite", "3d", "times", "no-text"],
)
def test_a_damaged_table_is_told_once_and_not_used(damage):
    path = dispatch.save(CPU, {key(): measured("native", "reference")})
    path.write_bytes(damage(path.read_text()).encode(errors="surrogateescape"))
    with pytest.warns(UserWarning, match=path.name) as told:
        assert chosen(triton=None, native=None) == "triton"
    assert len(told) == 1 and "\n" not in str(told[0].message)
    assert chosen(triton=None, native=None) == "triton"
    with pytest.warns(UserWarning, match=path.name):
        dispatch.save(CPU, {key(): measured("native", "reference")})
    assert chosen(triton=None, native=None) == "native"


@pytest.mark.parametrize("field", ["device", "torch", "fastperc", "format"])
def test_a_table_of_another_version_is_not_used(field):
    path = dispatch.save(CPU, {key(): measured("reference", "native")})
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, field: "0.0.1"}))
    dispatch.forget()
    assert dispatch.table(CPU) is None and chosen() == "native"
    path.write_text(json.dumps(content))
    dispatch.forget()
    assert chosen() == "reference"


def test_doctor_ignores_names_that_it_does_not_know(run):
    case = next(case for case in tuning.cases(1, 16) if case.operation == "conv_bn_relu")
    dispatch.save(CPU, {case: measured("a kernel of long ago", "reference")})
    assert run("doctor").status == 0


def test_a_measured_batch_norm_says_nothing_of_an_instance_norm():
    x = torch.rand(4, 32, 16, 16).contiguous(memory_format=torch.channels_last)
    dispatch.save(CPU, {Key.of("norm_relu", x, (tuple(x.shape),)): measured("reference", "native")})
    record = OPERATIONS["norm_relu"]
    assert record.choose(x, torch.nn.BatchNorm2d(32), RELU, None).name == "reference"
    assert record.choose(x, torch.nn.InstanceNorm2d(32, affine=True), RELU, None).name == "native"


def test_versions_have_files_of_their_own(monkeypatch):
    paths = {dispatch.path_of(CPU)}
    monkeypatch.setattr(dispatch, "__version__", "0.0.1")
    paths.add(dispatch.path_of(CPU))
    monkeypatch.setattr(torch, "__version__", "3.14.15")
    paths.add(dispatch.path_of(CPU))
    monkeypatch.setattr(dispatch, "device_name", lambda device: "Another: CPU/GPU")
    paths.add(dispatch.path_of(CPU))
    assert len(paths) == 4
    assert dispatch.path_of(CPU).name == "another-cpu-gpu-torch3.14-fastperc0.0.1.json"


def test_a_table_grows():
    small, large = key((1, 3, 16, 16)), key((1, 3, 512, 512))
    dispatch.save(CPU, {small: measured("native"), large: measured("native")})
    dispatch.save(CPU, {small: measured("reference")})
    assert dispatch.table(CPU).times == {small: measured("reference"), large: measured("native")}


def test_a_table_is_written_whole_or_not_at_all(monkeypatch):
    path = dispatch.save(CPU, {key(): measured("reference", "native")})

    def write_half(self, text, **options):
        self.write_bytes(text.encode()[:50])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", write_half)
    with pytest.raises(OSError, match="No space"):
        dispatch.save(CPU, {key(): measured("native")})
    dispatch.forget()
    assert chosen() == "reference"
    assert list(path.parent.iterdir()) == [path]


def test_a_table_that_ships_is_used_until_there_is_one_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.setattr(dispatch, "SHIPPED", tmp_path)
    monkeypatch.setattr(dispatch, "device_name", lambda device: "Some CPU")
    dispatch.save(CPU, {key(): measured("reference", "native")}).rename(tmp_path / "some-cpu.json")
    dispatch.forget()
    assert chosen() == "reference" and dispatch.table(CPU).path == tmp_path / "some-cpu.json"
    dispatch.save(CPU, {key(): measured("native", "reference")})
    assert chosen() == "native"


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {"XDG_CACHE_HOME": "/var/me"}, "/var/me/fastperc"),
        ("linux", {}, "/home/me/.cache/fastperc"),
        ("darwin", {}, "/home/me/Library/Caches/fastperc"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/fastperc"),
        ("win32", {}, "/home/me/AppData/Local/fastperc"),
    ],
    ids=["xdg", "linux", "mac", "windows", "windows-bare"],
)
def test_cache_folder(platform, variables, expected, monkeypatch):
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(Path, "home", lambda: Path("/home/me"))
    assert dispatch.cache_folder() == Path(expected)
