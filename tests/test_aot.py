"""Compiling kernels with no GPU: what is launched compiles clean, and a kernel that is not clean is a fault."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from fastperc.kernels import aot, static_table
from fastperc.kernels.aot import Row, faults_of, plain_name
from fastperc.kernels.configs import SHARED_MEMORY
from fastperc.kernels.static_table import StaticRow

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")

# The table of runs has one run only, which launches the kernels below.
WITH_BAD_KERNELS = """
import sys
sys.path.insert(0, sys.argv.pop(1))
from fastperc.kernels import aot, runs
runs.runs = lambda: [runs.Run("bad", lambda: __import__("bad").launch())]
sys.exit(aot.main())
"""

BAD_KERNELS = """
import torch
import triton
import triton.language as tl


@triton.jit
def spilling_kernel(x_ptr, BLOCK: tl.constexpr):  # BLOCK / 32 values a thread, all alive until the last is read
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    tl.store(x_ptr + offs, x - tl.sum(x))


@triton.jit
def product_kernel(x_ptr, y_ptr, steps, BLOCK: tl.constexpr):  # 64 KiB a stage, if BLOCK is 128
    offs = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for step in range(steps):
        acc = tl.dot(tl.load(x_ptr + step * BLOCK * BLOCK + offs), tl.load(y_ptr + step * BLOCK * BLOCK + offs), acc)
    tl.store(x_ptr + offs, acc.to(x_ptr.dtype.element_ty))


@triton.jit
def broken_kernel(x_ptr):
    tl.store(x_ptr, undefined)


def launch():
    x = torch.empty(1 << 20)
    half = x.half()
    spilling_kernel[(1,)](x, BLOCK=8192, num_warps=1, num_stages=1)
    product_kernel[(1,)](half, half, 5, BLOCK=128, num_warps=8, num_stages=6)
    product_kernel[(1,)](half, half, 5, BLOCK=16, num_warps=1, num_stages=1)  # too small for warpgroups
    product_kernel[(1,)](x, x, 5, BLOCK=16, num_warps=1, num_stages=1)  # float32 needs no tensor cores
    broken_kernel[(1,)](x)
"""


def run_aot(*command, **environment):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | environment
    return subprocess.run([sys.executable, *map(str, command)], env=environment, capture_output=True, text=True)


def rows_of(file, *archs: int) -> list[dict]:
    """The rows of a JSON file of clean kernels on ``archs``."""
    rows = json.loads(file.read_text())
    types = {
        "kernel": str,
        "config": str,
        "arch": int,
        "registers": int,
        "spill_bytes": int,
        "shared_bytes": int,
        "instructions": dict,
        "ctas": int,
        "loop": float,
    }
    for row in rows:
        assert {key: type(value) for key, value in row.items()} == types
        assert row["arch"] in archs and row["spill_bytes"] == 0 and 0 < row["registers"] <= 255
        assert row["shared_bytes"] <= SHARED_MEMORY[row["arch"]]
    names = {(row["kernel"], row["config"], row["arch"]) for row in rows}
    assert len(names) == len(rows), "a row's name stands for one kernel"
    assert {row["arch"] for row in rows} == set(archs)
    return rows


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "instructions"), [(86, ("HMMA", "LDGSTS")), (90, ("HGMMA", "UTMALDG"))], ids=["sm_86", "sm_90"]
)
def test_a_handful_is_clean(tmp_path, arch, instructions):
    """The trunk of the paper's network as it is launched: on sm_90 by tensor descriptors."""
    file, only = tmp_path / "rows.json", "bf16 128-128 8x16 k3 s1 relu bias"
    done = run_aot("-m", "fastperc.kernels.aot", "--arch", arch, "--json", file, "--only", only)
    assert done.returncode == 0, done.stderr
    rows = rows_of(file, arch)
    assert 1 <= len(rows) <= 6
    for row in rows:
        assert row["kernel"] == "conv_bn_relu_kernel" and row["config"].startswith(only)
        assert row["kernel"] in done.stdout
        assert all(row["instructions"][name] for name in instructions)


@needs_triton
@pytest.mark.compile
def test_what_ships_is_clean(tmp_path):
    """On an architecture for each limit of shared memory: 163, 99 and 227 KiB. The command compiles for the others."""
    file, archs = tmp_path / "rows.json", (80, 86, 90)
    assert {SHARED_MEMORY[arch] for arch in archs} == set(SHARED_MEMORY.values())
    done = run_aot("-m", "fastperc.kernels.aot", "--arch", ",".join(map(str, archs)), "--json", file)
    assert done.returncode == 0, done.stderr
    rows = rows_of(file, *archs)
    assert all(row["kernel"] in done.stdout for row in rows)
    for arch in archs:
        instruction = "HGMMA" if arch == 90 else "HMMA"
        on_tensor_cores = {row["kernel"] for row in rows if row["arch"] == arch and instruction in row["instructions"]}
        assert {"gram_partials_kernel", "gram_loss_bwd_kernel", "conv_bn_relu_kernel"} <= on_tensor_cores
    import triton

    version = ".".join(triton.__version__.split(".")[:2])
    table = Path(__file__).resolve().parent.parent / "benchmarks" / "static" / f"triton-{version}.csv"
    if table.exists():  # else write it: python -m fastperc.kernels.aot --table FILE
        committed = static_table.from_csv(table.read_text())
        both = {row.arch for row in committed} & set(archs)
        compiled = aot.static_rows([Row(**row) for row in rows if row["arch"] in both])
        assert both and not static_table.regressions(compiled, [row for row in committed if row.arch in both])
    if shutil.which("nvcc") and aot.CSRC.is_dir():
        assert "tv_loss_kernel" in {row["kernel"] for row in rows}


@needs_triton
@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("nvcc") and aot.CSRC.is_dir()), reason="needs nvcc")
def test_the_cuda_kernels_are_clean_on_sm_75(tmp_path):
    """Where Triton has no matrix products. The command compiles the other sources in the same way."""
    file = tmp_path / "rows.json"
    done = run_aot("-m", "fastperc.kernels.aot", "--arch", "75", "--only", "norm_relu", "--json", file)
    assert done.returncode == 0, done.stderr
    rows = json.loads(file.read_text())
    assert rows and not any(row["instructions"] for row in rows)
    assert all(row["arch"] == 75 and row["spill_bytes"] == 0 and row["registers"] <= 128 for row in rows)
    assert all(row["shared_bytes"] <= aot.LIMITS[75] for row in rows)


@needs_triton
def test_what_is_not_clean_is_a_fault(tmp_path):
    (tmp_path / "bad.py").write_text(BAD_KERNELS)
    options = ["--only", "bad", "--arch", "90", "--json", tmp_path / "rows.json"]
    done = run_aot("-c", WITH_BAD_KERNELS, tmp_path, *options, TRITON_INTERPRET="1")
    assert done.returncode == 1, done.stderr
    rows = {(row["kernel"], row["config"]): row for row in json.loads((tmp_path / "rows.json").read_text())}
    large = rows["product_kernel", "fp16 block 128"]
    assert set(rows) == {
        ("spilling_kernel", "fp32"),
        ("product_kernel", "fp16 block 128"),
        ("product_kernel", "fp16 block 16"),
        ("product_kernel", "fp32 block 16"),
    }
    assert large["instructions"]["HGMMA"] and large["instructions"]["LDGSTS"]
    spilled = rows["spilling_kernel", "fp32"]["spill_bytes"]
    assert spilled > 0
    assert [line for line in done.stderr.splitlines() if line.startswith("fault")] == [
        "fault: broken_kernel (fp32) on sm_90: does not compile: NameError('undefined is not defined')",
        f"fault: product_kernel (fp16 block 128) on sm_90: {large['shared_bytes']} bytes of shared memory, "
        "a block may have 232448",
        "fault: product_kernel (fp16 block 16) on sm_90: a matrix kernel without HGMMA",
        f"fault: spilling_kernel (fp32) on sm_90: spills, {spilled} bytes of local memory a thread",
    ]


CLEAN = Row("k", "bf16", 90, registers=128, spill_bytes=0, shared_bytes=227 * 1024, instructions={"HGMMA": 4})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"spill_bytes": 8}, "spills, 8 bytes"),
        ({"shared_bytes": 227 * 1024 + 1}, "232449 bytes of shared memory"),
        ({"arch": 80, "shared_bytes": 163 * 1024, "instructions": {"HMMA": 4}}, None),
        ({"arch": 80, "instructions": {"HMMA": 4}}, "a block may have 166912"),
        ({"instructions": {"HMMA": 64, "LDGSTS": 8}}, "without HGMMA"),
        ({"arch": 86, "shared_bytes": 99 * 1024, "instructions": {"HMMA": 4}}, None),
        ({"arch": 89, "instructions": {"HMMA": 4}}, "a block may have 101376"),
        ({"arch": 120, "shared_bytes": 0, "instructions": {"LDGSTS": 4}}, "a matrix kernel without HMMA"),
        ({"arch": 100, "instructions": {"UTCHMMA": 8}}, None),
        ({"arch": 100, "instructions": {"UTMALDG": 8}}, "a matrix kernel without"),
    ],
    ids=[
        "clean",
        "spill",
        "shared",
        "sm_80",
        "shared-sm_80",
        "hmma",
        "sm_86",
        "shared-sm_89",
        "no-mma-sm_120",
        "sm_100",
        "no-mma-sm_100",
    ],
)
def test_faults(change, message):
    faults = faults_of(CLEAN._replace(**change), matrix=True)
    assert len(faults) == (message is not None)
    for fault in faults:
        assert fault.startswith("k (bf16) on sm_") and message in fault and "\n" not in fault
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
    ("arguments", "message"),
    [
        (["--arch", "70"], "70 is none of 75, 80, 86, 89, 90, 100, 120"),
        pytest.param(
            ["--arch", "90", "--only", "nothing"], "no kernel has 'nothing' in its name", marks=pytest.mark.slow
        ),  # records every launch first
    ],
    ids=["architecture", "name"],
)
def test_refuses(arguments, message):
    done = run_aot("-m", "fastperc.kernels.aot", *arguments)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


LISTING = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;      /* 0x00000a0000017a02 */
                                                               /* 0x000fe20000000f00 */
        /*0010*/                   LDS R2, [R1] ;              /* 0x0000000001027984 */
        /*0020*/                   HMMA.16816.F32 R4, R2 ;     /* 0x000000020404723c */
        /*0030*/              @!P0 BRA 0x90 ;                  /* 0x0000005000008947 */
        /*0040*/                   HMMA.16816.F32 R8, R2 ;     /* 0x000000020808723c */
        /*0050*/               @P0 BRA 0x10 ;                  /* 0xffffffb000000947 */
        /*0060*/                   STG [R1], R4 ;              /* 0x0000000401007986 */
        /*0070*/                   EXIT ;                      /* 0x000000000000794d */
        /*0080*/                   NOP ;                       /* 0x0000000000007918 */
        /*0090*/                   BRA 0x40;                   /* 0xfffffff000007947 */
"""


def test_the_loop_of_a_listing():
    """Its five instructions for two products; the jump back from its end belongs to a wait."""
    assert static_table.loop_length(LISTING) == 2.5
    assert static_table.loop_length(LISTING.replace("@P0 BRA 0x10", "@P0 BRA 0x60").replace("BRA 0x40;", "NOP ;")) == 5
    assert static_table.loop_length(LISTING.replace("HMMA", "FFMA")) == static_table.loop_length("") == 0


@pytest.mark.parametrize(
    ("triton", "archs"), [("3.6", {86, 90, 120}), ("3.9", {80, 86, 89, 90, 100, 120})], ids=["3.6", "3.9"]
)
def test_the_committed_tables(triton, archs):
    folder = Path(__file__).resolve().parent.parent / "benchmarks" / "static"
    text = (folder / f"triton-{triton}.csv").read_text()
    rows = static_table.from_csv(text)
    assert static_table.as_csv(rows) == text and len({row[:3] for row in rows}) == len(rows)
    assert {row.arch for row in rows} == archs
    kernels = {row.kernel for row in rows if row.arch == 90}
    for arch in archs:
        of_arch = [row for row in rows if row.arch == arch]
        assert {row.kernel for row in of_arch} == kernels and all(row.loop > 0 and row.ctas > 0 for row in of_arch)


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "warps", "expected"),
    [
        (90, 168, 0, 4, 2 + 1),
        (90, 255, 0, 8, 1),
        (90, 32, 114 * 1024 - 1024, 4, 2),
        (86, 32, 0, 8, 6),
        (80, 32, 0, 1, 32),
    ],
    ids=["registers", "half", "shared", "warps", "blocks"],
)
def test_blocks_of_a_multiprocessor(arch, registers, shared, warps, expected):
    assert static_table.ctas(arch, registers, shared, warps) == expected


def test_a_kernel_that_got_worse_is_told():
    row = StaticRow("k", "bf16", 90, 128, 2, 20.0)
    table = static_table.from_csv(static_table.as_csv([row]))
    assert table == [row] and not static_table.regressions([row._replace(registers=136, ctas=3, loop=21.0)], table)
    worse = row._replace(registers=137, ctas=1, loop=21.1)
    assert [line.partition(": ")[2] for line in static_table.regressions([worse], table)] == [
        "1 blocks a multiprocessor, the table has 2",
        "137 registers, the table has 128",
        "21.1 instructions for each product, the table has 20.0",
    ]
    (new, gone) = static_table.regressions([row._replace(config="fp16")], table)
    assert new.endswith("(fp16) on sm_90: is not in the table") or gone.endswith("is not in the table")
