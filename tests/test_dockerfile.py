"""The Dockerfile: what it copies, installs and runs exists, and the documented commands use its arguments."""

from __future__ import annotations

import json
import re
import shlex
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

from fastperc.cli import build_parser

ROOT = Path(__file__).resolve().parent.parent
INSTALL = (ROOT / "docs" / "install.md").read_text(encoding="utf-8").replace("\\\n", " ")  # continued lines joined


def instructions():
    """Pairs of an instruction and what follows it, with continued lines joined."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    return [tuple(line.split(maxsplit=1)) for line in lines if line.strip()]


def values(name):
    return [value for instruction, value in instructions() if instruction == name]


def ignored(path):
    """Whether ``.dockerignore`` keeps a path from the builder: the last pattern that matches decides."""
    result = False
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        pattern = line.removeprefix("!")
        if line and not line.startswith("#"):
            parts = [path, path.partition("/")[0]] if "**" not in pattern else [path, path.rpartition("/")[2]]
            if any(fnmatch(part, pattern.removeprefix("**/")) for part in parts):
                result = not line.startswith("!")
    return result


def project():
    tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_instructions_are_docker_s():
    known = {"ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "FROM", "RUN", "SHELL", "USER", "WORKDIR"}
    assert {name for name, _ in instructions()} <= known
    assert instructions()[0][0] == "ARG"


def test_every_path_it_copies_exists():
    sources = [source for value in values("COPY") if "--from" not in value for source in value.split()[:-1]]
    assert {"pyproject.toml", "fastperc", "kernels", "csrc", "CMakeLists.txt"} <= set(sources)
    assert [source for source in sources if not (ROOT / source).exists() or ignored(source)] == []


def test_it_copies_what_the_wheel_is_made_of():
    sources = {source for value in values("COPY") for source in value.split()[:-1]}
    settings = project()
    assert {name.partition(".")[0] for name in settings["tool"]["setuptools"]["packages"]} <= sources
    named = {settings["project"]["readme"], *settings["project"]["license-files"]}
    assert named | set(settings["tool"]["setuptools"]["package-dir"].values()) <= sources


def test_only_these_files_reach_the_builder():
    assert ignored("examples/chelsea.jpg") and ignored(".git/config") and ignored("tests/conftest.py")
    assert ignored("fastperc/_C.cpython-312-x86_64-linux-gnu.so") and ignored("fastperc/ops/__pycache__")
    assert not ignored("fastperc/ops/tv_loss.py") and not ignored("csrc/tv_loss.cpp")


def test_it_runs_the_command_as_an_ordinary_user():
    (entry,) = json.loads(*values("ENTRYPOINT"))
    assert entry in project()["project"]["scripts"]
    assert values("USER") == ["1001"] and any("--uid 1001" in value for value in values("RUN"))
    build_parser()
    assert json.loads(*values("CMD")) == ["--help"]


def test_stages():
    stages = values("FROM")
    assert stages == ["${BUILD_BASE} AS build", "${BASE}"]  # the second holds neither compiler nor wheel
    assert [value for value in values("COPY") if "--from" in value] == ["--from=build /opt/fastperc /opt/fastperc"]


def test_extras_exist():
    (extras,) = {value for value in values("ARG") if value.startswith("EXTRAS=")}
    assert set(extras.partition("=")[2].split(",")) <= set(project()["project"]["optional-dependencies"])


def test_documented_commands():
    arguments = {value.partition("=")[0] for value in values("ARG")}
    commands = [shlex.split(line) for line in re.findall(r"^docker .*$", INSTALL, re.MULTILINE)]
    assert [command[1] for command in commands] == ["build", "run"] * 2
    named = set(re.findall(r"--build-arg (\w+)=", INSTALL))
    assert named and named <= arguments
    for command in commands:
        if command[1] == "run":
            image = next(index for index, word in enumerate(command) if word.startswith("fastperc"))
            build_parser().parse_args(command[image + 1 :])
