"""The recorder of launches: what the table of runs launches is what gets compiled, and nothing goes unnoticed.

Kernels are recorded in a process of their own: here they are Triton's interpreter's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import pytest

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")

REPORT = """
import json, pkgutil, resource, sys
from importlib import import_module

import torch

import fastperc.kernels
from fastperc import TransformNet
from fastperc.kernels import aot, configs, launches, runs

arch = 90
limits, capabilities = {}, {}
for number in configs.SHARED_MEMORY:
    device = torch.device("cuda", number)
    with launches.recording(number):
        limits[number] = configs.shared_memory(device)
        capabilities[number] = torch.cuda.get_device_capability(device)
table = runs.runs()
alone = {run.name: runs.recorded(arch, [run]) for run in table}
jobs = aot.triton_jobs([arch], [""])
operators = runs.recorded(86, [run for run in table if run.name.startswith(("Gram", "LPIPS"))]).values()
runs.NETWORKS["narrow"] = lambda: TransformNet("paper", width=24)
outside = runs.recorded(arch, [runs.paint("narrow", (512, 512))])

defined = set()
for module in pkgutil.iter_modules(fastperc.kernels.__path__):
    names = vars(import_module(f"fastperc.kernels.{module.name}"))
    defined |= {name for name in names if name.endswith("_kernel")}
paper = {arch: runs.recorded(arch, [runs.paint("paper", (512, 512))]).values() for arch in (80, 86, 90, 120)}
print(json.dumps({
    "recorded": sorted({key for recorded in alone.values() for key in recorded}),
    "compiled": sorted(job.args[0].key for job in jobs),
    "rows": sorted([job.args[0].name, job.args[1]] for job in jobs),
    "alone": {name: len(recorded) for name, recorded in alone.items()},
    "outside": sorted(outside),
    "limits": limits,
    "capabilities": capabilities,
    "registers": {arch: sorted({launch.options.maxnreg or 0 for launch in paper[arch]}) for arch in paper},
    "in_operators": sorted({launch.options.maxnreg or 0 for launch in operators if "_loss_" in launch.name
                            or launch.name.startswith("lpips")}),
    "defined": sorted(defined),
    "descriptors": {arch: sum("tensordesc" in str(launch.signature) for launch in paper[arch]) for arch in paper},
    "conv": [launch._replace(kernel=launch.name, options=vars(launch.options), constants=[], attributes=[])
             for launch in paper[90] if launch.name == "conv_bn_relu_kernel"],
    "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
}, default=str))
"""


@pytest.fixture(scope="module")
def report():
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", REPORT], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_what_is_launched_is_compiled(report):
    assert report["compiled"] == report["recorded"]
    assert not [run for run, launches in report["alone"].items() if not launches], "runs that launch nothing"


@pytest.mark.slow
def test_a_launch_outside_the_table_is_noticed(report):
    """By a network of a width that the table does not have; its passes over the picture are the same."""
    assert set(report["outside"]) - set(report["compiled"])
    assert set(report["outside"]) & set(report["compiled"])


@pytest.mark.slow
def test_every_kernel_is_in_the_table(report):
    assert {kernel for kernel, _ in report["rows"]} == set(report["defined"])


@pytest.mark.slow
def test_a_row_stands_for_one_compilation(report):
    assert len({tuple(row) for row in report["rows"]}) == len(report["rows"])
    assert max(len(config) for _, config in report["rows"]) <= 80


@pytest.mark.slow
def test_launches_depend_on_the_architecture(report):
    """Tensor descriptors on sm_90; fewer stages or channels a step where a block may have less shared memory."""
    assert report["descriptors"]["90"] > 0
    assert report["descriptors"]["80"] == report["descriptors"]["86"] == report["descriptors"]["120"] == 0
    assert report["registers"] == {"80": [0, 255], "86": [0, 255], "90": [0], "120": [0, 255]}
    assert report["in_operators"] == [255]


@pytest.mark.slow
def test_the_recorder_reports_what_a_gpu_of_the_architecture_would(report):
    kib = {arch: limit / 1024 for arch, limit in report["limits"].items()}
    assert kib == {"80": 163, "86": 99, "89": 99, "90": 227, "100": 227, "120": 99}
    assert report["capabilities"] == {arch: list(divmod(int(arch), 10)) for arch in kib}


@pytest.mark.slow
def test_the_arguments_are_specialised(report):
    """The convolutions of stride 2 of the paper's network: pointers, sizes, flags and options as they launch."""
    (signature, other), (options, _) = zip(*[(s, o) for _, s, *_, o in report["conv"] if s["x_ptr"] == "*bf16"])
    assert signature == other and options["num_warps"] == 8 and options["num_stages"] == 4
    assert signature["out_ptr"] == signature["weight_ptr"] == "*bf16" and signature["bias_ptr"] == "*fp32"
    assert signature["skip_ptr"] == signature["partials_ptr"] == signature["CHANNELS_IN"] == "constexpr"
    assert signature["height"] == signature["left"] == "i32"


@pytest.mark.slow
def test_large_pictures_take_no_memory(report):
    """Maps of 1920×1080 are allocated, but never written."""
    assert report["peak"] < 4e9


def test_the_interpreter_launches_nothing(monkeypatch):
    from fastperc.kernels.launches import recording

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET"), recording(90):
        pass


def launch(*, channels=64, flag=False, dtype="bf16", skip=True, stride="i32", aligned=True, num_warps=4):
    """A launch of ``some_kernel(x_ptr, skip_ptr, stride, CHANNELS, REFLECT, BLOCK_C)``."""
    from fastperc.kernels.launches import Launch

    names = ["x_ptr", "skip_ptr", "stride", "CHANNELS", "REFLECT", "BLOCK_C"]
    params = [SimpleNamespace(name=name, is_constexpr=name.isupper()) for name in names]
    kernel = SimpleNamespace(__name__="some_kernel", arg_names=names, params=params)
    pointers = [f"*{dtype}", f"*{dtype}" if skip else "constexpr"]
    constants = {(3,): channels, (4,): flag, (5,): 16}
    constants |= {} if skip else {(1,): None}
    constants |= {(2,): 1} if stride == "constexpr" else {}
    attributes = {(2,): [["tt.divisibility", 16]]} if aligned else {}
    signature = dict(zip(names, [*pointers, stride, *["constexpr"] * 3]))
    return Launch(kernel, signature, constants, attributes, SimpleNamespace(num_warps=num_warps, num_stages=2))


@pytest.mark.parametrize(
    ("change", "plain", "changed"),
    [
        ({"channels": 32}, "bf16 64", "bf16 32"),
        ({"dtype": "fp16"}, "bf16 64", "fp16 64"),
        ({"flag": True}, "bf16 64", "bf16 64 reflect"),
        ({"skip": False}, "bf16 64 skip", "bf16 64"),
        ({"num_warps": 8}, "bf16 64 4 warps", "bf16 64 8 warps"),
        ({"aligned": False}, "bf16 64 stride%16", "bf16 64"),
        ({"stride": "constexpr"}, "bf16 64 stride%16", "bf16 64 stride=1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_names_tell_launches_apart(change, plain, changed):
    from fastperc.kernels.launches import names

    pair = [launch(), launch(**change)]
    assert [names(pair)[one.key] for one in pair] == [plain, changed]
