"""The CUDA kernels, run on the CPU: against float64, in several orders of threads, and under sanitizers."""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from cases import DTYPES, GRAD_ERROR, LAYOUTS, LOSS_ERROR, NORMS, SHAPES, dtype_id, error, shape_id
from oracle import tv_loss as by_formula
from torch import nn
from torch.nn.functional import pad

from fastperc import _native, ops, use_backend
from fastperc.types import Window

HERE = Path(__file__).parent / "cuda_on_cpu"
CSRC = HERE.parents[1] / "csrc"
SOURCES = sorted(CSRC.glob("*.cu"))
FLAGS = ["-std=c++17", "-O1", "-Wno-unknown-pragmas", "-include", HERE / "cuda_on_cpu.h", "-I", CSRC]
SANITIZERS = ["-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


# The sources of each program. The sanitized ones are compiled with SANITIZERS.
PROGRAMS = {
    "driver": [CSRC / "tv_loss.cu", HERE / "driver.cpp"],
    "driver-sanitized": [CSRC / "tv_loss.cu", HERE / "driver.cpp"],
    "faults-sanitized": [HERE / "faults.cu"],
}


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """A function that returns the path of a program, which is compiled once for all tests and workers."""
    if shutil.which("g++") is None or sys.platform != "linux":
        pytest.skip("needs g++ on Linux")
    import fcntl  # which Windows does not have

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cuda_on_cpu"
    folder.mkdir(exist_ok=True)

    def program(name):
        with (folder / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (folder / name).exists():
                compile_program(folder, name)
        return folder / name

    return program


def compile_program(folder, name):
    """Compiles the program called ``name`` into ``folder``, its sources in parallel."""
    sanitizers = SANITIZERS if name.endswith("sanitized") else []
    if sanitizers and not sanitizers_work(folder / f"{name}-empty.cpp"):
        pytest.skip("this g++ comes without AddressSanitizer or UBSan")

    def compile_source(source):
        command = ["g++", *FLAGS, *sanitizers, "-x", "c++", "-c", source, "-o", folder / f"{name}-{source.stem}.o"]
        return subprocess.run(command, capture_output=True, text=True)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for done in pool.map(compile_source, PROGRAMS[name]):
            assert done.returncode == 0, done.stderr
    objects = [folder / f"{name}-{source.stem}.o" for source in PROGRAMS[name]]
    subprocess.run(["g++", *sanitizers, *objects, "-o", folder / name], check=True)


def sanitizers_work(source):
    source.write_text("int main() {}")
    command = ["g++", *SANITIZERS, source, "-o", source.with_suffix("")]
    return subprocess.run(command, capture_output=True).returncode == 0


# What the kernels compute

# Besides the layouts that every backend is tested with: rows of 16-byte vectors with space between them, and an image
# that starts in the middle of a vector.
CUDA_LAYOUTS = LAYOUTS | {
    "spaced": lambda x: pad(x, (0, 8))[..., : x.shape[3]],
    "spaced-nhwc": lambda x: pad(x, (0, 8)).contiguous(memory_format=torch.channels_last)[..., : x.shape[3]],
    "shifted": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
}
LARGE = (4, 3, 64, 300)  # of which one image takes a second here
# Whole vectors and remainders; rows that end within a tile, at its end, and one vector after it; tiles of fewer rows.
GEOMETRIES = [
    *[
        ((1, *shape[1:]) if shape == LARGE else shape, layout, layout)
        for shape in SHAPES
        for layout in ("nchw", "nhwc")
    ],
    ((1, 2, 17, 264), "nchw", "nchw"),
    ((2, 3, 6, 88), "nhwc", "nhwc"),
    ((1, 1, 4, 8), "nchw", "nchw"),
    ((1, 3, 3, 8), "nhwc", "nhwc"),
    ((2, 3, 9, 48), "nchw", "spaced"),
    ((2, 3, 9, 48), "nhwc", "spaced-nhwc"),
    ((2, 3, 9, 48), "spaced", "nchw"),
    ((2, 3, 9, 48), "spaced-nhwc", "nhwc"),
    ((2, 3, 9, 48), "shifted", "nchw"),
    ((2, 3, 9, 48), "nchw", "shifted"),
    ((2, 3, 9, 48), "cropped", "nchw"),
    ((2, 3, 9, 48), "cropped-nhwc", "cropped-nhwc"),
    ((2, 3, 9, 48), "every-other-channel", "some-channels"),
    ((2, 4, 9, 48), "nhwc", "nhwc"),
    *[((2, 3, 9, 48), layout, None) for layout in ("nchw", "nhwc", "cropped")],
]


class Case(NamedTuple):
    shape: tuple[int, ...]
    layout: str
    grad_layout: str | None
    dtype: torch.dtype
    norm: str

    @property
    def id(self) -> str:
        layouts = self.layout if self.layout == self.grad_layout else f"{self.layout}-to-{self.grad_layout or 'none'}"
        return f"{shape_id(self.shape)}-{layouts}-{dtype_id(self.dtype)}-{self.norm}"

    @property
    def x(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        image = torch.rand(self.shape, generator=generator).to(self.dtype)
        x = CUDA_LAYOUTS[self.layout](image)
        outside = torch.full((x.untyped_storage().nbytes() // x.element_size(),), float("nan"), dtype=self.dtype)
        return view(outside, x).copy_(image)

    @property
    def grad_like(self) -> torch.Tensor | None:
        """A tensor with the shape and the strides of the gradient, or ``None`` if none is wanted."""
        return None if self.grad_layout is None else CUDA_LAYOUTS[self.grad_layout](torch.empty_like(self.x))


CASES = [Case(*geometry, dtype, norm) for geometry in GEOMETRIES for dtype in DTYPES for norm in NORMS]


def view(memory: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return memory.as_strided(like.shape, like.stride(), like.storage_offset())


def to_bytes(memory: torch.Tensor) -> bytes:
    return bytes(memory.untyped_storage())


def blobs(*items: bytes) -> bytes:
    return b"".join(struct.pack("<Q", len(item)) + item for item in items)


def numbers(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}q", *values)


def request(case: Case) -> bytes:
    """The case as tests/cuda_on_cpu/driver.cpp reads it. The buffers for the results are full of NaN."""
    x, grad = case.x, case.grad_like
    rows = _native.row_layout(x)
    out = rows if grad is None else _native.row_layout(grad)
    assert out.shape == rows.shape and rows.tensor is x, "the launcher copies this layout first"
    offsets = [0 if t is None else t.storage_offset() * t.element_size() for t in (x, grad)]
    return blobs(
        b"tv_loss_fwd",
        str(case.dtype).split(".")[1].encode(),
        case.norm.encode(),
        numbers(*rows.shape),
        numbers(*rows.strides),
        numbers(*out.strides),
        numbers(*offsets),
        to_bytes(x),
        b"" if grad is None else b"\xff" * grad.untyped_storage().nbytes(),
        b"\xff" * (8 if case.dtype == torch.float64 else 4),
    )


def run_cases(program: Path, cases: Sequence[Case]) -> list[bytes]:
    """The contents of the buffers that the launchers filled, one after the other."""
    done = subprocess.run([program], input=b"".join(map(request, cases)), capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-4000:]
    answers, rest = [], done.stdout
    while rest:
        (size,) = struct.unpack_from("<Q", rest)
        answers.append(rest[8 : 8 + size])
        rest = rest[8 + size :]
    return answers


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_matches_formula_in_every_order_of_threads(program, case):
    filled, loss = run_cases(program("driver"), [case])
    expected_loss, expected = by_formula(case.x, case.norm)
    loss = torch.frombuffer(bytearray(loss), dtype=torch.promote_types(case.dtype, torch.float32))
    assert error(loss[0], expected_loss) <= LOSS_ERROR[case.dtype]
    if case.grad_layout is None:
        assert filled == b""
        return

    memory = torch.frombuffer(bytearray(filled), dtype=case.dtype) if filled else torch.empty(0, dtype=case.dtype)
    grad = view(memory, case.grad_like)
    assert error(grad, expected) <= GRAD_ERROR[case.dtype]
    on_cpu = torch.empty_like(grad, memory_format=torch.preserve_format)
    x = case.x.to(memory_format=torch.channels_last if _native.is_channels_last(on_cpu) else torch.contiguous_format)
    _native.tv_loss_fwd(x, on_cpu.copy_(grad), torch.empty_like(loss[0]), case.norm)
    assert torch.equal(grad, on_cpu), "the CPU kernel shares the maths, so the bits are equal"
    grad.fill_(float("nan"))
    assert memory.isnan().all(), "the kernel wrote between the rows"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_clean_under_sanitizers(program, dtype):
    cases = [case for case in CASES if case.dtype == dtype]
    assert run_cases(program("driver-sanitized"), cases) == run_cases(program("driver"), cases)


def test_every_cuda_launcher_is_run(emulated):
    """Here by the driver; the others by the operations that use them (test_cuda_norms.py, test_cuda_epilogues.py)."""
    x = torch.rand(1, 3, 8, 8).requires_grad_()
    emulated.called.clear()
    with emulated.on_gpu(), use_backend("native"):
        ops.norm_relu(x, nn.BatchNorm2d(3)).sum().backward()
        ops.image_io(x.detach(), Window(0, 0, 8, 8), (2, -1), torch.float32)
        _native.picture(x.detach(), torch.zeros(3), "tanh", torch.empty_like(x))
    launchers = set(re.findall(r"\b(\w+_cuda)\(", (CSRC / "kernels.h").read_text()))
    by_driver = {f"{name}_cuda" for name in re.findall(r'launcher == "(\w+)"', (HERE / "driver.cpp").read_text())}
    assert launchers == by_driver | {name for name in emulated.called if name.endswith("_cuda")}


# fastperc.kernels.aot compiles for the others, and fails on spills too.
@pytest.mark.parametrize("arch", [pytest.param(75, marks=pytest.mark.slow), 90])
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)
def test_compiles_with_nvcc_without_spills(source, arch, tmp_path):
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        pytest.skip("needs nvcc")
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    if f"sm_{arch}" not in known:
        pytest.skip(f"this nvcc does not compile for sm_{arch}")
    code = f"sm_{arch}{'a' * (arch == 90)}"
    command = [nvcc, "-cubin", f"-arch={code}", "-std=c++17", "-O3", "-DNDEBUG", "-Xptxas=-v", source]
    command += ["-Werror=all-warnings", "-o", tmp_path / "kernels.cubin"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert spills and set(spills) == {("0", "0", "0")}


# Mistakes that the emulation finds


def run_fault(program, name):
    return subprocess.run([program("faults-sanitized"), name], capture_output=True, text=True)


@pytest.mark.parametrize("name", ["missing-barrier", "missing-second-barrier", "lockstep", "float-atomics"])
def test_a_race_is_reported(program, name):
    assert "depends on the order" in run_fault(program, name).stdout


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "other-barrier",
            r"threads 0 to 39: wait at __syncthreads \(faults.cu:(\d+)\)\n.*40 to 95: .*faults.cu:(?!\1)",
        ),
        ("early-exit", r"divergence in block \d,0,0.*threads 5 to 5: exited\n.*6 to 95: wait at __syncthreads"),
        ("half-a-warp", r"threads 0 to 15: wait at __shfl_down_sync .* 0xffffffff\n.*16 to 31: exited"),
        ("not-in-mask", "__shfl_sync: a lane not in its mask"),
        ("out-of-bounds", "heap-buffer-overflow"),
        ("shared-out-of-bounds", "index 96 out of bounds"),
        ("dynamic-out-of-bounds", "use-after-poison"),
        ("misaligned", "misaligned address .* 16 byte alignment"),
    ],
    ids=lambda value: value if re.fullmatch(r"[\w-]+", value) else "",
)
def test_a_mistake_is_reported(program, name, message):
    done = run_fault(program, name)
    assert done.returncode != 0
    assert re.search(message, done.stderr, re.DOTALL), done.stderr


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("reverse", list(range(95, -1, -1))),
        ("sound", [1] * 96),
        ("stale-shared", [1] * 96),
    ],
    ids=["reverse", "sound", "stale-shared"],
)
def test_a_sound_kernel_passes(program, name, expected):
    done = run_fault(program, name)
    assert done.returncode == 0, done.stderr
    assert [int(number) for number in done.stdout.split()] == expected
