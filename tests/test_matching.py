"""Matching the colours of an enlarged picture: no picture gets worse by it, and photographs get better."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import picture, pixels
from PIL import Image, ImageDraw

from fastperc import load, reference
from fastperc.evaluation import psnr
from fastperc.photos.matching import match_colors, match_histograms
from fastperc.photos.photo import Photo, read_image
from fastperc.photos.upscale import make_painter, upscale

PHOTO = Path(__file__).parent.parent / "examples" / "chelsea.jpg"


def logo(side=96, background=(30, 120, 200)):
    image = Image.new("RGB", (side, side), background)
    draw = ImageDraw.Draw(image)
    draw.rectangle([side // 8, side // 5, side // 2, 3 * side // 5], fill=(250, 220, 40))
    draw.ellipse([side // 2, side // 2, 7 * side // 8, 7 * side // 8], fill=(220, 30, 40))
    return image


def text(ink=0, paper=255):
    image = Image.new("L", (96, 96), paper)
    for line in range(7):
        ImageDraw.Draw(image).text((4, 3 + 13 * line), f"Perceptual {line}", fill=ink)
    return image.point(lambda level: 255 if level > 127 else 0).convert("RGB")


def gradient():
    y, x = np.mgrid[0:96, 0:96] / 95
    return Image.fromarray((255 * np.stack([x, y, (x + y) / 2], axis=2)).round().astype(np.uint8))


def screenshot():
    image = Image.new("RGB", (128, 112), (245, 246, 248))
    draw = ImageDraw.Draw(image)
    draw.rectangle([0, 0, 128, 14], fill=(40, 44, 52))
    draw.text((3, 1), "File Edit View", fill=(220, 220, 220))
    for line in range(6):
        draw.text((4, 20 + 13 * line), f"item {line}", fill=(30, 30, 30))
    draw.rectangle([60, 92, 120, 108], fill=(0, 120, 215))
    image.paste(read_image(PHOTO).rgb.resize((64, 64)), (58, 22))
    return image


def photo():
    return read_image(PHOTO).rgb.resize((120, 80))


def checkerboard(step=8):
    y, x = np.mgrid[0:96, 0:96] // step
    return Image.fromarray(((x + y) % 2 * 255).astype(np.uint8)).convert("RGB")


# Few levels and many. The truth of each is the image with every pixel repeated.
DRAWN = {
    "logo": logo(),
    "a small logo": logo(24),
    "a dark logo": logo(64, (8, 8, 8)),
    "smooth logo": logo(384).resize((96, 96), Image.Resampling.LANCZOS),
    "black text": text(),
    "white text": text(255, 0),
    "gradient": gradient(),
    "gray gradient": gradient().convert("L").convert("RGB"),
    "screenshot": screenshot(),
    "checkerboard": checkerboard(),
    "one colour": Image.new("RGB", (48, 48), (30, 120, 200)),
    "black": Image.new("RGB", (48, 48)),
    "dithered": photo().convert("1").convert("RGB"),
    "four colours": photo().quantize(4).convert("RGB"),
    "four grays": photo().convert("L").point(lambda level: level // 64 * 85).convert("RGB"),
    "noise": Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)),
    "waves": picture(96, 64),
}
METHODS = ["x4_pixel", "x4_feature", "x8_pixel", "x8_feature"]


@pytest.fixture(scope="module", params=METHODS)
def painter(request):
    return make_painter(load(request.param))


def decibels(image, truth):
    return float(psnr(*(torch.from_numpy(pixels(x)).double() for x in (image, truth)), data_range=255))


@pytest.mark.parametrize("name", DRAWN)
def test_no_drawn_picture_gets_worse(painter, name):
    image = DRAWN[name]
    truth = image.resize([side * painter.scale for side in image.size], Image.Resampling.NEAREST)
    unmatched = upscale(painter, Photo(image), match=False).rgb
    matched = match_colors(unmatched, image)  # as upscale does
    assert decibels(matched, truth) >= decibels(unmatched, truth)


def restored(painter, truth, blur):
    """The picture that a network makes of ``truth`` made small; matched, unmatched, and matched by histograms alone."""
    small = reference.to_levels(reference.degrade(Photo(truth).tensor(), painter.scale, blur))
    small = Image.fromarray(small[0].permute(1, 2, 0).contiguous().numpy())
    unmatched = upscale(painter, Photo(small), match=False).rgb
    return upscale(painter, Photo(small)).rgb, unmatched, match_histograms(unmatched, small)


@pytest.mark.parametrize("blur", [0.0, 1.0])
def test_photographs_gain_what_histograms_give(painter, blur):
    truth = read_image(PHOTO).rgb.crop((0, 0, 448, 296))
    matched, unmatched, by_histogram = (decibels(x, truth) for x in restored(painter, truth, blur))
    assert matched >= max(unmatched + 0.1, by_histogram - 0.05)
    for part in ((128, 80, 256, 208), (0, 160, 192, 288), (300, 0, 364, 64)):
        matched, unmatched, _ = (decibels(x, truth.crop(part)) for x in restored(painter, truth.crop(part), blur))
        assert matched >= unmatched


def test_drawn_pictures_that_were_made_small_do_not_get_worse(painter):
    for name in ("logo", "black text", "screenshot", "checkerboard", "gradient"):
        truth = DRAWN[name].resize((384, 384), Image.Resampling.NEAREST)
        matched, unmatched, _ = (decibels(x, truth) for x in restored(painter, truth, 0.0))
        assert matched >= unmatched, name


def test_invisible_pixels_do_not_count():
    target = picture(40, 30)
    alpha = Image.new("L", target.size, 0)
    alpha.paste(255, (0, 0, 20, 30))
    image = picture(160, 120, seed=1)
    expected = match_colors(image.crop((0, 0, 80, 120)), target.crop((0, 0, 20, 30)))
    for hidden in ("black", "white"):
        target.paste(hidden, (20, 0, 40, 30))
        assert (pixels(match_colors(image, target, alpha))[:, :80] == pixels(expected)).all()
    assert match_colors(image, target, Image.new("L", target.size, 0)) is image
