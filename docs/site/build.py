"""Builds the documentation site: ``python docs/site/build.py`` writes ``build/site/html``.

It needs ``pip install -e '.[docs]'``. The pages are those of ``docs`` and some of the files beside it. Their links are
written for GitHub: here those to files that are no pages of the site lead to GitHub. A warning is an error; so are, in
what was built, a link that leads nowhere and a file of another host, which a reader's browser would fetch.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parents[2]
PAGES, HTML = ROOT / "build" / "site" / "pages", ROOT / "build" / "site" / "html"
GITHUB = "https://github.com/fastperc/fastperc"
OTHER_PAGES = {
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "examples/README.md": "examples.md",
}
HOME = ROOT / "docs" / "index.md"  # in the place of README.md
IMAGES = (".gif", ".jpg", ".png", ".svg")
FENCE = re.compile(r"^(```.*?^```)$", re.MULTILINE | re.DOTALL)
ENTRY = re.compile(r"^(#+) `(fastperc\.[\w.]+)`\n(?:\n(?:Functions|Methods): (.*)\n)?", re.MULTILINE)
LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")


def collect() -> None:
    """Writes the pages, and the images in them, into ``PAGES``."""
    shutil.rmtree(PAGES.parent, ignore_errors=True)
    pages = {path: path.relative_to(ROOT / "docs") for path in sorted((ROOT / "docs").rglob("*.md"))}
    pages |= {ROOT / name: Path(page) for name, page in OTHER_PAGES.items()}
    shutil.copytree(ROOT / "docs", PAGES, ignore=shutil.ignore_patterns("*.md", "*.py", "*.txt", "__pycache__"))
    for source, page in pages.items():
        parts = FENCE.split(source.read_text(encoding="utf-8"))  # every other part is a block of code
        parts[::2] = [LINK.sub(partial(site_link, source=source, pages=pages), text) for text in parts[::2]]
        text = "".join(parts)
        if page.parent.name == "api":
            text = ENTRY.sub(directive, text)
        (PAGES / page).parent.mkdir(parents=True, exist_ok=True)
        (PAGES / page).write_text(text, encoding="utf-8")


def directive(entry: re.Match[str]) -> str:
    """What makes mkdocstrings write an entry of the API reference, a heading with a name and perhaps its members."""
    level, name, members = entry.groups()
    options = {"heading_level": len(level)}
    if members:
        options |= {"members": re.findall(r"\w+", members), "filters": [], "merge_init_into_class": False}
    lines = [f"      {option}: {json.dumps(value)}" for option, value in options.items()]
    return "\n".join([f"::: {name}", "    options:", *lines, ""])


def site_link(link: re.Match[str], source: Path, pages: dict[Path, Path]) -> str:
    """A link of the page ``source`` as the site needs it; copies an image that it shows.

    Raises:
        SystemExit: it leads nowhere.
    """
    before, target, after = link.groups()
    if urlsplit(target).scheme:
        return link[0]
    path = (source.parent / target).resolve()
    if not path.exists():
        sys.exit(f"{source.relative_to(ROOT)}: {target} does not exist")
    if path == ROOT / "README.md":
        path = HOME
    if path not in pages and path.suffix not in IMAGES:
        kind = "tree" if path.is_dir() else "blob"
        return f"{before}{GITHUB}/{kind}/main/{path.relative_to(ROOT).as_posix()}{after}"
    place = pages.get(path)
    if place is None:
        inside = path.is_relative_to(ROOT / "docs")
        place = path.relative_to(ROOT / "docs" if inside else ROOT)
        (PAGES / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, PAGES / place)
    return f"{before}{Path(os.path.relpath(place, pages[source].parent)).as_posix()}{after}"


def build() -> None:
    """Builds the site. Every line that the builder or the reader of docstrings prints as a warning is an error."""
    command = [
        sys.executable,
        "-m",
        "zensical",
        "build",
        "--clean",
        "--strict",
        "--config-file",
        str(ROOT / "mkdocs.yml"),
    ]
    result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(result.stdout, end="")
    if result.returncode or re.search(
        r"^(griffe|mkdocstrings|.*\bwarning)", result.stdout, re.IGNORECASE | re.MULTILINE
    ):
        sys.exit("the site has warnings")


class Page(HTMLParser):
    """What an HTML file names: its own anchors, links, and what a browser fetches to show it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = {""}
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Called with each tag."""
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if tag == "link" and values.get("rel") != "canonical":
            self.fetched.append(values["href"])
        if "src" in values:
            self.fetched.append(values["src"])


def check() -> None:
    """Checks the HTML.

    Raises:
        SystemExit: something leads nowhere, or is on another host.
    """
    pages = {path: Page(path) for path in sorted(HTML.rglob("*.html"))}
    mistakes = []
    for path, page in pages.items():
        name = path.relative_to(HTML)
        mistakes += [f"{name}: fetches {target}" for target in page.fetched if urlsplit(target).netloc]
        for target in {*page.links, *page.fetched}:
            address = urlsplit(target)
            if address.scheme or address.netloc or path.name == "404.html":
                continue
            file = (path.parent / unquote(address.path)).resolve() if address.path else path
            file = file / "index.html" if file.is_dir() else file
            if not file.exists() or (file in pages and unquote(address.fragment) not in pages[file].anchors):
                mistakes.append(f"{name}: {target} leads nowhere")
    for style in HTML.rglob("*.css"):
        others = re.findall(r"url\(['\"]?((?:https?:)?//[^)]*)\)", style.read_text(encoding="utf-8"))
        mistakes += [f"{style.relative_to(HTML)}: fetches {target}" for target in others]
    if mistakes:
        sys.exit("\n".join(mistakes))
    print(f"{len(pages)} pages in {HTML.relative_to(ROOT)}")


if __name__ == "__main__":
    collect()
    build()
    check()
