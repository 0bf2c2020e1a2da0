"""Progress lines of long work."""

from __future__ import annotations

import pytest

from fastperc import progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_line_every_few_seconds_with_the_recent_speed(clock, capsys):
    with progress.Meter("working", 200) as meter:
        for i in range(200):
            clock[0] += 0.1 if i < 100 else 1.0  # ten a second, then one
            meter.advance(f"step {i + 1}")
    lines = capsys.readouterr().err.splitlines()
    assert 6 <= len(lines) <= 9
    assert lines[-1].startswith("working  200/200  step 200  1.00/s") and lines[-1].endswith("0 s left")
    assert "1.00/s" in lines[-2]


def test_a_count_can_start_above_zero(clock, capsys):
    with progress.Meter("working", 12, start=10) as meter:
        for _ in range(2):
            clock[0] += 2.0
            meter.advance()
    assert capsys.readouterr().err.splitlines() == ["working  12/12  0.50/s  0 s left"]


def test_the_time_left_can_be_given(clock, capsys):
    with progress.Meter("working", 2) as meter:
        for left in (90.0, 30.0):
            clock[0] += 20.0
            meter.advance(seconds_left=left)
    assert [line.rpartition("  ")[2] for line in capsys.readouterr().err.splitlines()] == ["90 s left", "30 s left"]


@pytest.mark.parametrize(("left", "text"), [(3725.0, "1:02:05"), (0.2, "0:00:00"), (None, "-:--:--")])
def test_a_bar_shows_the_time_left(left, text):
    meter = progress.Meter("working", 2)
    meter._bar.update(meter._task, seconds_left=left)
    assert progress.TimeLeftColumn().render(meter._bar.tasks[0]).plain == text


def test_track_yields_the_items_and_counts_them(capsys):
    assert list(progress.track("abc", "counting", 3)) == ["a", "b", "c"]
    assert "counting  3/3" in capsys.readouterr().err
