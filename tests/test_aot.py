"""Compiling every kernel with no GPU: what ships is clean on sm_90, and what is not clean is told."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec

import pytest

from fastperc.kernels import aot
from fastperc.kernels.aot import Row, faults_of, plain_name

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")

# A folder is added to fastperc.kernels, as if its files had shipped.
WITH_FOLDER = """
import sys, fastperc.kernels
fastperc.kernels.__path__.append(sys.argv.pop(1))
from fastperc.kernels.aot import main
sys.exit(main())
"""

BAD_KERNELS = """
import triton
import triton.language as tl
from fastperc.kernels.configs import Variant


@triton.jit
def spilling_kernel(x_ptr, BLOCK: tl.constexpr):  # BLOCK / 32 values a thread, all alive until the last is read
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    tl.store(x_ptr + offs, x - tl.sum(x))


@triton.jit
def greedy_kernel(x_ptr, y_ptr, steps, BLOCK: tl.constexpr):  # 64 KiB a stage
    offs = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for step in range(steps):
        acc = tl.dot(tl.load(x_ptr + step * BLOCK * BLOCK + offs), tl.load(y_ptr + step * BLOCK * BLOCK + offs), acc)
    tl.store(x_ptr + offs, acc.to(tl.float16))


@triton.jit
def broken_kernel(x_ptr):
    tl.store(x_ptr, undefined)


def variants():
    yield Variant(spilling_kernel, "fp32", {"x_ptr": "*fp32"}, {"BLOCK": 8192}, 1, 1, ("x_ptr",), matrix=True)
    signature = {"x_ptr": "*fp16", "y_ptr": "*fp16", "steps": "i32"}
    yield Variant(greedy_kernel, "fp16", signature, {"BLOCK": 128}, 8, 6, ("x_ptr", "y_ptr"), matrix=True)
    yield Variant(broken_kernel, "fp32", {"x_ptr": "*fp32"}, {}, 1, 1)
    yield Variant(broken_kernel, "of another signature", {"y_ptr": "*fp32"}, {}, 1, 1)
"""


def run_aot(*command, **environment):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | environment
    return subprocess.run([sys.executable, *map(str, command)], env=environment, capture_output=True, text=True)


@needs_triton
def test_what_ships_is_clean(tmp_path):
    file = tmp_path / "rows.json"
    done = run_aot("-m", "fastperc.kernels.aot", "--arch", "90", "--json", file)
    assert done.returncode == 0, done.stderr
    rows = json.loads(file.read_text())
    types = {
        "kernel": str,
        "config": str,
        "arch": int,
        "registers": int,
        "spill_bytes": int,
        "shared_bytes": int,
        "instructions": dict,
    }
    for row in rows:
        assert {key: type(value) for key, value in row.items()} == types
        assert row["arch"] == 90 and row["spill_bytes"] == 0 and 0 < row["registers"] <= 255
        assert row["kernel"] in done.stdout
    assert len({(row["kernel"], row["config"]) for row in rows}) == len(rows), "a row's name stands for one kernel"
    on_tensor_cores = {row["kernel"] for row in rows if row["instructions"].get("HGMMA")}
    assert {"gram_partials_kernel", "gram_loss_bwd_kernel"} <= on_tensor_cores
    if shutil.which("nvcc") and aot.CSRC.is_dir():
        assert "tv_loss_kernel" in {row["kernel"] for row in rows}


@needs_triton
def test_what_is_not_clean_is_told(tmp_path):
    (tmp_path / "bad.py").write_text(BAD_KERNELS)
    options = ["--only", "bad", "--arch", "90", "--json", tmp_path / "rows.json"]
    done = run_aot("-c", WITH_FOLDER, tmp_path, *options, TRITON_INTERPRET="1")
    assert done.returncode == 1
    rows = {row["kernel"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert set(rows) == {"greedy_kernel", "spilling_kernel"}
    assert rows["greedy_kernel"]["instructions"]["HGMMA"] and rows["greedy_kernel"]["instructions"]["LDGSTS"]
    spilled, asked = rows["spilling_kernel"]["spill_bytes"], rows["greedy_kernel"]["shared_bytes"]
    assert spilled > 0
    assert [line for line in done.stderr.splitlines() if line.startswith("fault")] == [
        "fault: broken_kernel (fp32) on sm_90: does not compile: NameError('undefined is not defined')",
        "fault: broken_kernel (of another signature) on sm_90: does not compile: "
        "the variant and its kernel do not agree on x_ptr, y_ptr",
        f"fault: greedy_kernel (fp16) on sm_90: {asked} bytes of shared memory, a block may have 232448",
        "fault: spilling_kernel (fp32) on sm_90: a matrix kernel without HGMMA",
        f"fault: spilling_kernel (fp32) on sm_90: spills, {spilled} bytes of local memory a thread",
    ]


CLEAN = Row("k", "bf16", 90, registers=128, spill_bytes=0, shared_bytes=227 * 1024, instructions={"HGMMA": 4})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, None),
        ({"spill_bytes": 8}, "spills, 8 bytes"),
        ({"shared_bytes": 227 * 1024 + 1}, "232449 bytes of shared memory"),
        ({"arch": 80, "shared_bytes": 163 * 1024, "instructions": {"HMMA": 4}}, None),
        ({"arch": 80, "instructions": {"HMMA": 4}}, "a block may have 166912"),
        ({"instructions": {"HMMA": 64, "LDGSTS": 8}}, "without HGMMA"),
        ({"arch": 100, "instructions": {"UTCHMMA": 8}}, None),
        ({"arch": 100, "instructions": {"UTMALDG": 8}}, "a matrix kernel without"),
    ],
    ids=["clean", "spill", "shared", "sm_80", "shared-sm_80", "hmma", "sm_100", "no-mma-sm_100"],
)
def test_faults(change, told):
    faults = faults_of(CLEAN._replace(**change), matrix=True)
    assert len(faults) == (told is not None)
    for fault in faults:
        assert fault.startswith("k (bf16) on sm_") and told in fault and "\n" not in fault
    assert all("matrix" not in fault for fault in faults_of(CLEAN._replace(**change), matrix=False))


@pytest.mark.parametrize(
    ("function", "kernel", "config"),
    [
        (
            "void fastperc::(anonymous namespace)::tv_loss_kernel<__half, float, (fastperc::Norm)1, true>(T1 const*, "
            "fastperc::RowShape)",
            "tv_loss_kernel",
            "__half, float, Norm 1, true",
        ),
        ("fastperc::fill_kernel(float*, long)", "fill_kernel", ""),
        ("_Z11fill_kernelPfl", "_Z11fill_kernelPfl", ""),
    ],
    ids=["template", "plain", "mangled"],
)
def test_names_of_cuda_kernels(function, kernel, config):
    assert plain_name(function) == {"kernel": kernel, "config": config}


@needs_triton
@pytest.mark.parametrize(
    ("arguments", "told"),
    [(["--arch", "70"], "70 is none of 80, 90, 100"), (["--only", "nothing"], "no kernel has 'nothing' in its name")],
    ids=["architecture", "name"],
)
def test_refuses(arguments, told):
    done = run_aot("-m", "fastperc.kernels.aot", *arguments)
    assert done.returncode == 2 and told in done.stderr and "Traceback" not in done.stderr
