"""The CUDA launchers as a Python module whose kernels run on the CPU (tests/cuda_on_cpu), in place of a GPU's."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch

from fastperc import _native
from fastperc._native import module, norms, passes

ROOT = Path(__file__).resolve().parents[1]
HERE, CSRC = ROOT / "tests" / "cuda_on_cpu", ROOT / "csrc"
SANITIZERS = ["-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
LIBRARY = "FASTPERC_TEST_CUDA_ON_CPU"  # in the environment: a module that is compiled already
ORDERS = (0, 1, 2)  # forwards, backwards, and a random one


def why_not() -> str | None:
    """Why the module cannot be built here, or ``None``."""
    if shutil.which("g++") is None or sys.platform != "linux":
        return "needs g++ on Linux"
    headers = (Path(sysconfig.get_path("include"), "Python.h"), Path(torch.__file__).parent / "include" / "pybind11")
    return None if all(path.exists() for path in headers) else "needs the headers of Python and pybind11"


def build(folder: Path, sanitized: bool = False) -> Path:
    """Compiles the module into ``folder``, unless it is there."""
    library = folder / "cuda_on_cpu.so"
    if library.exists():
        return library
    flags = ["-std=c++17", "-fPIC", "-I", CSRC]
    emulated = ["-O1", "-include", HERE / "cuda_on_cpu.h", *(SANITIZERS if sanitized else [])]
    headers = ["-I", sysconfig.get_path("include"), "-isystem", Path(torch.__file__).parent / "include"]
    kernels = [*sorted(CSRC.glob("*.cu")), HERE / "order.cpp"]
    bindings = [CSRC / "bindings_cuda.cpp", HERE / "module.cpp"]

    def compile_source(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        more = emulated if source in kernels else ['-DFASTPERC_CUDA="emulated"', *headers]
        _run(["g++", *flags, *more, "-x", "c++", "-c", source, "-o", target])
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_source, [*bindings, *kernels]))
    sanitizers = SANITIZERS if sanitized else []
    _run(["g++", "-shared", *sanitizers, *objects[len(bindings) :], "-o", folder / "libkernels.so"])
    rest = ["-L", folder, "-lkernels", "-Wl,-rpath,$ORIGIN", "-o", library]
    _run(["g++", "-shared", *objects[: len(bindings)], *rest])
    return library


def _run(command: list[Any]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def build_once(tmp_path_factory: Any) -> Path:
    """The module, compiled once for all tests and workers of a run of pytest."""
    import fcntl  # which Windows does not have

    if library := os.environ.get(LIBRARY):
        return Path(library)
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cuda_on_cpu_module"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return build(folder)


def why_not_sanitized() -> str | None:
    """Why no process can run under the sanitizers, or ``None``."""
    return None if all(map(os.path.isabs, _runtimes())) else "this g++ comes without AddressSanitizer or UBSan"


def _runtimes() -> list[str]:
    command = ["g++", "-print-file-name=libasan.so", "-print-file-name=libubsan.so"]
    return [subprocess.check_output([command[0], option], text=True).strip() for option in command[1:]]


def sanitizers(folder: Path) -> dict[str, str]:
    """The environment of a process that loads the sanitized module in ``folder``."""
    return {
        LIBRARY: str(folder / "cuda_on_cpu.so"),
        "LD_PRELOAD": " ".join(_runtimes()),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python keeps memory until its end
    }


def load(library: Path) -> ModuleType:
    """The module in ``library``."""
    spec = importlib.util.spec_from_file_location("cuda_on_cpu", library)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


class Emulation:
    """Stands for ``fastperc._C``. ``called`` has the names of the launchers that ran."""

    def __init__(self, launchers: ModuleType) -> None:
        self.launchers, self.called = launchers, set[str]()

    def __getattr__(self, name: str) -> Any:
        if hasattr(self.launchers, name):
            self.called.add(name)
            return getattr(self.launchers, name)
        return getattr(module._C, name)

    @contextmanager
    def on_gpu(self, order: int = 0) -> Iterator[None]:
        """In the block, tensors of the CPU are a GPU's to the native backend; threads run in the given order."""
        self.launchers.run_in_order(order)
        yes, no_stream = (lambda x: True), (lambda x: mock.MagicMock(__enter__=lambda _: 0))
        with mock.patch.object(_native, "on_gpu", yes):
            patches = [mock.patch.multiple(file, _C=self, on_gpu=yes, stream_of=no_stream) for file in (norms, passes)]
            with patches[0], patches[1]:
                yield
