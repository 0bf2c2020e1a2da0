"""The documentation site's pages and the scripts that build it. ``.ci/run`` builds it, where a warning is an error."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from pathlib import Path

import pytest

import fastperc

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
ENTRY = re.compile(r"^#+ `(fastperc\.[\w.]+)`$", re.MULTILINE)


@pytest.fixture
def script(monkeypatch):
    """Imports a script of ``docs/site``."""
    monkeypatch.syspath_prepend(DOCS / "site")
    names = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - names:
        if Path(getattr(sys.modules[name], "__file__", None) or "").parent == DOCS / "site":
            del sys.modules[name]


def described_names():
    """What the API reference shows."""
    return [name for page in sorted((DOCS / "api").glob("*.md")) for name in ENTRY.findall(page.read_text("utf-8"))]


def lookup(name):
    """The object of a dotted name."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:count]))
        except ImportError:
            continue
        for part in parts[count:]:
            value = getattr(value, part)
        return value
    raise AssertionError(name)


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2].partition("\ntheme:")[0]
    named = re.findall(r"(\S+\.md)$", navigation, re.MULTILINE)
    pages = [path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")]
    assert sorted(named) == sorted([*pages, "CONTRIBUTING.md", "CHANGELOG.md", "examples.md"])


def test_every_public_name_is_described():
    names = described_names()
    assert [name for name in fastperc.__all__ if f"fastperc.{name}" not in names] == []
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", described_names())
def test_described_name_has_a_docstring(name):
    value = lookup(name)
    assert inspect.getdoc(value)
    assert inspect.ismodule(value) or getattr(value, "__doc__", None)


def test_drawing_is_what_the_script_draws(script):
    drawings = script("drawings")
    assert drawings.TARGET.read_text(encoding="utf-8") == drawings.drawing()


def test_links_of_a_page(script, tmp_path, monkeypatch):
    """Pages and images are linked within the site, all else on GitHub."""
    build = script("build")
    monkeypatch.setattr(build, "PAGES", tmp_path / "site" / "pages")
    build.collect()
    text = (build.PAGES / "super-resolution.md").read_text(encoding="utf-8")
    assert "](examples/chelsea-x4.png)" in text and (build.PAGES / "examples" / "chelsea-x4.png").exists()
    assert f"]({build.GITHUB}/tree/main/benchmarks/results)" in text
    assert "](command-line.md#train-a-style)" in text
    assert f"]({build.GITHUB}/blob/main/LICENSE)" not in text
    assert "](../losses.md)" in (build.PAGES / "api" / "losses.md").read_text(encoding="utf-8")
    assert "](losses.md)" in (build.PAGES / "CHANGELOG.md").read_text(encoding="utf-8")


def test_a_link_that_leads_nowhere_is_an_error(script, tmp_path):
    build = script("build")
    link = build.LINK.search("[text](no-such-page.md#part)")
    with pytest.raises(SystemExit, match=r"no-such-page\.md does not exist"):
        build.site_link(link, DOCS / "index.md", {})


@pytest.mark.parametrize(
    ("html", "mistake"),
    [
        ('<a href="other.html">', r"other\.html leads nowhere"),
        ('<a href="#no-such-part">', "#no-such-part leads nowhere"),
        ('<script src="https://example.org/x.js">', r"fetches https://example\.org/x\.js"),
        ('<link rel="stylesheet" href="//example.org/x.css">', r"fetches //example\.org/x\.css"),
    ],
)
def test_mistakes_in_what_was_built(script, tmp_path, monkeypatch, html, mistake):
    build = script("build")
    monkeypatch.setattr(build, "HTML", tmp_path)
    page = tmp_path / "index.html"
    page.write_text(html)
    with pytest.raises(SystemExit, match=mistake):
        build.check()
    page.write_text('<h1 id="part"></h1><a href="#part"><a href="https://example.org">')
    monkeypatch.setattr(build, "ROOT", tmp_path)
    build.check()
