"""Checks that a command refuses its input."""

from __future__ import annotations

import os


def check_refused(run, folder, *arguments, says, status=2):
    """Runs a command that must print one line with ``says`` on stderr, nothing else, and leave ``folder`` as it was."""
    before = contents(folder)
    result = run(*arguments)
    lines = result.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("fastperc"), result.err
    assert says in lines[0]
    assert (result.status, result.out) == (status, "")
    assert contents(folder) == before


def contents(folder):
    """The bytes of each file under ``folder``, or the size if it is huge or unreadable; None for anything else."""
    return {path: content(path) if path.is_file() else None for path in folder.rglob("*")}


def content(path):
    size = path.stat().st_size
    return path.read_bytes() if size < 1 << 30 and os.access(path, os.R_OK) else size
