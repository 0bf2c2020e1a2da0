"""A run resumed: after a kill it is, bit for bit, the run that was never killed; another recipe is refused."""

from __future__ import annotations

import signal
import time
from functools import cache

import pytest
import torch
from training_runs import finish, losses, run_here, start, tensors, train_options, training_metadata


@pytest.fixture(scope="module")
def options(photo_folder, vgg_file, tmp_path_factory):
    return train_options(photo_folder, vgg_file, tmp_path_factory.mktemp("style"))


@pytest.fixture(scope="module")
def finished_on(options, tmp_path_factory):
    """The folder of a run that nothing interrupted, by its number of threads."""

    @cache
    def finished_on(threads):
        out = tmp_path_factory.mktemp("finished") / "run"
        status, errors = finish(start(options, out, threads=threads))
        assert status == 0, errors
        return out

    return finished_on


@pytest.fixture
def finished(finished_on):
    return finished_on(1)


@pytest.mark.parametrize(
    "threads", [pytest.param(1, id="one-thread"), pytest.param(2, id="two-threads", marks=pytest.mark.slow)]
)
def test_killed_and_resumed_is_bit_for_bit_the_run_that_was_not(options, finished_on, tmp_path, threads):
    """On the CPU, on the same number of threads, with no table of ``fastperc tune`` or the same."""
    finished, out = finished_on(threads), tmp_path / "run"
    process = start(options, out, threads=threads)
    deadline = time.monotonic() + 120
    while not (out / "previews" / "000006.png").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    stopped_at = training_metadata(out / "checkpoint.safetensors")["step"]
    assert 6 <= stopped_at < 12

    status, errors = finish(start(options, out, "--resume", "--workers", "0", threads=threads))
    assert status == 0, errors
    assert f"from iteration {stopped_at}" in errors
    for file in ("model.safetensors", "checkpoint.safetensors"):
        expected, resumed = tensors(finished / file), tensors(out / file)
        assert expected.keys() == resumed.keys()
        for name, tensor in expected.items():
            assert torch.equal(resumed[name], tensor), name
    assert (out / "losses.csv").read_bytes() == (finished / "losses.csv").read_bytes()


@pytest.mark.parametrize("cache", ["auto", "off"])
def test_resumed_losses_hold_no_iteration_twice(options, finished, tmp_path, cache):
    """Rows after the checkpoint are dropped, and so is half a row; the photos may be packed or not."""
    out = tmp_path / "run"
    assert run_here(options, out, "--iterations", "6", "--cache", cache) == 0
    text = (out / "losses.csv").read_text()
    (out / "losses.csv").write_text(text + "7,0.1,0.1,0.1,0.1\n8,0.2,0.1,0.1,0.1\n9,0.3")
    assert run_here(options, out, "--resume", "--cache", "auto") == 0
    assert (out / "losses.csv").read_text().startswith(text)
    (header, rows), (expected_header, expected_rows) = losses(out), losses(finished)
    assert header == expected_header and [row[0] for row in rows] == list(range(1, 13))
    assert all(abs(row[1] - expected[1]) < 0.1 * expected[1] for row, expected in zip(rows, expected_rows))


@pytest.mark.parametrize("damage", ["gone", "empty", "of other terms"])
def test_losses_begin_anew_where_there_are_none(options, tmp_path, damage):
    out = tmp_path / "run"
    assert run_here(options, out, "--iterations", "3") == 0
    if damage == "gone":
        (out / "losses.csv").unlink()
    else:
        (out / "losses.csv").write_text("" if damage == "empty" else "iteration,total\n1,0.5\n")
    assert run_here(options, out, "--iterations", "5", "--resume") == 0
    header, rows = losses(out)
    assert header == ["iteration", "total", "content", "style", "tv"] and [row[0] for row in rows] == [4, 5]


def test_resuming_a_finished_run_changes_nothing(options, finished):
    before = (finished / "checkpoint.safetensors").read_bytes()
    assert run_here(options, finished, "--resume") == 0
    assert (finished / "checkpoint.safetensors").read_bytes() == before


def test_a_run_is_not_overwritten_nor_resumed_with_another_recipe(options, finished, capsys):
    before = (finished / "checkpoint.safetensors").read_bytes()
    assert run_here(options, finished) == 2
    assert "--resume" in capsys.readouterr().err
    assert run_here(options, finished, "--resume", "--lr", "0.1") == 2
    assert "lr 0.001, not 0.1" in capsys.readouterr().err
    assert (finished / "checkpoint.safetensors").read_bytes() == before
