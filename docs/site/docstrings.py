"""An extension of griffe, which reads the docstrings of the API reference.

Sphinx's roles become links: ``:class:`~fastperc.engine.Engine``` links to ``Engine`` where a page of the API reference
has it, and is code where none has. Arguments that share a description, ``x, target: …``, get it each. The fields of a
tuple or a dataclass are listed, with the comments beside them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe

PAGES = Path(__file__).resolve().parents[2] / "build" / "site" / "pages" / "api"  # as build.py writes them
ARGUMENTS = re.compile(r"^( {4,})(\w+(?:, \w+)+)(: .*\n(?:\1 +.*\n|\n(?=\1 ))*)", re.MULTILINE)
ROLE = re.compile(r":(?:attr|class|exc|func|meth|mod):`(~?)([\w.]+)`")


class Docstrings(griffe.Extension):
    """Rewrites a package's docstrings once all of the package is read."""

    def on_package(self, *, pkg: griffe.Module, loader: griffe.GriffeLoader, **options: Any) -> None:
        """Called by griffe with the package."""
        pages = documented(pkg)
        for scope in scopes(pkg):
            if scope.docstring is not None:
                scope.docstring.value = rewritten(scope, scope.docstring.value, pages)


def rewritten(scope: griffe.Object, text: str, pages: dict[str, str]) -> str:
    """The docstring ``text`` of ``scope`` as the reference shows it."""
    if isinstance(scope, griffe.Class) and scope.canonical_path in pages:
        text += fields(scope)
    if isinstance(scope, griffe.Function) and scope.returns is not None:  # else a type ends at the first colon
        text = text.replace("\nReturns:\n    ", f"\nReturns:\n    {scope.returns}: ")
    text = ROLE.sub(lambda role: link(role, scope, pages), text)
    before, arguments, after = text.partition("\nArgs:\n")
    return before + arguments + ARGUMENTS.sub(one_by_one, after + "\n")


def documented(package: griffe.Module) -> dict[str, str]:
    """The names that the pages of the API reference show, by where each is defined."""
    names: dict[str, str] = {}
    for page in sorted(PAGES.glob("*.md")):
        for name, options in re.findall(r"^::: (\S+)\n((?: .*\n)*)", page.read_text(encoding="utf-8"), re.MULTILINE):
            path = package.modules_collection[name].canonical_path
            members = re.findall(r"\w+", options.partition(" members: ")[2].partition("\n")[0])
            names |= {path: name, **{f"{path}.{member}": f"{name}.{member}" for member in members}}
    return names


def scopes(scope: griffe.Object) -> Any:
    """``scope``, and all that is defined in it."""
    yield scope
    for member in scope.members.values():
        if not member.is_alias:
            yield from scopes(member)


def fields(scope: griffe.Class) -> str:
    """A section of a docstring with the fields of a named tuple or a dataclass; empty for other classes."""
    if "dataclass" not in scope.labels and not any(str(base) == "NamedTuple" for base in scope.bases):
        return ""
    lines = scope.filepath.read_text(encoding="utf-8").splitlines()  # type: ignore[union-attr]
    described = []
    for name, field in scope.members.items():
        if field.is_attribute and field.annotation is not None and not name.startswith("_"):
            comment = lines[field.endlineno - 1].partition("  # ")[2]
            default = f"Default: `{field.value}`." if field.value is not None else ""
            text = " ".join(filter(None, [f"{comment}." if comment else "", default])) or "&nbsp;"
            described.append(f"    {name} ({field.annotation}): {text}")
    return "\n\nAttributes:\n" + "\n".join(described) + "\n" if described else ""


def one_by_one(arguments: re.Match[str]) -> str:
    """Arguments that share a description, each with the description."""
    indent, names, description = arguments.groups()
    return "".join(f"{indent}{name}{description}" for name in names.split(", "))


def link(role: re.Match[str], scope: griffe.Object, pages: dict[str, str]) -> str:
    """What stands in the place of a role: a link, or the name as code."""
    short, target = role.groups()
    title = target.rpartition(".")[2] if short or target.startswith("fastperc.") else target
    path = canonical(target, scope)
    name = path.rpartition(".")[2]
    identifier = pages.get(path) or pages.get(f"{path}.{name}")  # a function that has the name of its module
    return f"[`{title}`][{identifier}]" if identifier else f"`{title}`"


def canonical(target: str, scope: griffe.Object) -> str:
    """Where ``target``, as ``scope`` sees it, is defined; ``target`` itself where that is not known."""
    first, dot, rest = target.partition(".")
    try:
        candidates = [scope.resolve(first) + dot + rest]
    except griffe.NameResolutionError:
        candidates = []
    for path in [f"{scope.path}.{target}", *candidates, target]:
        try:
            return scope.modules_collection[path].canonical_path
        except (griffe.AliasResolutionError, KeyError):
            continue
    return target
