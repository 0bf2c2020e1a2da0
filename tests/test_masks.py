"""Painting where masks are white, with one network or several."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import picture, pixels
from PIL import Image

import fastperc
from fastperc import InputError, freeze
from fastperc.photos.masks import MaskedPainter, as_mask, read_mask
from fastperc.photos.photo import Photo, read_image
from fastperc.photos.stylize import stylize
from fastperc.types import Window

WIDTH, HEIGHT = 61, 47


class Flat:
    """A painter of one colour, in tiles of ``side`` pixels."""

    scale = 1

    def __init__(self, level: float, side: int = 20) -> None:
        self.level, self.side = level, side

    def tiles(self, image, tile, dtype, watch):
        height, width, _ = image.shape
        for top in range(0, height, self.side):
            for left in range(0, width, self.side):
                window = Window(top, left, min(self.side, height - top), min(self.side, width - left))
                yield window, torch.full((1, 3, window.height, window.width), self.level, dtype=dtype)


def mask(seed: int = 0, size: tuple[int, int] = (WIDTH, HEIGHT)) -> np.ndarray:
    """Every level somewhere, with areas of black and of white."""
    gray = pixels(picture(*size, seed=seed))[..., 0]
    return (2 * gray - 128).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def engine():
    torch.manual_seed(0)
    return freeze(fastperc.TransformNet("instance", width=4))


@pytest.fixture(scope="module")
def other_engine():
    torch.manual_seed(1)
    return freeze(fastperc.TransformNet("paper", width=4))


PHOTO = Photo(picture(WIDTH, HEIGHT))
OPTIONS = {"plain": {}, "strength": dict(strength=0.3), "keep-colors": dict(keep_colors=True), "tiles": dict(tile=24)}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
class TestOneNetwork:
    def test_white_changes_nothing(self, engine, options):
        masked = MaskedPainter([(engine, Image.new("L", (7, 5), 255))])
        assert (pixels(stylize(masked, PHOTO, **options).rgb) == pixels(stylize(engine, PHOTO, **options).rgb)).all()

    def test_black_is_the_photo(self, engine, options):
        masked = MaskedPainter([(engine, Image.new("L", (7, 5), 0))])
        assert (pixels(stylize(masked, PHOTO, **options).rgb) == pixels(PHOTO.rgb)).all()

    def test_gray_blends(self, engine, options):
        share = mask()[..., None] / 255
        painted, photo = pixels(stylize(engine, PHOTO, **options).rgb), pixels(PHOTO.rgb)
        blend = pixels(stylize(MaskedPainter([(engine, mask())]), PHOTO, **options).rgb)
        clamped = (painted == 0) | (painted == 255)  # --keep-colors clamps after the blend
        assert np.abs(blend - (share * painted + (1 - share) * photo))[~clamped].max() <= 1


class TestSeveralNetworks:
    def test_masks_share_what_they_cover_together(self):
        masks = [mask(seed) for seed in range(3)]
        levels = [40, 130, 220]
        painters = [Flat(level / 255, side) for level, side in zip(levels, (20, 16, 64))]
        painting = pixels(stylize(MaskedPainter(list(zip(painters, masks))), PHOTO).rgb)
        weights = np.stack(masks).astype(float)
        weights /= np.maximum(weights.sum(axis=0), 255)
        expected = sum(weight[..., None] * level for weight, level in zip(weights, levels))
        expected = expected + (1 - weights.sum(axis=0))[..., None] * pixels(PHOTO.rgb)
        assert (weights.sum(axis=0) < 0.5).any() and (np.stack(masks).sum(axis=0) > 400).any()
        assert np.abs(painting - expected).max() <= 1.5  # two roundings on the way, and the last

    def test_without_overlap_each_part_is_the_network_s_own(self, engine, other_engine):
        left = np.zeros((HEIGHT, WIDTH), np.uint8)
        left[:, :30] = 255
        right = 255 - left
        right[:10] = 0
        masked = MaskedPainter([(engine, left), (other_engine, right)])
        painting = pixels(masked(PHOTO.rgb, tile=24))
        assert (painting[:, :30] == pixels(stylize(engine, PHOTO, tile=24).rgb)[:, :30]).all()
        assert (painting[10:, 30:] == pixels(stylize(other_engine, PHOTO, tile=24).rgb)[10:, 30:]).all()
        assert (painting[:10, 30:] == pixels(PHOTO.rgb)[:10, 30:]).all()

    def test_two_white_masks_halve(self):
        masked = MaskedPainter([(Flat(0.2), Image.new("L", (1, 1), 255)), (Flat(0.6), Image.new("L", (1, 1), 255))])
        assert np.unique(pixels(masked(PHOTO.rgb))).tolist() == [102]

    def test_not_a_number_is_an_error(self):
        masked = MaskedPainter([(Flat(float("nan")), mask()), (Flat(0.5), mask(1))])
        with pytest.raises(FloatingPointError, match="not a number"):
            masked(PHOTO.rgb)


class TestMasks:
    def test_a_small_one_is_enlarged_without_steps_or_ringing(self):
        edge = np.array([[0, 0, 255, 255]], np.uint8)
        painting = pixels(MaskedPainter([(Flat(1.0), edge)])(Image.new("RGB", (64, 16))))[0, :, 0]
        steps = np.diff(painting)
        assert painting[0] == 0 and painting[-1] == 255 and steps.min() >= 0 and steps.max() <= 255 // 16 + 1

    def test_orientation_is_applied(self, tmp_path):
        image = Image.fromarray(mask())
        exif = Image.Exif()
        exif[0x0112] = 6  # turned by 90°
        image.save(tmp_path / "mask.png", exif=exif)
        expected = np.rot90(mask(), -1)
        assert (np.asarray(read_mask(tmp_path / "mask.png")) == expected).all()
        assert (np.asarray(as_mask(Image.open(tmp_path / "mask.png"))) == expected).all()

    @pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "LA", "RGBA", "I;16"])
    def test_of_every_mode(self, tmp_path, mode):
        gray = Image.fromarray(mask())
        if mode == "I;16":
            image = Image.fromarray(mask().astype(np.uint16) * 257)
        else:
            image = gray.convert(mode)
        image.save(tmp_path / "mask.png")
        expected = np.asarray(gray.convert("1").convert("L") if mode == "1" else gray)
        assert (np.asarray(read_mask(tmp_path / "mask.png")) == expected).all()

    def test_colours_count_by_their_lightness_and_transparent_parts_are_black(self, tmp_path):
        rgba = picture(WIDTH, HEIGHT).convert("RGBA")
        rgba.putalpha(Image.fromarray(mask()))
        rgba.save(tmp_path / "mask.png")
        expected = np.asarray(picture(WIDTH, HEIGHT).convert("L")) * (mask() / 255)
        for result in (read_mask(tmp_path / "mask.png"), as_mask(rgba)):
            assert np.abs(np.asarray(result) - expected).max() <= 1

    @pytest.mark.parametrize("bad", [np.zeros((4, 4)), np.zeros((4, 4, 3), np.uint8), Image.new("F", (4, 4))])
    def test_others_are_refused(self, bad):
        with pytest.raises(ValueError, match="mask of"):
            as_mask(bad)

    def test_a_missing_file_is_refused(self):
        with pytest.raises(InputError, match=r"gone\.png: no such file"):
            MaskedPainter([(Flat(0.5), "gone.png")])


def test_a_masked_painter_takes_what_an_engine_takes(tmp_path):
    masked = MaskedPainter([(Flat(0.5), mask())])
    expected = pixels(masked(PHOTO.rgb))
    PHOTO.rgb.save(tmp_path / "photo.png")
    for image in (np.asarray(PHOTO.rgb), torch.from_numpy(np.array(PHOTO.rgb)), tmp_path / "photo.png"):
        assert (np.asarray(masked(image)) == expected).all()
    for bad in (torch.rand(1, 3, 20, 20), np.zeros((2, 20, 20, 3), np.uint8)):
        with pytest.raises(ValueError, match="expected one image of uint8 levels"):
            masked(bad)
    for layers in ([], [(freeze(fastperc.SuperResolutionNet(4, width=4)), mask())]):
        with pytest.raises(ValueError, match="a painter that keeps the size"):
            MaskedPainter(layers)


def test_memory_stays_flat():
    """With two masks, a large picture in tiles takes a few bytes a pixel: levels, not floats."""
    code = (
        "import resource, sys; sys.path.insert(0, 'tests'); from test_masks import *\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "gray = Image.fromarray(mask())\n"
        "def paint(side):\n"
        "    masked = MaskedPainter([(Flat(level, 512), gray) for level in (0.2, 0.5)])\n"
        "    masked(torch.zeros(side, side, 3, dtype=torch.uint8)); return peak()\n"
        "paint(1000); before = paint(1500); print((paint(4000) - before) / (4000**2 - 1500**2))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    image, canvas, painting, masks, resize = 3, 3, 3, 2, 1
    assert float(done.stdout) <= image + canvas + painting + masks + resize + 3


class TestCommand:
    @pytest.fixture
    def files(self, here):
        Image.fromarray(mask(0, (32, 24))).save("a.png")
        Image.fromarray(mask(1, (32, 24))).save("b.png")
        Image.new("L", (5, 4), 255).save("white.png")
        Image.new("L", (5, 4), 0).save("black.png")
        return here

    def read(self, name):
        return pixels(read_image(name).rgb)

    def test_white_and_black(self, run, files, model):
        assert run("stylize", "photo.png", "--model", model, "-o", "plain.png") == (0, "", "")
        assert run("stylize", "photo.png", "--model", model, "--mask", "white.png") == (0, "", "")
        assert run("stylize", "photo.png", "--model", model, "--mask", "black.png", "-o", "same.png") == (0, "", "")
        assert Path("photo-wave.png").read_bytes() == Path("plain.png").read_bytes()
        assert (self.read("same.png") == self.read("photo.png")).all()

    def test_several_networks_in_the_order_given(self, run, files, model):
        networks = "--mask", "a.png", "--style", "great_wave", "--model", model, "--mask", "b.png"
        assert run("stylize", "photo.png", *networks, "--strength", 0.5, "--size", 48).status == 0
        engines = [freeze(fastperc.load(name)) for name in ("great_wave", model)]
        expected = MaskedPainter(list(zip(engines, ["a.png", "b.png"])))(read_image("photo.png").resized(48).rgb, 0.5)
        assert (self.read("photo-great_wave-wave.png") == pixels(expected)).all()

    def test_a_folder(self, run, files, model):
        Path("photos").mkdir()
        picture(40, 30).save("photos/wide.png")
        picture(30, 40).save("photos/high.png")
        assert run("stylize", "photos", "-o", "out", "--model", model, "--mask", "black.png").status == 0
        for name in ("wide.png", "high.png"):
            assert (self.read(f"out/{name}") == self.read(f"photos/{name}")).all()

    def test_a_clip(self, run, files, model):
        first, *others = (picture(64, 48, seed) for seed in range(4))
        first.save("clip.png", save_all=True, append_images=others, duration=40)
        black_left = np.zeros((48, 64), np.uint8)
        black_left[:, 32:] = 255
        Image.fromarray(black_left).save("right.png")
        for name, options in {"plain": ("--mask", "black.png"), "half": ("--mask", "right.png")}.items():
            assert run("stylize", "clip.png", "--frames-dir", name, "--model", model, *options).status == 0
        frames = sorted(path.name for path in Path("plain").iterdir())
        assert len(frames) == 4
        for frame in frames:
            plain, half = self.read(f"plain/{frame}"), self.read(f"half/{frame}")
            assert (plain[:, :32] == half[:, :32]).all() and (plain[:, 32:] != half[:, 32:]).mean() > 0.5

    @pytest.mark.parametrize(
        ("name", "says"),
        [("gone.png", "gone.png: no such file"), ("text.png", "text.png: not an image"), (".", "is a folder")],
    )
    def test_bad_masks(self, refused, files, model, name, says):
        Path("text.png").write_text("no image")
        refused("stylize", "photo.png", "-o", "new/out.png", "--model", model, "--mask", name, says=says)

    def test_a_mask_is_not_overwritten(self, refused, files, model):
        refused("stylize", "photo.png", "-o", "a.png", "--model", model, "--mask", "a.png", says="overwrite an input")
