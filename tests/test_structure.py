"""The structure of the source: imports run down only and in no circle, and files and functions stay short.

The floors stand in CONTRIBUTING.md, under "Floors": one line a floor, the top one first. A module may import from its
own line and from the lines below. Imports inside functions and under ``TYPE_CHECKING`` count like all others.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("fastperc", "kernels", "csrc", "benchmarks", "tests", "examples")
SUFFIXES = {".py", ".cpp", ".cu", ".h", ".cuh"}
FILE_LINES, FUNCTION_LINES, PARAMETERS = 400, 60, 8
KERNEL = "jit"  # the decorator of Triton's kernels, which take every pointer and stride as a parameter of its own


class Import(NamedTuple):
    """A module that a file imports."""

    target: str
    path: Path
    line: int

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line} imports {self.target}"


def files(*folders: str) -> list[Path]:
    """The source files in ``folders``; those that a link leads to are listed where they lie."""
    found = (path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES)
    return sorted(path for path in found if path.resolve() == path)


def python_files(*folders: str) -> list[Path]:
    return [path for path in files(*folders) if path.suffix == ".py"]


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def name_of(path: Path) -> str:
    """The name under which the file at ``path`` is imported: ``kernels/`` is installed as ``fastperc.kernels``."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] == "kernels":
        parts.insert(0, "fastperc")
    elif parts[0] != "fastperc":  # scripts, which import each other by their file's name
        parts = parts[1:]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def package() -> dict[str, Path]:
    """The modules of the package by name."""
    return {name_of(path): path for path in python_files("fastperc", "kernels")}


def homes() -> dict[str, str]:
    """The module that ``fastperc/__init__.py`` takes each public name from."""
    nodes = [node for node in ast.walk(parsed(ROOT / "fastperc/__init__.py")) if isinstance(node, ast.ImportFrom)]
    return {alias.name: f"{node.module}" for node in nodes for alias in node.names}


def named_in(node: ast.AST, name: str) -> list[str]:
    """The dotted names that the import statement ``node`` in the module called ``name`` names."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        parents = name.split(".")[: -node.level] if node.level else []
        module = ".".join([*parents, *([node.module] if node.module else [])])
        return [f"{module}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module":
        return [first.value for first in node.args[:1] if isinstance(first, ast.Constant)]
    return []


def imports_of(path: Path, modules: dict[str, Path]) -> Iterator[Import]:
    """What the file at ``path`` imports of ``modules``; ``import fastperc`` alone does not count, it is lazy."""
    for node in ast.walk(parsed(path)):
        for dotted in named_in(node, name_of(path)):
            root, _, public = dotted.partition(".")
            if root == "fastperc" and dotted not in modules and public in homes():
                dotted = homes()[public]
            target = dotted if dotted in modules else dotted.rpartition(".")[0]
            if target in modules and target != "fastperc":
                yield Import(target, path, node.lineno)


@cache
def floors() -> dict[str, int]:
    """The line of CONTRIBUTING.md that each module or folder of the package stands on, 0 at the top."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    block = re.search(r"^## Floors\n.*?^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert block, 'CONTRIBUTING.md has no block of floors under "## Floors"'
    lines = block[1].splitlines()
    return {name: number for number, line in enumerate(lines) for name in line.split()}


def floor_of(module: str) -> str:
    """What stands for ``module`` on a floor: its own name below ``fastperc``, or that of its folder or file there."""
    name = module.partition(".")[2]
    return name if name in floors() else name.partition(".")[0]


def modules_on_floors() -> list[str]:
    return [module for module in package() if module not in ("fastperc", "fastperc.__main__")]


def circles(modules: dict[str, Path]) -> list[str]:
    """Every circle of imports among ``modules``, as text; each is opened after it was found, to find the next."""
    imports = {name: {i.target: i for i in imports_of(path, modules)} for name, path in modules.items()}
    imports.pop("fastperc", None)
    messages = []
    while True:
        try:
            TopologicalSorter({name: targets.keys() - {name} for name, targets in imports.items()}).prepare()
            return messages
        except CycleError as error:
            circle = error.args[1][::-1]
            messages.append(", ".join(str(imports[a][b]) for a, b in pairwise(circle)))
            del imports[circle[0]][circle[1]]


def report(faults: list[str]) -> str:
    """A message of one line a fault."""
    return "\n".join(["", *dict.fromkeys(faults)])


def test_every_module_stands_on_a_floor():
    known = floors()
    missing = sorted({floor_of(module) for module in modules_on_floors()} - known.keys())
    assert not missing, f"on no floor of CONTRIBUTING.md: {', '.join(missing)}"
    gone = sorted(known.keys() - {floor_of(module) for module in modules_on_floors()})
    assert not gone, f"on a floor of CONTRIBUTING.md, but not in fastperc/: {', '.join(gone)}"


def test_imports_run_down_only():
    known = floors()
    upward = [
        str(found)
        for module in modules_on_floors()
        for found in imports_of(package()[module], package())
        if known.get(floor_of(found.target), 99) < known.get(floor_of(module), 99)
    ]
    assert not upward, report(upward)


@pytest.mark.parametrize("folder", ["fastperc", "benchmarks"])
def test_no_circles(folder):
    """``fastperc`` includes ``kernels/``."""
    modules = package() if folder == "fastperc" else {name_of(path): path for path in python_files(folder)}
    faults = circles(modules)
    assert not faults, report(faults)


def test_no_file_is_long():
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files(*FOLDERS)}
    faults = [f"{path.relative_to(ROOT)}: {lines} lines" for path, lines in lengths.items() if lines > FILE_LINES]
    assert not faults, report(faults)


def functions() -> Iterator[tuple[str, str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every function: the folder that it is in, where it stands, and its syntax tree."""
    for path in python_files(*FOLDERS):
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                relative = path.relative_to(ROOT)
                yield relative.parts[0], f"{relative}:{node.lineno} {node.name}", node


def test_no_function_is_long():
    faults = [
        f"{place}: {lines} lines"
        for folder, place, node in functions()
        if folder != "kernels" and (lines := node.end_lineno - node.lineno + 1) > FUNCTION_LINES
    ]
    assert not faults, report(faults)


def decorators(node: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    """The last part of each decorator's name: ``jit`` of ``@triton.jit(…)``."""
    calls = [d.func if isinstance(d, ast.Call) else d for d in node.decorator_list]
    return {ast.unparse(call).rpartition(".")[2] for call in calls}


def parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    arguments = node.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    starred = [argument for argument in (arguments.vararg, arguments.kwarg) if argument]
    return [argument.arg for argument in named + starred if argument.arg not in ("self", "cls")]


def test_no_function_takes_many_parameters():
    faults = [
        f"{place}: {len(parameters(node))} parameters"
        for _, place, node in functions()
        if len(parameters(node)) > PARAMETERS and KERNEL not in decorators(node)
    ]
    assert not faults, report(faults)


def test_no_test_module_imports_another():
    modules = {name_of(path): path for path in python_files("tests")}
    faults = [
        str(found)
        for path in modules.values()
        for found in imports_of(path, modules)
        if found.target.startswith("test_") or found.target == "conftest"
    ]
    assert not faults, report(faults)


@pytest.mark.parametrize("module", ["fastperc", "fastperc.cli"])
def test_imports_no_framework(module):
    code = f"import sys, {module}; print(*[name for name in ('torch', 'triton') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not done.stdout.split(), f"{module} imports {done.stdout}"


def test_every_folder_with_code_is_installed():
    """``packages`` in pyproject.toml, read without tomllib, which Python 3.10 lacks."""
    (packages,) = re.findall(r"^packages = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text("utf-8"), re.M | re.S)
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "fastperc").rglob("*.py")}
    folders |= {Path("fastperc") / path.parent.relative_to(ROOT) for path in (ROOT / "kernels").rglob("*.py")}
    assert set(re.findall(r'"(.*?)"', packages)) >= {".".join(folder.parts) for folder in folders}
