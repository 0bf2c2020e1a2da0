"""Compiles every kernel that real runs launch, for every architecture, with no GPU, and reports what came of it.

    python -m fastperc.kernels.aot [--json FILE] [--table FILE] [--arch 80,86] [--only NAME]…

``fastperc.kernels.runs`` lists the runs. Fails on a kernel that does not compile, that spills registers, that asks for
more shared memory than a block may have, or whose products in half precision missed the tensor cores.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from fastperc.files import write_atomically
from fastperc.kernels import static_table
from fastperc.kernels.configs import KIB, SHARED_MEMORY
from fastperc.progress import track

if TYPE_CHECKING:
    from fastperc.kernels.launches import Launch

CSRC = Path(__file__).resolve().parents[1] / "csrc"  # in a checkout
RESERVED = 1024  # bytes of shared memory that CUDA takes beyond the limit; reported from sm_90 on
TENSOR_MEMORY_COLUMNS = 512
LIMITS = {75: 64 * KIB, **SHARED_MEMORY}  # sm_75 has CUDA kernels only: Triton has no matrix products for it
HALF_PRODUCT = re.compile(r"tt\.dot\b.*xb?f16\b")  # in Triton's own intermediate code
MATRIX_INSTRUCTION = {90: r"HGMMA", 100: r"UTC\w*MMA|HMMA"}  # on all others HMMA

# One instruction of a listing: its address, a predicate perhaps, and the mnemonic up to its first dot.
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(\w+)", re.MULTILINE)
REPORTED = re.compile(r"\w*MMA|LDGSTS|UTMA(LDG|STG|REDG)|UBLK\w+")  # tensor cores; asynchronous and bulk copies


class Row(NamedTuple):
    """What one kernel became on one architecture."""

    kernel: str
    config: str
    arch: int
    registers: int  # a thread
    spill_bytes: int  # of local memory a thread
    shared_bytes: int  # a block
    instructions: dict[str, int]  # tensor-core instructions and asynchronous copies in the machine code, where listed
    ctas: int = 0  # blocks that a multiprocessor runs at a time; of Triton's kernels
    loop: float = 0.0  # instructions for each of the tensor cores', in the loop

    @property
    def name(self) -> str:
        return f"{self.kernel} ({self.config}) on sm_{self.arch}"


class Compiled(NamedTuple):
    """What came of one job: rows, and one line for each thing that is wrong with them."""

    rows: list[Row]
    faults: list[str]


def main(argv: Sequence[str] | None = None) -> int:
    """Compiles, prints the table, and returns the exit status: 0, 1 for a fault, 2 for bad arguments."""
    parser = argparse.ArgumentParser(prog="python -m fastperc.kernels.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    parser.add_argument("--table", type=Path, metavar="FILE", help="also write the static table, CSV, there")
    parser.add_argument(
        "--arch",
        type=architectures,
        default=",".join(map(str, LIMITS)),
        metavar="A,B",
        help="default: %(default)s",
    )
    parser.add_argument(
        "--only",
        action="append",
        metavar="NAME",
        help="only rows with NAME in module, kernel or config; may be repeated",
    )
    arguments = parser.parse_args(argv)

    if find_spec("triton") is None:
        parser.error("Triton is not installed, nor are the tools in its wheel")
    warnings.filterwarnings("ignore", module="triton")
    os.environ.pop("TRITON_INTERPRET", None)  # under it, @triton.jit makes functions that no compiler takes
    only = arguments.only or [""]
    jobs = triton_jobs(arguments.arch, only) + cuda_jobs(arguments.arch, only)
    if not jobs:
        parser.error(f"no kernel has {' or '.join(map(repr, only))} in its name")
    rows, faults = run(jobs)
    print_table(rows)
    if arguments.json:
        with write_atomically(arguments.json) as temporary:
            temporary.write_text(json.dumps([row._asdict() for row in rows], indent=1) + "\n")
    if arguments.table:
        with write_atomically(arguments.table) as temporary:
            temporary.write_text(static_table.as_csv(static_rows(rows)))
    for fault in faults:
        print(f"fault: {fault}", file=sys.stderr)
    return 1 if faults else 0


def architectures(text: str) -> list[int]:
    """Numbers between commas, each of an architecture that kernels are built for."""
    found = [int(number) for number in text.split(",")]
    if unknown := set(found) - set(LIMITS):
        raise argparse.ArgumentTypeError(f"{unknown.pop()} is none of {', '.join(map(str, LIMITS))}")
    return found


Job = Callable[[], Compiled]
_jobs: list[Job] = []  # the workers find them here: they are forked, since kernels cannot be sent


def run(jobs: Sequence[Job]) -> Compiled:
    """The rows and faults of ``jobs``, done in parallel, in the order of names."""
    _jobs[:] = jobs
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=get_context("fork")) as pool:
        futures = [pool.submit(_run, i) for i in range(len(jobs))]
        done = [future.result() for future in track(as_completed(futures), "compiling", len(jobs))]
    return Compiled(
        sorted((row for compiled in done for row in compiled.rows), key=lambda row: row[:3]),
        sorted(fault for compiled in done for fault in compiled.faults),
    )


def _run(i: int) -> Compiled:
    return _jobs[i]()


# Triton


def triton_jobs(archs: Iterable[int], only: Sequence[str]) -> list[Job]:
    """A job for each compilation of a Triton kernel that the table of runs needs, on each of ``archs`` but sm_75."""
    from fastperc.kernels import launches, runs

    jobs: list[Job] = []
    for arch in filter(SHARED_MEMORY.__contains__, archs):
        recorded = runs.recorded(arch, runs.runs())
        configs = launches.names(recorded.values())
        for key, launch in recorded.items():
            text = f"{launch.kernel.__module__.rpartition('.')[2]} {launch.name} {configs[key]}"
            if any(name in text for name in only):
                jobs.append(partial(compile_launch, launch, configs[key], arch))
    return jobs


def compile_launch(launch: Launch, config: str, arch: int) -> Compiled:
    """Compiles one Triton kernel as a launch on a GPU would."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    name = f"{launch.name} ({config}) on sm_{arch}"
    try:
        source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
        kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options.__dict__)
    except Exception as error:  # Triton, LLVM and ptxas raise what they like
        return Compiled([], [f"{name}: does not compile: {_last_line(str(error)) or type(error).__name__}"])
    matrix = HALF_PRODUCT.search(kernel.asm["ttir"]) is not None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        (found,) = inspect(Path(file.name), arch, listing=matrix)
    row = found._replace(
        kernel=launch.name,
        config=config,
        shared_bytes=found.shared_bytes + kernel.metadata.shared,
    )
    warps = launch.options.num_warps
    row = row._replace(ctas=static_table.ctas(arch, row.registers, row.shared_bytes, warps))
    faults = faults_of(row, matrix)
    if (columns := getattr(kernel.metadata, "tmem_size", None) or 0) > TENSOR_MEMORY_COLUMNS:
        faults.append(f"{name}: {columns} columns of tensor memory, an SM has {TENSOR_MEMORY_COLUMNS}")
    return Compiled([row], faults)


# CUDA


def cuda_jobs(archs: Iterable[int], only: Sequence[str]) -> list[Job]:
    """A job for each CUDA source on each of ``archs``, where there are sources and nvcc; else says what is missing."""
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None or not CSRC.is_dir():
        print(f"CUDA kernels left out: {'no csrc/ beside this package' if nvcc else 'no nvcc found'}", file=sys.stderr)
        return []
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    jobs: list[Job] = []
    for arch in archs:
        if f"sm_{arch}" not in known:
            print(f"CUDA kernels left out on sm_{arch}: {nvcc} is too old for it", file=sys.stderr)
            continue
        files = [file for file in sorted(CSRC.glob("*.cu")) if any(name in file.stem for name in only)]
        jobs += [partial(compile_cuda, nvcc, file, arch) for file in files]
    return jobs


def compile_cuda(nvcc: str, file: Path, arch: int) -> Compiled:
    """Compiles one CUDA source, a row for each of its kernels, as CMakeLists.txt does."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernels.cubin")
        flags = ["-cubin", "-O3", "-DNDEBUG", "-std=c++17", f"-arch=sm_{arch}{'a' * (arch == 90)}"]
        done = subprocess.run([nvcc, *flags, file, "-o", cubin], capture_output=True, text=True)
        if done.returncode:
            said = next((line for line in done.stderr.splitlines() if "error" in line), _last_line(done.stderr))
            return Compiled([], [f"{file.name} on sm_{arch}: does not compile: {said}"])
        found = inspect(cubin, arch)
    filt = shutil.which("cu++filt") or shutil.which("c++filt")
    names = [row.kernel for row in found]
    if filt:
        names = subprocess.run([filt, *names], capture_output=True, text=True, check=True).stdout.splitlines()
    texts = map(plain_name, names)
    rows = [row._replace(kernel=text["kernel"], config=text["config"]) for row, text in zip(found, texts)]
    return Compiled(rows, [fault for row in rows for fault in faults_of(row, matrix=False)])


def plain_name(function: str) -> dict[str, str]:
    """The name of a demangled C++ function without its namespaces, and its template's arguments as config."""
    function = re.sub(r"fastperc::|\(anonymous namespace\)::|^void ", "", function)
    name, _, arguments = function.rpartition(">(")[0].partition("<")
    if not name:
        return dict(kernel=function.partition("(")[0], config="")
    return dict(kernel=name, config=re.sub(r"\((\w+)\)", r"\1 ", arguments))  # an enumerator is (Norm)1


# Machine code


def inspect(cubin: Path, arch: int, listing: bool = True) -> list[Row]:
    """What cuobjdump says of a file of machine code: a row for each kernel, with its static shared memory only.

    Without ``listing`` the instructions are not looked at: to list them takes as long as many a compilation.
    """
    usage = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", _dump("-res-usage", cubin))
    parts = re.split(r"Function : (\S+)", _dump("-sass", cubin)) if listing else []
    code = dict(zip(parts[1::2], parts[2::2]))
    rows = []
    for function, registers, stack, shared, local in usage:
        words = Counter(word for word in INSTRUCTION.findall(code.get(function, "")) if REPORTED.fullmatch(word))
        reserved = RESERVED if arch >= 90 else 0
        shared_bytes = max(int(shared) - reserved, 0)
        spill_bytes = int(stack) + int(local)
        row = Row(function, "", arch, int(registers), spill_bytes, shared_bytes, dict(sorted(words.items())))
        rows.append(row._replace(loop=static_table.loop_length(code.get(function, ""))))
    return rows


def _dump(option: str, cubin: Path) -> str:
    import triton

    command = [triton.knobs.nvidia.cuobjdump.path, option, str(cubin)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def faults_of(row: Row, matrix: bool) -> list[str]:
    """One line for each thing wrong with a compiled kernel, whose products belong on the tensor cores if ``matrix``."""
    faults = []
    if row.spill_bytes:
        faults.append(f"{row.name}: spills, {row.spill_bytes} bytes of local memory a thread")
    if row.shared_bytes > (limit := LIMITS[row.arch]):
        faults.append(f"{row.name}: {row.shared_bytes} bytes of shared memory, a block may have {limit}")
    instruction = MATRIX_INSTRUCTION.get(row.arch, "HMMA")
    if matrix and not any(re.fullmatch(instruction, name) for name in row.instructions):
        faults.append(f"{row.name}: a matrix kernel without {instruction}")
    return faults


def static_rows(rows: Iterable[Row]) -> list[static_table.StaticRow]:
    """What the static table has of ``rows``."""
    return [
        static_table.StaticRow(row.kernel, row.config, row.arch, row.registers, row.ctas, row.loop)
        for row in rows
        if row.loop
    ]


def _last_line(text: str) -> str:
    return ([line.strip() for line in text.splitlines() if line.strip()] or [""])[-1]


def print_table(rows: Iterable[Row]) -> None:
    """Prints ``rows``, at full width where nobody's terminal says how wide it is."""
    from rich.console import Console
    from rich.table import Table

    table = Table("kernel", "config", "sm", "registers", "spills", "shared", "tensor cores and copies", box=None)
    for column in table.columns[2:6]:
        column.justify = "right"
    for row in rows:
        instructions = ", ".join(f"{name} {count}" for name, count in row.instructions.items())
        numbers = (row.arch, row.registers, row.spill_bytes, row.shared_bytes)
        table.add_row(row.kernel, row.config, *map(str, numbers), instructions)
    Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False).print(table)


if __name__ == "__main__":
    sys.exit(main())
