"""Reading photos: what image files of every kind become, and which files are refused."""

from __future__ import annotations

import os
import struct
from io import BytesIO

import numpy as np
import pytest
from photo_files import BLACK_INK, LINEAR_GRAY, ORIENTATION, exif, png_of_sixteen_bits, save_and_read
from pictures import picture, pixels
from PIL import Image

from fastperc import InputError
from fastperc.photos.photo import read_image, write_image

RAMP = np.arange(600).reshape(20, 30)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_and_its_tag_dropped(tmp_path, orientation, suffix):
    stored = Image.new("RGB", (32, 16), "black")
    stored.paste("white", (0, 0, 16, 8))  # so that the top left corner is bright
    # The corner of the picture in which EXIF shows the stored top left corner.
    corner = {1: "tl", 2: "tr", 3: "br", 4: "bl", 5: "tl", 6: "tr", 7: "br", 8: "bl"}[orientation]
    photo = save_and_read(stored, tmp_path / f"in{suffix}", exif=exif(_274=orientation))
    width, height = photo.rgb.size
    assert (width, height) == ((32, 16) if orientation < 5 else (16, 32))
    x, y = {"t": 4, "b": height - 5}[corner[0]], {"l": 4, "r": width - 5}[corner[1]]
    bright = pixels(photo.rgb.convert("L")) > 128
    assert bright[x, y] and abs(bright.mean() - 0.25) < 0.02

    write_image(tmp_path / f"out{suffix}", photo)
    assert ORIENTATION not in Image.open(tmp_path / f"out{suffix}").getexif()


@pytest.mark.parametrize("damage", ["no tags", "cut short", "text as a fraction"])
def test_an_image_with_damaged_exif_is_read(tmp_path, damage):
    tags = {
        "no tags": b"Exif\0\0no tags at all",
        "cut short": exif(_274=6)[:-9],
        "text as a fraction": exif(_274=6).replace(b"\x01\x0f\0\2", b"\x01\x0f\0\5"),
    }[damage]
    assert tags != exif(_274=6)
    photo = save_and_read(picture(32, 24), tmp_path / "in.png", exif=tags)
    upright = picture(32, 24) if damage == "no tags" else picture(32, 24).transpose(Image.Transpose.ROTATE_270)
    assert (pixels(photo.rgb) == pixels(upright)).all()
    write_image(tmp_path / "out.jpg", photo)


def test_grayscale(tmp_path):
    gray = picture(32, 24).convert("L")
    photo = save_and_read(gray, tmp_path / "in.png")
    assert (pixels(photo.rgb) == pixels(gray)[..., None]).all() and photo.alpha is None


def test_grayscale_with_alpha(tmp_path):
    image = picture(32, 24).convert("LA")
    image.putalpha(picture(32, 24, seed=1).getchannel("G"))
    photo = save_and_read(image, tmp_path / "in.png")
    assert (pixels(photo.rgb) == pixels(image)[..., :1]).all()
    assert (pixels(photo.alpha) == pixels(image)[..., 1]).all()


def test_palette(tmp_path):
    image = picture(32, 24).convert("P", palette=Image.Palette.ADAPTIVE)
    photo = save_and_read(image, tmp_path / "in.png")
    assert (pixels(photo.rgb) == pixels(image.convert("RGB"))).all() and photo.alpha is None


@pytest.mark.parametrize("suffix", [".png", ".gif"])
def test_palette_with_a_transparent_color(tmp_path, suffix):
    image = Image.new("P", (32, 24), 1)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.paste(0, (0, 0, 16, 24))
    photo = save_and_read(image, tmp_path / f"in{suffix}", transparency=0)
    assert (pixels(photo.alpha)[:, :16] == 0).all() and (pixels(photo.alpha)[:, 16:] == 255).all()
    assert (pixels(photo.rgb)[:, 16:] == (200, 100, 50)).all()


def test_palette_with_half_transparent_colors(tmp_path):
    image = Image.new("P", (32, 24), 1)
    image.putpalette([10, 20, 30, 200, 100, 50])
    photo = save_and_read(image, tmp_path / "in.png", transparency=bytes([0, 128]))
    assert (pixels(photo.alpha) == 128).all()


def test_one_bit(tmp_path):
    image = picture(32, 24).convert("1")
    photo = save_and_read(image, tmp_path / "in.png")
    assert (pixels(photo.rgb) == 255 * pixels(image)[..., None]).all()
    assert set(np.unique(pixels(photo.rgb))) == {0, 255}


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bit_grayscale_keeps_its_range(tmp_path, suffix):
    values = (RAMP * 109).astype(np.uint16)  # 0 … 65291
    photo = save_and_read(Image.fromarray(values), tmp_path / f"in{suffix}")
    assert Image.open(tmp_path / f"in{suffix}").mode.startswith("I")
    assert (pixels(photo.rgb) == np.round(values / 257)[..., None]).all()


def test_sixteen_bit_grayscale_with_a_transparent_level(tmp_path):
    values = RAMP * 109
    (tmp_path / "in.png").write_bytes(png_of_sixteen_bits(values[..., None], 0, struct.pack(">H", 1090)))
    photo = read_image(tmp_path / "in.png")
    assert (pixels(photo.alpha) == np.where(values == 1090, 0, 255)).all()
    assert pixels(photo.rgb).max() == 254


def test_sixteen_bit_rgb(tmp_path):
    values = np.stack([RAMP * 109, 65535 - RAMP * 109, np.full((20, 30), 257 * 40)], axis=2)
    (tmp_path / "in.png").write_bytes(png_of_sixteen_bits(values, 2))
    assert np.abs(pixels(read_image(tmp_path / "in.png").rgb) - values / 257).max() <= 1


def test_cmyk_jpeg(tmp_path):
    cmyk = Image.merge("CMYK", [Image.new("L", (32, 24), ink) for ink in (0, 255, 255, 0)])
    photo = save_and_read(cmyk, tmp_path / "in.jpg", quality=95)
    assert np.abs(pixels(photo.rgb) - (255, 0, 0)).max() <= 4


@pytest.mark.parametrize("top", [1.0, 255.0])
def test_floating_point_tiff(tmp_path, top):
    values = np.linspace(0, top, 600, dtype=np.float32).reshape(20, 30)
    photo = save_and_read(Image.fromarray(values), tmp_path / "in.tif")
    assert np.abs(pixels(photo.rgb) - values[..., None] / top * 255).max() <= 0.5


def test_floating_point_extremes(tmp_path):
    values = np.full((20, 30), 100, np.float32)
    values[0, :4] = np.nan, np.inf, -np.inf, -5
    photo = save_and_read(Image.fromarray(values), tmp_path / "in.tif")
    assert pixels(photo.rgb)[0, :5, 0].tolist() == [0, 255, 0, 0, 100]


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_a_gray_profile_is_converted_to_srgb(tmp_path, mode):
    image = Image.new("L", (32, 24), 128).convert(mode.replace("I;16", "L"))
    if mode == "I;16":
        image = Image.fromarray(np.full((24, 32), 128 * 257, np.uint16))
    photo = save_and_read(image, tmp_path / "in.png", icc_profile=LINEAR_GRAY)
    assert (pixels(photo.rgb) == 188).all()  # linear 0.502 in sRGB
    assert "icc_profile" not in photo.metadata


def test_a_cmyk_profile_is_converted_to_srgb(tmp_path):
    image = Image.new("CMYK", (32, 24), (10, 200, 30, 0))
    photo = save_and_read(image, tmp_path / "in.tif", icc_profile=BLACK_INK)
    assert (pixels(photo.rgb) == 194).all()  # L* 78.4
    assert "icc_profile" not in photo.metadata


@pytest.mark.parametrize("profile", [b"nonsense", LINEAR_GRAY, LINEAR_GRAY[:140]], ids=["nonsense", "gray", "cut"])
def test_a_profile_that_does_not_fit_is_dropped(tmp_path, profile):
    photo = save_and_read(picture(32, 24), tmp_path / "in.png", icc_profile=profile)
    assert (pixels(photo.rgb) == pixels(picture(32, 24))).all()
    assert "icc_profile" not in photo.metadata


@pytest.mark.parametrize("dpi", [1e6, 0])
def test_an_absurd_dpi_is_dropped(tmp_path, dpi):
    photo = save_and_read(picture(32, 24), tmp_path / "in.png", dpi=(dpi, dpi))
    assert "dpi" in Image.open(tmp_path / "in.png").info and photo.metadata == {}


def test_a_tiff_without_dpi_has_none(tmp_path):
    assert save_and_read(picture(32, 24), tmp_path / "in.tif").metadata == {}


def encoded(kind):
    buffer = BytesIO()
    picture(32, 24).save(buffer, kind)
    return buffer.getvalue()


BAD_FILES = {
    "empty": b"",
    "text": b"not an image",
    "truncated.jpg": encoded("JPEG")[:-60],
    "truncated.png": encoded("PNG")[:-60],
    "header-only.png": encoded("PNG")[:40],
    "truncated.webp": encoded("WEBP")[:-60],
    "truncated.gif": encoded("GIF")[:-60],
    "truncated.tif": encoded("TIFF")[:-60],
    "truncated.bmp": encoded("BMP")[:-60],
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_damaged_file_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(BAD_FILES[name])
    with pytest.raises(InputError, match=f"{name}: (not an image|damaged or cut short)"):
        read_image(tmp_path / name)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("missing", "no such file"), ("folder", "is a folder"), ("dangling", "no such file"), ("pipe", "a device"),
     ("circle", "cannot be read"), ("in/a/file", "cannot be read")],
)  # fmt: skip
def test_a_path_that_is_not_an_ordinary_file_is_refused(tmp_path, kind, reason):
    (tmp_path / "folder").mkdir()
    (tmp_path / "in").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match=f"{kind}: .*{reason}"):
        read_image(tmp_path / kind)


@pytest.mark.filterwarnings("error")
def test_a_decompression_bomb_is_refused_and_a_large_image_gives_no_warning(tmp_path, monkeypatch):
    picture(64, 48).save(tmp_path / "in.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 48 // 2 + 1)
    assert read_image(tmp_path / "in.png").rgb.size == (64, 48)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 48 // 2 - 1)
    with pytest.raises(InputError, match="larger than"):
        read_image(tmp_path / "in.png")


def test_an_animation_gives_its_first_frame(tmp_path):
    first, second = picture(32, 24, seed=1), picture(32, 24, seed=2)
    for suffix in ("gif", "png", "webp"):
        options = {"lossless": True} if suffix == "webp" else {}
        first.save(tmp_path / f"in.{suffix}", save_all=True, append_images=[second], **options)
        difference = np.abs(pixels(read_image(tmp_path / f"in.{suffix}").rgb) - pixels(first))
        assert difference.mean() < (12 if suffix == "gif" else 1e-9)


def fits(values, **cards):
    """The bytes of a FITS file with ``values`` [H, W]."""
    height, width = values.shape
    header = dict(SIMPLE="T", BITPIX=8 * values.itemsize, NAXIS=2, NAXIS1=width, NAXIS2=height) | cards
    text = "".join(f"{name:8}= {value:>20}".ljust(80) for name, value in header.items()) + "END"
    return text.ljust(2880).encode() + values.astype(values.dtype.newbyteorder(">")).tobytes().ljust(2880, b"\0")


def test_fits_is_refused_unless_it_has_eight_bits(tmp_path):
    (tmp_path / "in.fits").write_bytes(fits((RAMP % 256).astype(np.uint8)))
    assert read_image(tmp_path / "in.fits").rgb.size == (30, 20)
    (tmp_path / "in.fits").write_bytes(fits(RAMP.astype(np.int16), BZERO=32768))
    with pytest.raises(InputError, match=r"in\.fits: a FITS file, whose scale Pillow does not read"):
        read_image(tmp_path / "in.fits")


@pytest.mark.parametrize("top", [1023, 65535])
def test_netpbm_of_sixteen_bits(tmp_path, top):
    values = (RAMP / 599 * top).round().astype(">u2")
    (tmp_path / "in.pgm").write_bytes(b"P5 30 20 %d\n" % top + values.tobytes())
    assert np.abs(pixels(read_image(tmp_path / "in.pgm").rgb)[..., 0] - RAMP / 599 * 255).max() <= 1


@pytest.mark.parametrize("top", [1, 255, 65535])
def test_portable_float_maps(tmp_path, top):
    values = (RAMP / 599 * top).astype("<f4")
    (tmp_path / "in.pfm").write_bytes(b"Pf\n30 20\n-1.0\n" + values[::-1].tobytes())
    assert np.abs(pixels(read_image(tmp_path / "in.pfm").rgb)[..., 0] - RAMP / 599 * 255).max() <= 1


def test_jpeg_2000_of_sixteen_bits(tmp_path):
    values = (RAMP * 109).astype(np.uint16)
    photo = save_and_read(Image.fromarray(values), tmp_path / "in.jp2")
    assert np.abs(pixels(photo.rgb)[..., 0] - values / 257).max() <= 1
