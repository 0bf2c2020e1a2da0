"""Animated GIF, WebP and PNG, read and written by Pillow."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from clips import HEIGHT, WIDTH, frames_of, levels, make_animation, make_film, pictures_of, times_of
from PIL import Image

from fastperc.video.animation import Animation
from fastperc.video.clip import Span

SUFFIXES = (".gif", ".webp", ".apng", ".png")
DURATIONS = [100, 50, 200, 100]


@pytest.fixture
def stylize(run, model, here):
    """Runs ``fastperc stylize``, which must succeed, on what is given; returns what it printed."""

    def stylize(*arguments):
        result = run("stylize", *arguments, "--model", model)
        assert result.status == 0, result.err
        return result.err

    return stylize


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_animation_is_painted_whole(stylize, here, model, suffix):
    make_animation(here / f"clip{suffix}", DURATIONS, loop=3)
    stylize(f"clip{suffix}")
    result = Path(f"clip-{model.stem}{suffix}")
    with Image.open(f"clip{suffix}") as source, Image.open(result) as painted:
        assert (painted.format, painted.size) == (source.format, source.size)
        assert painted.info["loop"] == source.info["loop"] == 3
    ours, durations = frames_of(result)
    theirs, _ = frames_of(f"clip{suffix}")
    assert durations == DURATIONS
    assert all(np.abs(a - b)[..., :3].mean() > 5 for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("suffix", SUFFIXES[:3])
@pytest.mark.parametrize("source", SUFFIXES[:3])
def test_strength_0_is_the_animation_itself(stylize, here, source, suffix):
    make_animation(here / f"clip{source}")
    stylize(f"clip{source}", "-o", f"out{suffix}", "--strength", 0)
    ours, durations = frames_of(f"out{suffix}")
    theirs, _ = frames_of(f"clip{source}")
    assert durations == DURATIONS
    worst = {".gif": 5, ".webp": 5, ".apng": 0}[suffix]
    assert max(np.abs(a - b).mean() for a, b in zip(ours, theirs, strict=True)) <= worst


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_transparency_is_kept(stylize, here, suffix):
    if suffix == ".gif":  # Pillow would make one frame of them all
        make_animation(here / "clip.png", transparent=True)
        stylize("clip.png", "-o", "clip.gif", "--strength", 0)
    else:
        make_animation(here / f"clip{suffix}", transparent=True)
    stylize(f"clip{suffix}", "-o", f"out{suffix}")
    for ours, theirs in zip(frames_of(f"out{suffix}")[0], frames_of(f"clip{suffix}")[0], strict=True):
        assert (ours[..., 3] == theirs[..., 3]).all() and (ours[..., 3] == 0).mean() > 0.2


def test_a_film_of_a_transparent_animation_is_on_white(stylize, here):
    pytest.importorskip("av")
    make_animation(here / "clip.png", transparent=True)
    stylize("clip.png", "-o", "out.mkv")
    assert np.allclose(times_of("out.mkv"), [0, 0.1, 0.15, 0.35])
    assert all(picture[:, :16].min() > 230 for picture in pictures_of("out.mkv"))


@pytest.mark.parametrize("suffix", SUFFIXES[:3])
def test_an_animation_of_a_film(stylize, here, suffix):
    pytest.importorskip("av")
    times = [0, 40, 90, 400, 430, 900]
    make_film(here / "clip.mkv", times=times)
    stylize("clip.mkv", "-o", f"out{suffix}", "--strength", 0)
    frames, durations = frames_of(f"out{suffix}")
    unit = 10 if suffix == ".gif" else 1
    assert np.allclose(durations[:-1], np.diff(times), atol=unit)
    assert abs(sum(durations[:-1]) - 900) <= unit, "rounding does not add up"
    assert len(frames) == len(times)
    assert max(np.abs(frames[i][..., :3] - levels(i)).mean() for i in range(6)) < 8


def test_a_gif_leaves_out_frames_that_come_too_soon(stylize, here):
    make_animation(here / "clip.webp", [8] * 10)
    stylize("clip.webp", "-o", "out.gif")
    durations = frames_of("out.gif")[1]
    assert min(durations) >= 20 and sum(durations) == 80


def test_a_part_of_an_animation(stylize, here):
    make_animation(here / "clip.gif")
    stylize("clip.gif", "-o", "out.gif", "--start", "0.1", "--duration", "0.2")
    assert frames_of("out.gif")[1] == [50, 200]


def test_an_animation_is_enlarged_and_resized(stylize, here, run, sr_model):
    make_animation(here / "clip.webp", transparent=True)
    assert run("sr", "upscale", "clip.webp", "-o", "large.webp", "--model", sr_model).status == 0
    frames, durations = frames_of("large.webp")
    assert durations == DURATIONS and frames[0].shape == (4 * HEIGHT, 4 * WIDTH, 4)
    stylize("clip.webp", "-o", "small.apng", "--size", 40)
    assert frames_of("small.apng")[0][0].shape == (30, 40, 4)


def test_to_a_format_of_single_pictures_the_first_frame_is_painted(stylize, here):
    make_animation(here / "clip.gif")
    assert "clip.gif: holds 4 frames; only the first is used" in stylize("clip.gif", "-o", "out.png")
    with Image.open("out.png") as image:
        assert not image.is_animated


def test_a_folder_with_pictures_and_animations(stylize, here):
    Path("folder").mkdir()
    make_animation(Path("folder/clip.gif"))
    Path("photo.png").rename("folder/photo.png")
    Image.open("folder/photo.png").save("folder/still.gif")
    stylize("folder", "-o", "painted", "--frames-dir", "frames")
    assert sorted(path.name for path in Path("painted").iterdir()) == ["clip.gif", "photo.png", "still.gif.png"]
    assert len(list(Path("frames/clip.gif").iterdir())) == 4


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_damaged_animation_is_refused(refused, here, model, suffix):
    path = make_animation(here / f"clip{suffix}")
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    refused("stylize", path, "-o", f"out{suffix}", "--model", model, says=f"clip{suffix}: damaged or cut short")


def test_a_part_without_a_frame(refused, here, model):
    make_animation(here / "clip.gif")
    refused("stylize", "clip.gif", "-o", "out.gif", "--start", 9, "--model", model, says="has no frame in the part")


def test_a_still_picture_is_no_clip(refused, model):
    refused("stylize", "photo.png", "-o", "out.gif", "--model", model, says="cannot write an image as '.gif'")
    refused("stylize", "photo.png", "-o", "out.mp4", "--model", model, says="cannot write an image as '.mp4'")


def test_frames_are_read_one_by_one(here):
    make_animation(here / "clip.png", [100] * 3)
    animation = Animation("clip.png", Span(0.1))
    assert (animation.size, animation.total, animation.loops) == ((WIDTH, HEIGHT), 3, 0)
    frames = list(animation.frames())
    assert [(frame.pts, frame.duration) for frame in frames] == [(0, 100), (100, 100)]
    assert (frames[0].levels.numpy() == levels(1)).all()
