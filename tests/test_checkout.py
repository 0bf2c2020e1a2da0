"""Installing: an unbuilt checkout is never used silently, and what the package needs to build and to run."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = {
    "import": ["-c", "import fastperc; print(fastperc.__file__)"],
    "submodule": ["-c", "from fastperc.presets import PRESETS; import fastperc; print(fastperc.__file__)"],
    "attribute": ["-c", "from fastperc import InputError; import fastperc; print(fastperc.__file__)"],
    "module": ["-m", "fastperc"],
    "kernels": ["-m", "fastperc.kernels.aot"],
}


def package(folder: Path, checkout: bool) -> Path:
    """A package with the real entry, and stubs for what the commands run, in ``folder``."""
    (folder / "fastperc" / "kernels").mkdir(parents=True)
    for name in ("__init__", "_checkout", "_version", "presets", "errors"):
        shutil.copy(ROOT / "fastperc" / f"{name}.py", folder / "fastperc")
    for name in ("__main__", "kernels/__init__", "kernels/aot"):
        (folder / "fastperc" / f"{name}.py").write_text("import fastperc; print(fastperc.__file__)\n")
    if checkout:
        (folder / "CMakeLists.txt").touch()
    return folder


def run(command: str, folder: Path, *paths: Path) -> subprocess.CompletedProcess[str]:
    """Runs Python in ``folder`` without this environment's packages, with ``paths`` after that folder."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    arguments = [sys.executable, "-S", *COMMANDS[command]]
    return subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unbuilt_checkout_says_what_to_do(tmp_path, command):
    clone = package(tmp_path / "clone", checkout=True)
    (clone / "fastperc" / "_C.cpython-27-x86_64-linux-gnu.so").touch()  # built for another Python
    done = run(command, clone)
    assert done.returncode == 1
    message = f"ImportError: {clone} is a checkout of fastperc that is not built: run `pip install -e .` there"
    assert done.stderr.splitlines()[-1] == message


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "without-compiler"])
@pytest.mark.parametrize("command", COMMANDS)
def test_the_installed_package_is_found_from_the_clones_root(tmp_path, command, compiled):
    clone, site = package(tmp_path / "clone", checkout=True), package(tmp_path / "site", checkout=False)
    if compiled:
        (site / "fastperc" / f"_C{EXTENSION_SUFFIXES[0]}").touch()
    done = run(command, clone, tmp_path / "missing", clone, site)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == {str(site / "fastperc" / "__init__.py")}


def test_another_unbuilt_checkout_is_no_installed_package(tmp_path):
    clone, other = package(tmp_path / "clone", checkout=True), package(tmp_path / "other", checkout=True)
    assert "not built" in run("import", clone, other).stderr


def test_a_built_checkout_is_used(tmp_path):
    clone, site = package(tmp_path / "clone", checkout=True), package(tmp_path / "site", checkout=False)
    (clone / "fastperc" / f"_C{EXTENSION_SUFFIXES[0]}").touch()
    assert run("import", clone, site).stdout.split() == [str(clone / "fastperc" / "__init__.py")]


def test_a_checkout_installed_in_place_without_a_compiler_is_used(tmp_path):
    clone = package(tmp_path / "clone", checkout=True)
    metadata = tmp_path / "site" / "fastperc-0.1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: fastperc\nVersion: 0.1.0\n")
    (metadata / "direct_url.json").write_text(json.dumps({"url": clone.as_uri(), "dir_info": {"editable": True}}))
    assert run("import", clone, tmp_path / "site").stdout.split() == [str(clone / "fastperc" / "__init__.py")]


def test_without_the_compiled_module_a_warning_says_what_is_slower():
    code = "import sys; sys.modules['fastperc._C'] = None; from fastperc import _native; print(_native.build_info())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert re.search(r"no compiled kernels: .* slower on a CPU; install a C\+\+ compiler", done.stderr)
    assert len(done.stderr.splitlines()) <= 2 and "missing" in done.stdout


def cmake_builds() -> bool:
    """Whether ninja and a CMake that is new enough are installed; pip brings its own only while it builds."""
    if not shutil.which("cmake") or not shutil.which("ninja"):
        return False
    version = re.search(r"(\d+)\.(\d+)", subprocess.run(["cmake", "--version"], capture_output=True, text=True).stdout)
    return version is not None and (int(version[1]), int(version[2])) >= (3, 26)


@pytest.mark.skipif(not cmake_builds(), reason="needs CMake 3.26 and ninja")
def test_cmake_goes_on_without_a_compiler(tmp_path):
    environment = {**os.environ, "CXX": str(tmp_path / "no-such-compiler")}
    configure = ["cmake", "-S", ROOT, "-B", tmp_path, "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}"]
    done = subprocess.run(configure, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "installed without compiled kernels" in " ".join(done.stderr.split())
    subprocess.run(["cmake", "--build", tmp_path], check=True, capture_output=True)


def test_triton_is_left_to_torch():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    assert not any("triton" in dependency for dependency in project["dependencies"])
    assert any(dependency.startswith("triton") for dependency in extras["test"]) and "fastperc[test" in extras["dev"][0]


def test_everything_but_the_kernels_works_without_triton():
    code = """
import sys
sys.modules["triton"] = None
import torch
from fastperc import PerceptualLoss, TransformNet, freeze
from fastperc.cli import main
net = TransformNet("paper", width=4)
net(torch.rand(1, 3, 32, 32)).sum().backward()
freeze(net.eval())(torch.rand(1, 3, 32, 32))
sys.exit(main(["doctor"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Triton is not installed" in done.stdout
