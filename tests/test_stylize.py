"""Painting photos with a style network."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pictures import picture, pixels
from PIL import Image

from fastperc import InputError, TransformNet, freeze, reference
from fastperc.photos.photo import Photo
from fastperc.photos.stylize import read_photo, stylize
from fastperc.types import Window


@pytest.fixture(scope="module")
def engine():
    torch.manual_seed(0)
    return freeze(TransformNet("instance", width=4))


class Inverse:
    """An engine that paints the negative of an image, in two tiles."""

    scale = -1.0

    def tiles(self, image, tile, dtype, watch):
        height, width, _ = image.shape
        for top, rows in ((0, 7), (7, height - 7)):
            part = image[top : top + rows].permute(2, 0, 1)[None].to(dtype) / 255
            yield Window(top, 0, rows, width), 1 + self.scale * part


@pytest.mark.parametrize("size", [(16, 16), (17, 23), (33, 18), (61, 47)], ids=lambda size: f"{size[0]}x{size[1]}")
def test_the_painting_has_the_size_of_the_photo(engine, size):
    photo = Photo(picture(*size))
    painting = stylize(engine, photo).rgb
    assert (painting.mode, painting.size) == ("RGB", size)
    assert (pixels(painting) != pixels(photo.rgb)).mean() > 0.5


def test_alpha_and_metadata_are_kept(engine):
    photo = Photo(picture(20, 18), picture(20, 18).getchannel("R"), {"dpi": (300, 300)})
    painting = stylize(engine, photo)
    assert painting.alpha is photo.alpha and painting.metadata == {"dpi": (300, 300)}


@pytest.mark.parametrize("keep_colors", [False, True], ids=["", "keep-colors"])
def test_strength_0_is_the_photo_itself(engine, keep_colors):
    photo = Photo(picture(33, 21))
    assert (pixels(stylize(engine, photo, 0.0, keep_colors).rgb) == pixels(photo.rgb)).all()


@pytest.mark.parametrize("strength", [0.25, 0.5, 1.0])
def test_strength_blends_photo_and_painting(strength):
    photo = Photo(picture(33, 21))
    blend = pixels(stylize(Inverse(), photo, strength).rgb)
    expected = (1 - strength) * pixels(photo.rgb) + strength * (255 - pixels(photo.rgb))
    assert np.abs(blend - expected).max() <= 0.51


def test_keep_colors_takes_the_lightness_and_keeps_the_chroma():
    # Mid-tones near gray, so that no channel is clamped.
    photo = Photo(Image.fromarray((110 + 30 * np.random.default_rng(0).random((18, 20, 3))).astype(np.uint8)))
    x = photo.tensor()
    y = stylize(Inverse(), photo, keep_colors=True).tensor()
    chroma_x, chroma_y = x - reference.luma(x), y - reference.luma(y)
    assert (chroma_x - chroma_y).abs().max() <= 1.01 / 255
    assert (reference.luma(y) - reference.luma(1 - x)).abs().max() <= 0.51 / 255


def test_an_output_that_is_not_a_number_is_an_error():
    engine = Inverse()
    engine.scale = float("nan")
    with pytest.raises(FloatingPointError, match="not a number"):
        stylize(engine, Photo(picture(20, 18)))


def test_read_photo_resizes(tmp_path):
    picture(64, 48).save(tmp_path / "in.png")
    assert read_photo(tmp_path / "in.png").rgb.size == (64, 48)
    assert read_photo(tmp_path / "in.png", 32).rgb.size == (32, 24)


@pytest.mark.parametrize(
    ("size", "reason"),
    [(None, "15×64 is too small"), (32, "8×32 is too small"), (10**6, "234375×1000000 is larger than")],
    ids=["as-it-is", "32", "1000000"],
)
def test_read_photo_refuses_sizes_that_no_network_accepts(tmp_path, size, reason):
    picture(15, 64).save(tmp_path / "in.png")
    with pytest.raises(InputError, match=f"in.png: {reason}"):
        read_photo(tmp_path / "in.png", size)
