"""What the web page does, without Gradio and a browser: the pictures, limits, one at a time, cancelling."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from clips import make_film
from pictures import picture
from PIL import Image
from web_server import Slow, needs, networks_for_tests

from fastperc.errors import InputError
from fastperc.web.clips import Part, paint_upload
from fastperc.web.limits import Limits
from fastperc.web.studio import Cancelled, Studio, StyleOptions
from fastperc.web.values import number, sentence_of, style_options

needs("av")
WAVE = StyleOptions("great_wave")


@pytest.fixture(scope="module")
def networks():
    return networks_for_tests()


@pytest.fixture
def studio(networks, tmp_path):
    return Studio(networks, tmp_path / "studio", Limits())


# Pictures


@pytest.mark.parametrize("name", ["photo.png", "photo.jpg", "photo.webp", "photo.tif", "photo.ppm", "alpha.png"])
def test_a_painting_is_the_command_lines(run, here, studio, name):
    image = picture(64, 48, seed=2)
    if name == "alpha.png":
        image.putalpha(Image.linear_gradient("L").resize((64, 48)))
    image.save(name)
    result = studio.paint(here / name, StyleOptions("starry_night", 0.5, 40, True), studio.job("me", "paint"))
    options = "--style", "starry_night", "--strength", 0.5, "--size", 40, "--keep-colors"
    expected = here / "out" / result.file.name.replace("-starry_night", "")
    assert run("stylize", name, "-o", expected, *options).status == 0
    assert result.file.read_bytes() == expected.read_bytes()
    assert result.size == (40, 30) and Image.open(result.after).size == (40, 30) == Image.open(result.before).size


@pytest.mark.parametrize("stroke", [1.5, "auto"])
def test_strokes_are_the_command_lines(run, here, studio, stroke):
    picture(1400, 40).save("wide.png")
    result = studio.paint(here / "wide.png", WAVE._replace(stroke=stroke), studio.job("me", "paint"))
    assert run("stylize", "wide.png", "-o", "out.png", "--stroke", stroke).status == 0
    assert result.file.read_bytes() == Path("out.png").read_bytes()


def test_a_large_size_enlarges_nothing(run, here, studio):
    result = studio.paint(here / "photo.png", WAVE._replace(long_side=1024), studio.job("me", "paint"))
    assert run("stylize", "photo.png", "-o", "out.png").status == 0
    assert result.file.read_bytes() == Path("out.png").read_bytes()


@pytest.mark.parametrize(("method", "scale"), [("pixel", 4), ("feature", 8), ("srcnn", 4)])
def test_an_enlarged_photo_is_the_command_lines(run, here, studio, method, scale):
    result = studio.enlarge(here / "photo.png", method, scale, studio.job("me", "enlarge"))
    assert run("sr", "upscale", "photo.png", "-o", "out.png", "--method", method, "--scale", scale).status == 0
    assert result.file.read_bytes() == Path("out.png").read_bytes()
    assert Image.open(result.before).size == Image.open(result.after).size == result.size == (32 * scale, 24 * scale)


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_a_painted_clip_is_the_command_lines(run, here, studio, suffix):
    clip = make_film(here / "clip.mp4")
    if suffix == ".gif":
        assert run("stylize", clip, "-o", "clip.gif", "--strength", 0).status == 0
    clip = clip.with_suffix(suffix)
    counts = []
    part = Part(0.2, 0.5, 0.5)
    show = lambda done, total: counts.append((done, total))  # noqa: E731
    result = paint_upload(studio, clip, WAVE, part, studio.job("me", "clip"), show)
    options = "--start", 0.2, "--duration", 0.5, "--smooth", 0.5
    assert run("stylize", clip, "-o", f"out{suffix}", *options).status == 0
    assert result.read_bytes() == Path(f"out{suffix}").read_bytes()
    assert [done for done, _ in counts] == list(range(6))
    assert counts[-1] == (5, 5) or suffix == ".gif"  # of an animation, the frames of the part are not known before


# Limits and bad input


def test_large_photos(here, networks):
    picture(1100, 1000).save("large.png")
    picture(300, 300).save("medium.png")
    studio = Studio(networks, here, Limits(megapixels=1))
    job = studio.job("me", "paint")
    with pytest.raises(InputError, match=r"large\.png: 1100×1000 is too large; this page takes up to 1 megapixels"):
        studio.paint(here / "large.png", WAVE, job)
    with pytest.raises(InputError, match=r"medium\.png, enlarged 4 times: 1200×1200 is too large"):
        studio.enlarge(here / "medium.png", "pixel", 4, job)


def test_long_and_large_clips(here, networks):
    clip = make_film(here / "clip.mp4", times=range(0, 2500, 250))
    studio = Studio(networks, here, Limits(seconds=2))
    job, show = studio.job("me", "clip"), lambda done, total: None
    with pytest.raises(InputError, match=r"clip\.mp4: 2 s is too long; this page paints up to 2 s, so choose a part"):
        paint_upload(studio, clip, WAVE, Part(), job, show)
    assert paint_upload(studio, clip, WAVE, Part(0.5, 0.5), job, show).exists()
    with pytest.raises(InputError, match=r"clip\.mp4: 64×48 is too large"):
        paint_upload(Studio(networks, here, Limits(megapixels=0)), clip, WAVE, Part(), job, show)


def test_a_clip_that_is_longer_than_it_says(here, networks, monkeypatch):
    clip = make_film(here / "clip.mp4", times=range(0, 3000, 300))
    studio = Studio(networks, here, Limits(seconds=1))
    monkeypatch.setattr("fastperc.video.film.Film._count", lambda film: 1)
    with pytest.raises(InputError, match="s is too long"):
        paint_upload(studio, clip, WAVE, Part(), studio.job("me", "clip"), lambda done, total: None)
    assert not list(here.rglob("*-great_wave*"))


def test_sentences(studio, here):
    Path("bad.png").write_bytes(b"no image")
    for error, sentence in (
        (InputError("choose a photo first"), "Choose a photo first."),
        (InputError(f"{studio.folder}/uploads/0af3/bad one.png: not an image"), "bad one.png: not an image."),
        (InputError("cut short; --duration 2.00 paints what is there"), "Cut short; Length 2.00 paints what is there."),
        (Cancelled(), "Cancelled."),
        (MemoryError(), "There is not enough memory; try a smaller size."),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "There is not enough memory; try a smaller size."),
        (OSError(28, "No space left on device"), "The server cannot write a file: No space left on device."),
    ):
        assert sentence_of(error, studio) == sentence


def test_values_of_the_browser_are_checked():
    assert style_options("great_wave", 1, 512, False) == StyleOptions("great_wave", 1.0, 512, False)
    for strength, size in ((2, 512), (None, 512), ("x", 512), (1, 1e9), (1, float("nan")), (1, [])):
        with pytest.raises(InputError, match="is not a number from"):
            style_options("great_wave", strength, size, False)
    assert style_options("great_wave", 1, 512, False, 2.5).stroke == 2.5
    for stroke in (0.05, -1, 101, "large", None, float("nan")):
        with pytest.raises(InputError, match="the stroke size is not a number from"):
            style_options("great_wave", 1, 512, False, stroke)
    assert number("2", 1, 3, "it") == 2


def test_unknown_networks(studio, here):
    job = studio.job("me", "paint")
    with pytest.raises(InputError, match="no style 'monet'; choose one of the pictures"):
        studio.paint(here / "photo.png", StyleOptions("monet"), job)
    with pytest.raises(InputError, match="no 'srcnn' network ships for ×8"):
        studio.enlarge(here / "photo.png", "srcnn", 8, job)


def test_a_name_of_a_person_is_no_path(studio, here):
    job = studio.job("../../../" + str(here), "paint")
    assert studio.uploads / "results" in job.folder.parents
    studio.paint(here / "photo.png", WAVE, job)
    studio.end("../../../" + str(here))
    assert (here / "photo.png").exists() and not job.folder.exists()


# One at a time, and cancelling


def in_threads(*calls):
    threads = [threading.Thread(target=call) for call in calls]
    for thread in threads:
        thread.start()
    return threads


def test_one_picture_at_a_time(studio, here):
    Slow.most = 0
    paint = lambda person: studio.paint(here / "photo.png", StyleOptions("slow"), studio.job(person, "paint"))  # noqa: E731
    for thread in in_threads(*(lambda person=person: paint(person) for person in "abc")):
        thread.join()
    assert Slow.most == 1
    assert len(list(studio.folder.rglob("photo-slow.png"))) == 3


@pytest.mark.parametrize("end", ["cancel", "end", "close"])
def test_cancel_while_waiting(studio, here, end):
    outcome = []

    def paint():
        try:
            studio.paint(here / "photo.png", WAVE, job)
        except Cancelled as error:
            outcome.append(error)

    job = studio.begin("me", "paint")
    with studio.turn(studio.job("another", "paint")):
        (thread,) = in_threads(paint)
        time.sleep(0.1)
        (closing,) = in_threads({"cancel": job.cancel, "end": lambda: studio.end("me"), "close": studio.close}[end])
        thread.join(10)
    closing.join(10)
    assert outcome and not closing.is_alive() and not list(studio.folder.rglob("photo-*"))


def test_closing_does_not_wait_for_long(studio, here):
    def paint():
        with suppress(Cancelled):
            studio.paint(here / "photo.png", StyleOptions("slow"), studio.job("me", "paint"))

    (thread,) = in_threads(paint)
    while not Slow.running:
        time.sleep(0.01)
    assert not studio.close()
    assert studio.close(patience=10)
    thread.join(10)
    assert not thread.is_alive() and not list(studio.folder.rglob("photo-*"))


def test_cancel_between_frames(studio, here):
    clip, job = make_film(here / "clip.mp4"), studio.begin("me", "clip")
    with pytest.raises(Cancelled):
        paint_upload(studio, clip, WAVE, Part(), job, lambda done, total: job.cancel() if done == 3 else None)
    assert [path for path in studio.folder.rglob("*") if path.is_file()] == []


def test_cancel_between_tiles(studio, here):
    picture(96, 96).save("large.png")
    studio.networks = studio.networks._replace(tile=32)
    job, seen = studio.begin("me", "paint"), []

    def watch(items, title, total):
        for item in items:
            seen.append(item)
            if len(seen) == 3:
                job.cancel()
            yield item

    with pytest.raises(Cancelled):
        studio.paint(here / "large.png", WAVE, job, watch)
    assert len(seen) == 3


def test_a_new_job_replaces_the_last_results(studio, here):
    first = studio.paint(here / "photo.png", WAVE, studio.begin("me", "paint"))
    second = studio.paint(here / "photo.png", StyleOptions("starry_night"), studio.begin("me", "paint"))
    other = studio.paint(here / "photo.png", WAVE, studio.begin("you", "paint"))
    with pytest.raises(InputError):
        studio.paint(here / "gone.png", WAVE, studio.begin("me", "paint"))
    assert not first.file.exists() and second.file.exists() and other.file.exists()
