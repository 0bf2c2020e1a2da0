"""What can go wrong while a clip is painted: one line, no half file, and no thread left."""

from __future__ import annotations

import errno
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from clips import FRAMES, make_animation, make_film, times_of
from refusals import contents

from fastperc.progress import silent
from fastperc.video.animation_writer import AnimationWriter
from fastperc.video.film import Film
from fastperc.video.film_writer import FilmWriter
from fastperc.video.jobs import DEPTH, paint_clip
from fastperc.video.threads import Behind, ahead

av = pytest.importorskip("av")


class Slow:
    """A painter that gives each frame back, after some time."""

    scale = 1

    def __init__(self, seconds=0.0, fails_at=None, error=None):
        self.seconds, self.fails_at, self.error = seconds, fails_at, error

    def __call__(self, frames):
        for index, frame in enumerate(frames):
            time.sleep(self.seconds)
            if index == self.fails_at:
                raise self.error
            yield frame


@pytest.fixture(autouse=True)
def no_thread_is_left():
    before = threading.active_count()
    yield
    assert threading.active_count() == before


@pytest.fixture(params=["out.mp4", "out.mkv", "out.gif"])
def target(request, here):
    """The name of a clip that exists already."""
    make_film(here / "clip.mp4")
    path = here / request.param
    path.write_bytes(b"what was there")
    return path


@pytest.mark.parametrize("when", ["put", "copy", "finish"])
def test_a_full_disk(refused, target, model, monkeypatch, when):
    writer = AnimationWriter if target.suffix == ".gif" else FilmWriter
    whole = getattr(writer, when)

    def fails(self, *arguments):
        whole(self, *arguments)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer, when, fails)
    says = f"{target}: No space left on device"
    with silent():  # no line about the progress
        refused("stylize", "clip.mp4", "-o", target, "--model", model, says=says, status=1)


def test_a_full_disk_for_real(here, model):
    make_film(here / "clip.mp4")
    before = contents(here)
    limited = ["sh", "-c", 'ulimit -f 8; exec "$@"', "sh", sys.executable, "-m", "fastperc"]  # 4 kB a file
    options = ["stylize", "clip.mp4", "-o", "out.mp4", "--model", model]
    result = subprocess.run([*limited, *options], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.splitlines()[-1] == "fastperc stylize: out.mp4: File too large"
    assert contents(here) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt(), FloatingPointError("not a number"), MemoryError()])
def test_a_failure_while_painting_leaves_the_folder_as_it_was(here, target, error):
    before = contents(here)
    with pytest.raises(type(error)):
        paint_clip(here / "clip.mp4", target, Slow(fails_at=5, error=error))
    assert contents(here) == before


def test_ctrl_c(here, model):
    make_film(here / "clip.mp4")
    before = contents(here)
    code = (
        "import sys, time, fastperc.video.painters as painters\n"
        "from fastperc.cli import main\n"
        "paint = painters.StyleFrames.__call__\n"
        "painters.StyleFrames.__call__ = lambda self, frames: map(slowly, paint(self, frames))\n"
        "def slowly(picture):\n    print('painting', flush=True)\n    time.sleep(1)\n    return picture\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", code, "stylize", "clip.mp4", "-o", "out.mp4", "--model", str(model)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "painting\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "fastperc stylize: interrupted\n")
    assert contents(here) == before


def test_a_film_that_is_damaged_in_the_middle(here, refused, model, monkeypatch):
    make_film(here / "clip.mp4")

    def damaged(self, packet, whole=Film._frames_of):
        if self._decoded >= 5:
            raise av.error.InvalidDataError(1094995529, "Invalid data found")
        return whole(self, packet)

    monkeypatch.setattr(Film, "_frames_of", damaged)
    says = "clip.mp4: damaged at 0.50 s (Invalid data found); --duration 0.50 paints what comes before"
    refused("stylize", "clip.mp4", "-o", "out.mp4", "--model", model, says=says)


@pytest.mark.parametrize("slowest", ["painter", "writer"])
def test_memory_stays_flat(here, monkeypatch, slowest):
    """However slow a stage is, only a few frames are in memory."""
    frames = 40
    make_film(here / "clip.mp4", times=range(0, 100 * frames, 100))
    read, written, most = [0], [0], [0]

    def count(self, frame, whole=Film._levels):
        read[0] += 1
        most[0] = max(most[0], read[0] - written[0])
        return whole(self, frame)

    def put(self, frame, whole=FilmWriter.put):
        time.sleep(0.01 if slowest == "writer" else 0)
        whole(self, frame)
        written[0] += 1

    monkeypatch.setattr(Film, "_levels", count)
    monkeypatch.setattr(FilmWriter, "put", put)
    assert paint_clip(here / "clip.mp4", here / "out.mp4", Slow(0.01 if slowest == "painter" else 0)) == frames
    assert read[0] == written[0] == frames and most[0] <= 2 * DEPTH + 4


def test_a_long_silence_of_one_stream_does_not_stop_the_others(here):
    """Sound goes on after the last frame, and all of it is copied."""
    make_film(here / "clip.mkv", times=[0, 100])
    paint_clip(here / "clip.mkv", here / "out.mkv", Slow())
    with av.open(str(here / "clip.mkv")) as a, av.open(str(here / "out.mkv")) as b:
        assert [bytes(p) for p in a.demux(audio=0)] == [bytes(p) for p in b.demux(audio=0)]


def test_painting_may_lag_behind_reading(here):
    """As on a GPU, where a picture is given back when the next frames are under way."""

    class Lagging:
        scale = 1

        def __call__(self, frames):
            waiting = []
            for frame in frames:
                waiting.append(frame)
                if len(waiting) > 3:
                    yield waiting.pop(0)
            yield from waiting

    make_film(here / "clip.mp4")
    assert paint_clip(here / "clip.mp4", here / "out.mp4", Lagging()) == FRAMES
    assert times_of(here / "out.mp4") == times_of(here / "clip.mp4")


def test_an_animation_needs_no_pyav(here, monkeypatch):
    make_animation(here / "clip.gif")
    monkeypatch.setitem(sys.modules, "av", None)
    assert paint_clip(here / "clip.gif", here / "out.webp", Slow()) == 4


class TestThreads:
    def test_items_come_in_order_and_not_too_early(self):
        taken = []
        items = ahead((taken.append(i) or i for i in range(20)), 3)
        assert next(items) == 0
        time.sleep(0.2)
        assert len(taken) <= 5
        assert list(items) == list(range(1, 20))

    def test_an_error_of_the_iterator_is_raised(self):
        def broken():
            yield 1
            raise ValueError("broken")

        items = ahead(broken(), 3)
        assert next(items) == 1
        with pytest.raises(ValueError, match="broken"):
            next(items)

    def test_closing_ends_the_thread(self):
        items = ahead(iter(int, 1), 3)
        next(items)
        items.close()

    def test_work_is_done_in_order(self):
        done = []
        with Behind(done.append, 2) as behind:
            for item in range(50):
                behind.put(item)
        assert done == list(range(50))

    @pytest.mark.parametrize("items", [1, 50])
    def test_an_error_of_the_work_is_raised(self, items):
        def fail(item):
            raise ValueError("full")

        with pytest.raises(ValueError, match="full"), Behind(fail, 2) as behind:
            for item in range(items):
                behind.put(item)

    def test_an_error_in_the_block_drops_what_waits(self):
        done = []
        with pytest.raises(KeyError), Behind(lambda item: time.sleep(0.05) or done.append(item), 8) as behind:
            for item in range(8):
                behind.put(item)
            raise KeyError
        assert len(done) < 8


def test_painters_run_in_the_thread_of_the_caller(here):
    """PyTorch's and CUDA's settings are those of a thread."""
    make_film(here / "clip.mp4")
    threads = set()

    class Where(Slow):
        def __call__(self, frames):
            for frame in frames:
                threads.add(threading.current_thread())
                yield torch.zeros_like(frame)

    paint_clip(here / "clip.mp4", Path("out.mp4"), Where())
    assert threads == {threading.main_thread()}
