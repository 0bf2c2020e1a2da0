"""The folder of a run: its lock, and which images in it are no photos."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from pictures import picture
from refusals import check_refused

from fastperc.errors import InputError
from fastperc.files import check_writable, make_folder
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


def test_another_process_may_remove_the_empty_folder_at_the_worst_moment(tmp_path, monkeypatch):
    """As the check of the other processes of one run does."""
    system = os.open

    def open_late(path, *arguments):
        monkeypatch.setattr(os, "open", system)
        Path(path).parent.rmdir()
        return system(path, *arguments)

    monkeypatch.setattr(os, "open", open_late)
    with locked(tmp_path / "run"):
        assert (tmp_path / "run" / LOCK).exists()


def test_others_may_remove_the_empty_folder_at_any_moment(tmp_path):
    """As the check of the other processes of one run does."""
    run, stop = tmp_path / "above" / "run", threading.Event()

    def remove():
        while not stop.is_set():
            for folder in (run, run.parent):
                with suppress(OSError):
                    folder.rmdir()
                time.sleep(1e-5)

    others = [threading.Thread(target=remove) for _ in range(3)]
    for thread in others:
        thread.start()
    try:
        for _ in range(300):
            make_folder(run)
            with locked(run):
                assert (run / LOCK).exists()
            check_writable(run / "model.safetensors")
    finally:
        stop.set()
        for thread in others:
            thread.join()


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


NOT_FILES = {
    "folder": Path.mkdir,
    "pipe": os.mkfifo,
    "loop": lambda path: path.symlink_to(path.name),
    "huge": lambda path: (path.touch(), os.truncate(path, 1 << 40)),
}


@pytest.mark.parametrize("kind", NOT_FILES)
@pytest.mark.parametrize("name", ["checkpoint.safetensors", "model.safetensors", "losses.csv", "previews", ".lock"])
def test_what_is_in_the_way_in_a_folder_is_refused_before_training(
    run, here, photo_folder, vgg_options, monkeypatch, kind, name
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(here.parent / "cache"))
    options = "--data", photo_folder, "--size", 16, "--workers", 0, "--width", 4, "--batch", 1, *vgg_options
    assert run("train", "--style", "photo.png", "--out", "run", "--iterations", 1, *options).status == 0
    path = Path("run", name)
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    NOT_FILES[kind](path)
    resume = "train", "--resume", "--out", "run", "--iterations", 2
    if (kind, name) in {("huge", "model.safetensors"), ("folder", "previews")}:
        assert run(*resume).status == 0
    elif (kind, name) == ("loop", "checkpoint.safetensors"):
        check_refused(run, here, *resume, says="run: holds no run to resume")
    elif (kind, name) == ("loop", "model.safetensors"):
        check_refused(run, here, *resume, says="run/model.safetensors: cannot be written (")
    else:
        check_refused(run, here, *resume, says=f"run/{name}")


@pytest.mark.parametrize("option", ["--style", "--vgg", "--data", "--init"])
def test_an_input_that_is_a_loop_of_links_is_refused(run, here, photo_folder, vgg_file, option):
    Path("loop").symlink_to("loop")
    picture(40, 30).save("painting.png")
    inputs = {"--style": "painting.png", "--vgg": vgg_file, "--data": photo_folder, option: "loop"}
    options = [text for pair in inputs.items() for text in pair]
    check_refused(run, here, "train", *options, "--size", 16, "--out", "new", says="loop: ")


def test_a_painting_of_a_terabyte_is_refused(run, here, photo_folder, vgg_options):
    os.truncate("photo.png", 1 << 40)
    options = "--style", "photo.png", "--data", photo_folder, *vgg_options, "--size", 16, "--out", "new"
    check_refused(run, here, "train", *options, says="photo.png: has more than 4 GiB")
