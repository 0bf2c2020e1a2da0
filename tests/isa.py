"""Hides instruction sets, so that the code for older processors runs on a newer one.

    FASTPERC_TEST_ISA=avx2 pytest              every test as on a processor with AVX2 and no AVX-512
    FASTPERC_TEST_ISA=baseline pytest          without AVX2 too
    python tests/isa.py avx2 fastperc tune     one command

PyTorch and oneDNN read variables of the environment. fastperc's C++ kernels choose when the module is loaded, so the
sources are compiled once more without the newer versions. The module that is installed stays as it is. Linux with GCC
on x86-64 only.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
VARIABLE = "FASTPERC_TEST_ISA"


class Level(NamedTuple):
    """What is left of a processor's instruction sets."""

    hidden: tuple[str, ...]  # the architectures in csrc that are not compiled
    lanes: int  # floats in a vector register
    pytorch: str  # ATEN_CPU_CAPABILITY
    onednn: str  # ONEDNN_MAX_CPU_ISA
    mkl: str  # MKL_ENABLE_INSTRUCTIONS


LEVELS = {
    "avx2": Level(("x86-64-v4",), 8, "avx2", "AVX2", "AVX2"),
    "baseline": Level(("x86-64-v4", "x86-64-v3"), 4, "default", "SSE41", "SSE4_2"),
}

# Runs in every Python process of the tests: in this one, and in those that find it on PYTHONPATH.
SITECUSTOMIZE = """\
import importlib.util
import sys
from pathlib import Path


class Finder:
    def find_spec(name, path=None, target=None):
        if name == "fastperc._C":
            return importlib.util.spec_from_file_location(name, Path({file!r}))


sys.meta_path.insert(0, Finder)
"""


def hide(level: Level, source: str) -> str:
    """The C++ ``source`` without the versions for the hidden architectures.

    Raises:
        ValueError: the source chooses an instruction set in a way that is not known here.
    """
    for architecture in level.hidden:
        source = source.replace(f'"arch={architecture}", ', "")
        version = rf'^ *VERSION\(__attribute__\(\(target\("arch={architecture}"\)\)\).*\n'
        source = re.sub(version, "", source, flags=re.MULTILINE)
    source = source.replace('__attribute__((target_clones("default")))', "")  # of which GCC warns
    if unknown := re.search("|".join((*level.hidden, "cpu_supports", "__AVX")), source):
        raise ValueError(f"{unknown[0]}: tests/isa.py does not know how to hide this instruction set")
    return source


def why_not() -> str | None:
    """Why the switch cannot be used here, or ``None``."""
    if sys.platform != "linux" or platform.machine() != "x86_64" or shutil.which("g++") is None:
        return "instruction sets can be hidden on Linux on x86-64 with GCC only"
    return None


def environment(name: str) -> dict[str, str]:
    """The variables under which a process sees the level ``name`` of ``LEVELS``; compiles the kernels if need be."""
    reason = why_not() if name in LEVELS else f"use {' or '.join(LEVELS)}"
    if reason:
        sys.exit(f"{VARIABLE}={name}: {reason}")
    level, path = LEVELS[name], [str(compiled(name)), os.environ.get("PYTHONPATH", "")]
    return {
        VARIABLE: name,
        "ATEN_CPU_CAPABILITY": level.pytorch,
        "ONEDNN_MAX_CPU_ISA": level.onednn,
        "MKL_ENABLE_INSTRUCTIONS": level.mkl,
        "PYTHONPATH": os.pathsep.join(folder for folder in dict.fromkeys(path) if folder),
    }


def compiled(name: str) -> Path:
    """The folder of the kernels compiled for the level ``name``: the module, and what imports it instead of another."""
    sources = {path.name: path.read_text("utf-8") for path in sorted((ROOT / "csrc").glob("*.[ch]*"))}
    key = hashlib.sha256(repr((sources, Path(__file__).read_text("utf-8"), sys.version)).encode()).hexdigest()[:12]
    folder = ROOT / "build" / "isa" / f"{name}-{key}"
    module = folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not (folder / "sitecustomize.py").exists():
        folder.mkdir(parents=True, exist_ok=True)
        for file, source in sources.items():
            (folder / file).write_text(hide(LEVELS[name], source), "utf-8")
        compile_module(sorted(folder.glob("*.cpp")), module)
        (folder / "sitecustomize.py").write_text(SITECUSTOMIZE.format(file=str(module)), "utf-8")
    return folder


def compile_module(sources: list[Path], module: Path) -> None:
    """Compiles the C++ ``sources`` into ``module``, as CMakeLists.txt does but without CUDA."""
    package = importlib.util.find_spec("torch")
    assert package is not None and package.submodule_search_locations
    pybind11 = Path(package.submodule_search_locations[0]) / "include"
    flags = f"-std=gnu++17 -O3 -DNDEBUG -fPIC -fopenmp -fvisibility=hidden -I{sysconfig.get_path('include')}"
    command = ["g++", *shlex.split(flags), "-isystem", pybind11, f'-DFASTPERC_COMPILER="{module.parent.name}"']

    def compile_source(source: Path) -> None:
        subprocess.run([*command, "-c", source, "-o", source.with_suffix(".o")], check=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_source, sources))
    objects = [source.with_suffix(".o") for source in sources]
    subprocess.run(["g++", "-shared", "-fopenmp", *objects, "-o", module], check=True)


def apply(name: str) -> None:
    """Gives this process and those that it starts the level ``name``; to be called before torch is imported."""
    os.environ.update(environment(name))
    exec((compiled(name) / "sitecustomize.py").read_text("utf-8"), {})


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(f"usage: python tests/isa.py {'|'.join(LEVELS)} COMMAND ...")
    os.environ.update(environment(sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])
