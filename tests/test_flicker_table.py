"""``benchmarks/flicker.py``, which measures the table of ``docs/video.md``."""

from __future__ import annotations

import re

import flicker
import pytest

ROW = r"\| `great_wave` \| (?:none|2 levels) \| (\S+) \| (\S+) \| (\S+) \| (\S+) \|"


def test_measures_a_clip():
    pytest.importorskip("av")
    lines = flicker.table(("great_wave",), frames=4, size=(64, 48)).splitlines()
    assert len(lines) == 4
    for line in lines[2:]:
        values = [float(value) for value in re.fullmatch(ROW, line).groups()]
        assert values == sorted(values, reverse=True) and values[0] > 2 * values[-1]


def test_writes_the_table(tmp_path, monkeypatch, capsys):
    page = tmp_path / "video.md"
    page.write_text("before\n\n<!-- flicker -->\nold\n<!-- /flicker -->\n\nafter\n")
    monkeypatch.setattr(flicker, "PAGE", page)
    monkeypatch.setattr(flicker, "ROOT", tmp_path)
    monkeypatch.setattr(flicker, "table", lambda: "| new |")
    flicker.main(["--write"])
    assert page.read_text() == "before\n\n<!-- flicker -->\n| new |\n<!-- /flicker -->\n\nafter\n"
    page.write_text("no table")
    with pytest.raises(SystemExit, match="has no <!-- flicker -->"):
        flicker.main(["--write"])


def test_page_has_the_table():
    """Each style and noise that the script measures."""
    table = flicker.PAGE.read_text(encoding="utf-8").partition(flicker.MARKERS[0])[2].partition(flicker.MARKERS[1])[0]
    rows = re.findall(r"^\| `(\w+)` \| (none|2 levels) \|", table, re.MULTILINE)
    assert rows == [(style, noise) for style in flicker.STYLES for noise in ("none", "2 levels")]
