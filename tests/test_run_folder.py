"""The folder of a run: its lock, and which images in it are no photos."""

from __future__ import annotations

import errno
import subprocess
import sys

import pytest

from fastperc.errors import InputError
from fastperc.training.run_folder import CHECKPOINT, LOCK, is_output, locked

fcntl = pytest.importorskip("fcntl")

LOCKS = """
import sys, time
from pathlib import Path
from fastperc.training.run_folder import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other_process(tmp_path):
    """A process that has locked the folder ``run``."""
    with subprocess.Popen(
        [sys.executable, "-c", LOCKS, tmp_path / "run"], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "locked\n"
        yield process
        process.kill()


def test_a_locked_folder_is_refused_until_its_process_dies(tmp_path, other_process):
    with pytest.raises(InputError, match="run: another run is training here"), locked(tmp_path / "run"):
        pass
    assert (tmp_path / "run" / LOCK).exists(), "it is the other's"
    other_process.kill()
    other_process.wait()
    with locked(tmp_path / "run"):
        assert (tmp_path / "run" / LOCK).exists()
    assert not (tmp_path / "run" / LOCK).exists()


def test_folders_without_files_are_removed_again(tmp_path):
    with locked(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
    assert not (tmp_path / "a").exists()
    with locked(tmp_path / "a" / "b"):
        (tmp_path / "a" / "file").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "file"]


def test_a_file_system_without_locks_trains_all_the_same(tmp_path, monkeypatch):
    def lockf(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with locked(tmp_path / "run"):
        assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize("file", [CHECKPOINT, "model.safetensors", "losses.csv"])
def test_previews_beside_a_run_are_no_photos(tmp_path, file):
    preview, photo = tmp_path / "previews" / "000100.png", tmp_path / "photo.png"
    assert not is_output(preview), "a folder of that name"
    (tmp_path / file).touch()
    assert is_output(preview) and not is_output(photo)


def test_the_figure_of_two_runs_is_no_photo(tmp_path):
    assert not is_output(tmp_path / "figure2.png")
    (tmp_path / "residual").mkdir()
    (tmp_path / "residual" / CHECKPOINT).touch()
    assert is_output(tmp_path / "figure2.png") and not is_output(tmp_path / "figure3.png")
