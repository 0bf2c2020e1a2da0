"""README and docs: every Python block runs, every ``fastperc`` command parses, every link leads somewhere."""

from __future__ import annotations

import re
import shlex
import socket
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from PIL import Image

import fastperc
from fastperc.cli import build_parser
from fastperc.models.vgg_weights import convolutions, indices, names

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "examples" / "README.md"]
DOCUMENTS = [ROOT / "README.md", *PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
ABBREVIATED = re.compile(r"…|\.\.\.|COMMAND")


class Block(NamedTuple):
    """A fenced block of a document."""

    document: Path
    line: int  # of its first line of code
    code: str

    @property
    def id(self) -> str:
        return f"{self.document.name}:{self.line}"


def blocks(language: str) -> list[Block]:
    """The blocks of ``language`` in all documents."""
    found = []
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        for match in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            found.append(Block(document, text[: match.start(1)].count("\n") + 1, match[1]))
    return found


def fastperc_commands(line: str) -> list[list[str]]:
    """The arguments of each ``fastperc`` command in a line of shell."""
    words = shlex.split(line, comments=True)
    commands: list[list[str]] = [[]]
    for word in words:
        if word in ("&&", "||", ";", "|"):
            commands.append([])
        else:
            commands[-1].append(word)
    arguments = []
    for command in commands:
        if command[:1] == ["fastperc"]:
            arguments.append(command[1:])
        elif "-m" in command and command[command.index("-m") + 1 :][:1] == ["fastperc"]:  # torchrun or python
            arguments.append(command[command.index("-m") + 2 :])
    return arguments


def check_command(arguments: list[str]) -> None:
    """Parses the arguments of ``fastperc`` without running it."""
    try:
        build_parser().parse_args(arguments)
    except SystemExit as exit:
        assert exit.code == 0, f"fastperc {shlex.join(arguments)}: not a command line of fastperc"


@pytest.fixture(scope="module")
def vgg_weights(tmp_path_factory):
    """Files of small random weights under torchvision's names: VGG-16 down to relu4_3, VGG-19 down to relu3_4."""
    paths = []
    for architecture, deepest in (("VGG-16", "4_3"), ("VGG-19", "3_4")):
        tensors, index = {}, dict(zip(names(architecture), indices(architecture, batch_norm=False)))
        for name, c_in, c_out in convolutions(architecture):
            if name <= deepest:
                tensors[f"features.{index[name]}.weight"] = torch.randn(c_out, c_in, 3, 3) * (2 / (9 * c_in)) ** 0.5
                tensors[f"features.{index[name]}.bias"] = torch.zeros(c_out)
        paths.append(tmp_path_factory.mktemp("vgg") / f"{architecture.lower().replace('-', '')}.pth")
        torch.save(tensors, paths[-1])
    return paths


@pytest.fixture
def reader_folder(tmp_path, monkeypatch, vgg_weights):
    """A reader's working folder, with a photo and VGG weights; downloads fail."""

    def refuse(*arguments, **options):
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.chdir(tmp_path)
    Image.linear_gradient("L").resize((64, 48)).convert("RGB").save("photo.jpg")
    for path in vgg_weights:
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


@pytest.mark.parametrize("block", [pytest.param(block, id=block.id) for block in blocks("python")])
def test_python_block_runs(block, reader_folder):
    source = "\n" * (block.line - 1) + block.code  # line numbers in a traceback are the document's
    exec(compile(source, str(block.document), "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("block", [pytest.param(block, id=block.id) for block in blocks("bash")])
def test_commands_parse(block):
    for line in block.code.replace("\\\n", " ").splitlines():
        for arguments in fastperc_commands(line):
            check_command(arguments)


@pytest.mark.parametrize("document", DOCUMENTS[:-1], ids=lambda path: path.name)  # the changelog names options alone
def test_commands_in_text_parse(document):
    """Inline code with a command and its options."""
    text = re.sub(r"^```.*?^```$", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for code in re.findall(r"`(fastperc [^`]*--?[^`]*)`", text):
        if not ABBREVIATED.search(code):
            check_command(shlex.split(code)[1:])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        name, _, heading = target.partition("#")
        path = document if not name else (document.parent / name)
        figure_to_draw = path.suffix == ".svg"  # `benchmarks/report.py` draws it where something was measured
        assert path.exists() or figure_to_draw, f"{document.name}: {target}"
        if heading:
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in headings}
            assert heading in anchors, f"{document.name}: {target}"


def test_files_that_contributing_names_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    text = re.sub(r"^## Floors$.*?(?=^## )", "", text, flags=re.MULTILINE | re.DOTALL)  # it has a test of its own
    paths = re.findall(r"`((?:\.ci|benchmarks|csrc|docs|fastperc|kernels|tests)/[\w/.]*)`", text)
    assert len(paths) >= 15
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_every_name_of_the_table_of_modules_is_public():
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Modules")[2].partition("\n## ")[0]
    first_cells = re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)
    names = [name for cell in first_cells for name in re.findall(r"`(\w+)", cell)]
    assert len(names) >= 10 and set(names) <= set(fastperc.__all__)


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) < 1200


def test_readme_has_the_first_two_commands():
    lines = [line for block in blocks("bash") if block.document.name == "README.md" for line in block.code.splitlines()]
    assert lines[:2] == [
        "pip install . && fastperc stylize examples/chelsea.jpg -o stylized.jpg",
        'pip install -e ".[test]" && pytest -n auto',
    ]


class TestThisTest:
    """The helpers above find what they look for."""

    def test_commands_of_a_line(self):
        assert fastperc_commands("pip install . && fastperc doctor  # first") == [["doctor"]]
        assert fastperc_commands("torchrun -n=2 -m fastperc train --out x") == [["train", "--out", "x"]]
        assert fastperc_commands("python benchmarks/report.py") == []

    def test_a_wrong_command_is_found(self, capsys):
        with pytest.raises(AssertionError, match="not a command line"):
            check_command(["stylize", "photo.jpg", "--no-such-option"])

    def test_every_language_is_found(self):
        assert len(blocks("python")) >= 4 and len(blocks("bash")) >= 8
