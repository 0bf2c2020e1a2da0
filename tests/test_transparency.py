"""Transparent pixels: their hidden colours do not show in what is visible."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pictures import picture, pixels
from PIL import Image, ImageDraw, ImageFilter

from fastperc import SuperResolutionNet, TransformNet, freeze
from fastperc.photos.photo import Photo, read_image
from fastperc.photos.stylize import stylize
from fastperc.photos.transparency import fill_transparent
from fastperc.photos.upscale import make_painter, upscale

SIZE = 60, 44


def disc(edge):
    """The alpha of a disc, with one kind of edge."""
    scale = 4 if edge == "antialiased" else 1
    alpha = Image.new("L", (SIZE[0] * scale, SIZE[1] * scale), 0)
    box = [value * scale for value in ((20, 10, 21, 30) if edge == "a line of one pixel" else (14, 8, 44, 38))]
    ImageDraw.Draw(alpha).ellipse(box, fill=128 if edge == "half transparent" else 255)
    if edge == "soft":
        alpha = alpha.filter(ImageFilter.GaussianBlur(4))
    if edge == "at the border":
        alpha = alpha.crop((20, 10, 30, 30)).resize(SIZE, Image.Resampling.NEAREST)
    return alpha.resize(SIZE, Image.Resampling.BOX)


EDGES = ["hard", "antialiased", "soft", "half transparent", "a line of one pixel", "at the border"]
HIDDEN = {"black": (0, 0, 0), "green": (0, 255, 0)}


def white_on(hidden, edge):
    """A white disc; ``hidden`` is the colour under alpha 0."""
    alpha = disc(edge)
    assert alpha.getextrema()[1] > 0
    return Photo(Image.composite(Image.new("RGB", SIZE, "white"), Image.new("RGB", SIZE, HIDDEN[hidden]),
                                 alpha.point(lambda level: 255 if level else 0)), alpha)  # fmt: skip


@pytest.fixture(scope="module")
def painters():
    torch.manual_seed(0)
    sr = make_painter(SuperResolutionNet(4, width=4).eval())
    style = freeze(TransformNet("instance", width=4))
    return {
        "stylize": lambda photo: stylize(style, photo),
        "keep-colors": lambda photo: stylize(style, photo, 0.5, keep_colors=True),
        "upscale": lambda photo: upscale(sr, photo),
        "upscale without matching": lambda photo: upscale(sr, photo, match=False),
        "resize": lambda photo: photo.resized(40),
        "enlarge": lambda photo: photo.resized(100),
        "optimize": lambda photo: Photo(Image.fromarray((photo.tensor()[0] * 255).byte().permute(1, 2, 0).numpy())),
    }


WAYS = ["stylize", "keep-colors", "upscale", "upscale without matching", "resize", "enlarge", "optimize"]


@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("way", WAYS)
def test_a_white_disc_becomes_what_white_becomes(painters, way, edge, hidden):
    photo = white_on(hidden, edge)
    expected = painters[way](Photo(Image.new("RGB", SIZE, "white"), photo.alpha))
    result = painters[way](photo)
    assert (pixels(result.rgb) == pixels(expected.rgb)).all()
    assert result.alpha is None or (pixels(result.alpha) == pixels(expected.alpha)).all()


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("way", WAYS)
def test_hidden_colors_do_not_matter(painters, way, edge):
    image, alpha = picture(*SIZE), disc(edge)
    shown = alpha.point(lambda level: 255 if level else 0)
    results = [
        pixels(painters[way](Photo(Image.composite(image, Image.new("RGB", SIZE, hidden), shown), alpha)).rgb)
        for hidden in ("black", "white", "red")
    ]
    assert (results[0] == results[1]).all() and (results[0] == results[2]).all()


@pytest.mark.parametrize("kind", ["png", "palette", "a transparent colour", "gray", "webp"])
def test_hidden_colors_of_files(tmp_path, painters, kind):
    alpha = disc("hard")
    image = Image.new("RGBA", SIZE, (0, 0, 0, 0))
    image.paste("white", (0, 0), alpha)
    path = tmp_path / ("in.webp" if kind == "webp" else "in.png")
    if kind == "palette":
        palette = alpha.point(lambda level: 1 if level else 0)
        palette.putpalette([0, 0, 0, 255, 255, 255])
        palette.save(path, transparency=0)
    elif kind == "a transparent colour":
        image.convert("RGB").save(path, transparency=(0, 0, 0))
    elif kind == "gray":
        image.convert("LA").save(path)
    else:
        image.save(path, **({"lossless": True, "exact": True} if kind == "webp" else {}))
    photo = read_image(path)
    assert (pixels(photo.alpha) == pixels(alpha)).all()
    expected = painters["upscale"](Photo(Image.new("RGB", SIZE, "white"), alpha)).rgb
    assert (pixels(painters["upscale"](photo).rgb) == pixels(expected)).all()


def test_visible_pixels_are_kept_and_colors_continue_to_the_nearest():
    image = Image.new("RGB", (90, 30), (1, 2, 3))
    alpha = Image.new("L", (90, 30), 0)
    for left, color in ((0, (200, 0, 0)), (60, (0, 0, 200))):
        image.paste(color, (left, 0, left + 30, 30))
        alpha.paste(255, (left, 0, left + 30, 30))
    filled = pixels(fill_transparent(image, alpha))
    assert (filled[:, :30] == (200, 0, 0)).all() and (filled[:, 60:] == (0, 0, 200)).all()
    assert filled[15, 33, 0] > 150 and filled[15, 56, 2] > 150
    assert ((filled[..., 0] + filled[..., 2] - 200) ** 2).max() <= 4, "a mixture of the two, nothing else"


def test_colors_that_hardly_show_weigh_little():
    image, alpha = Image.new("RGB", (16, 16), "black"), Image.new("L", (16, 16), 0)
    image.paste("white", (0, 0, 8, 16))
    alpha.paste(255, (0, 0, 8, 16))
    alpha.paste(1, (8, 0, 9, 16))
    assert pixels(fill_transparent(image, alpha))[:, 9:].min() >= 240


@pytest.mark.parametrize("opacity", [0, 1, 255])
def test_an_image_of_one_opacity_is_left_as_it_is(opacity):
    image = picture(33, 17)
    assert fill_transparent(image, Image.new("L", image.size, opacity)) is image


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 1), (3, 1100), (1030, 2)], ids=str)
def test_any_size(size):
    alpha = np.zeros(size[::-1], np.uint8)
    alpha[-1, 0] = 3
    assert (pixels(fill_transparent(Image.new("RGB", size, (9, 8, 7)), Image.fromarray(alpha))) == (9, 8, 7)).all()


def test_an_invisible_photo_can_be_painted(painters):
    photo = Photo(picture(*SIZE), Image.new("L", SIZE, 0))
    for way in WAYS:
        painters[way](photo)
