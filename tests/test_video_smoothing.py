"""Flicker: its measure, and what ``--smooth`` does about it."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from clips import make_animation
from pictures import picture
from PIL import Image

from fastperc.video.clip import Frame
from fastperc.video.painters import EnlargeFrames, StyleFrames, painted
from fastperc.video.smoothing import MOVING, Smoother, flicker


def noisy(index, deviation=0.0, width=64, height=48):
    """A still picture with noise of its own, and a bright square that moves to the right along the bottom."""
    pixels = np.array(picture(width, height, seed=3)).astype(float)
    pixels += np.random.default_rng(index).normal(0, deviation, pixels.shape) if deviation else 0
    pixels[-12:-4, 3 * index : 3 * index + 8] = 250
    return torch.from_numpy(pixels.clip(0, 255).round().astype(np.uint8))


def flickering(frames):
    """Pictures that change by themselves: the negatives, each brighter or darker by up to 30 levels."""
    generator = torch.Generator().manual_seed(5)
    for frame in frames:
        change = torch.randint(-30, 31, (), generator=generator)
        yield (255 - frame.int() + change).clamp(0, 255).to(torch.uint8)


class Flickering:
    scale = 1

    def __call__(self, frames):
        return flickering(frames)


def smoothed(frames, strength):
    clip = (Frame(frame, index) for index, frame in enumerate(frames))
    return [frame.levels for frame in painted(clip, Flickering(), strength)]


@pytest.mark.parametrize("strength", [0.1, 0.5, 1.0])
def test_exact_on_still_parts(strength):
    frames = [noisy(index) for index in range(6)]
    plain, pictures = smoothed(frames, 0), smoothed(frames, strength)
    still = slice(0, 48 - 12 - 2)  # more than two pixels from what moves
    assert all(torch.equal(picture[still], plain[0][still]) for picture in pictures)
    assert not torch.equal(plain[1][still], plain[0][still])


def test_what_moves_is_painted_anew():
    frames = [noisy(index) for index in range(6)]
    plain, pictures = smoothed(frames, 0), smoothed(frames, 0.5)
    inside = (slice(-10, -6), slice(3 * 5 + 6, 3 * 5 + 8))  # of the square, where the last frame had none
    assert torch.equal(pictures[5][inside], plain[5][inside])


def test_a_cut_is_not_blended():
    frames = [noisy(0), 255 - noisy(0)]
    frames = [torch.where((frames[0].int() - 127).abs().amin(2, keepdim=True) > 60, frame, 0) for frame in frames]
    plain, pictures = smoothed(frames, 0), smoothed(frames, 1.0)
    changed = (frames[0].int() - frames[1].int()).abs().amax(2) > 100
    inner = torch.nn.functional.avg_pool2d(changed[None].float(), 5, 1, 2)[0] == 1
    assert inner.sum() > 20 and torch.equal(pictures[1][inner], plain[1][inner])


def test_slow_changes_add_up():
    """A fade, whose steps are each too small to be seen, leaves nothing old behind."""
    frames = [torch.full((32, 32, 3), 100 + index, dtype=torch.uint8) for index in range(100)]
    smoother = Smoother(0.5)
    last = [smoother(frame, frame) for frame in frames][-1]
    assert (last.int() - frames[-1].int()).abs().max() <= MOVING * 0.5 / 2


def test_flicker_falls_under_noise():
    frames = [noisy(index, deviation=1.0) for index in range(10)]
    values = [flicker(frames, smoothed(frames, strength)) for strength in (0, 0.25, 0.5, 1.0)]
    assert values == sorted(values, reverse=True) and values[2] < values[0] / 2, values


def test_the_measure():
    frames = [torch.zeros(4, 4, 3, dtype=torch.uint8) for _ in range(3)]
    pictures = [torch.full((8, 8, 3), level, dtype=torch.uint8) for level in (10, 20, 16)]
    assert flicker(frames, pictures) == 7.0  # the mean of 10 and 4
    frames[1] = frames[1].clone()
    frames[1][:2] = 200  # only the lower half is still
    pictures[1][:4] = 255
    assert flicker(frames, pictures) == 7.0
    assert math.isnan(flicker(frames[:1], pictures[:1]))


def test_pictures_larger_than_the_frames():
    smoother, frame = Smoother(0.5, scale=4), noisy(0)
    first, second = (torch.randint(0, 256, (4 * 48, 4 * 64, 3), dtype=torch.uint8) for _ in range(2))
    assert torch.equal(smoother(frame, first), first)
    assert torch.equal(smoother(frame, second), first)


def test_smooth_from_the_command_line(here, run, model):
    """All but the first frame of a still clip with noise in one corner are the first where it is still."""
    images = [Image.fromarray(noisy(0).numpy()) for _ in range(3)]
    for index, image in enumerate(images):
        image.paste((80 * index, 0, 0), (0, 0, 8, 8))
    images[0].save("clip.webp", save_all=True, append_images=images[1:], lossless=True, duration=100)
    for name, options in (("plain", []), ("smooth", ["--smooth", 0.5])):
        assert run("stylize", "clip.webp", "--frames-dir", name, "--model", model, *options).status == 0
    pictures = {
        name: [np.asarray(Image.open(path)) for path in sorted(Path(name).iterdir())] for name in ("plain", "smooth")
    }
    assert all((a == pictures["smooth"][0])[12:, 12:].all() for a in pictures["smooth"])
    assert (pictures["smooth"][0] == pictures["plain"][0]).all()
    assert not (pictures["plain"][1] == pictures["plain"][0])[12:, 12:].all()  # of instance norm


def test_frames_keep_their_times_through_the_painter(model):
    import fastperc

    engine = fastperc.freeze(fastperc.load(model))
    frames = [Frame(noisy(index), 7 * index, 7) for index in range(3)]
    results = list(painted(frames, StyleFrames(engine)))
    assert [(frame.pts, frame.duration) for frame in results] == [(0, 7), (7, 7), (14, 7)]
    assert all(torch.equal(frame.levels, engine(noisy(index))) for index, frame in enumerate(results))


class Tinting:
    """Enlarges four times, with colours that are off by some levels."""

    scale = 4

    def tiles(self, image, tile, dtype, watch):
        from fastperc.types import Window

        large = image.repeat_interleave(4, 0).repeat_interleave(4, 1).permute(2, 0, 1)[None].to(dtype) / 255
        yield Window(0, 0, *large.shape[2:]), large * 0.9 + 0.02


def test_enlarged_frames_get_the_colours_of_the_small_ones_and_keep_them():
    frames = [noisy(index) for index in range(4)] + [noisy(9) // 3] * 2  # a cut to a dark scene
    pictures = list(EnlargeFrames(Tinting())(iter(frames)))
    for frame, large in zip(frames, pictures):
        assert (large.float().mean((0, 1)) - frame.float().mean((0, 1))).abs().max() < 2
    still = slice(0, 4 * (48 - 12))
    assert all(torch.equal(large[still], pictures[0][still]) for large in pictures[:4])
    unmatched = next(EnlargeFrames(Tinting(), match=False)(iter(frames)))
    assert (unmatched.float().mean((0, 1)) - frames[0].float().mean((0, 1))).abs().max() > 3


def test_of_an_animation_the_smoothed_clip_is_written(here, run, model):
    make_animation(here / "clip.gif")
    assert run("stylize", "clip.gif", "-o", "out.gif", "--smooth", 1, "--model", model).status == 0
    from fastperc.video.animation import Animation

    assert Animation("out.gif").rate == Fraction(10)
