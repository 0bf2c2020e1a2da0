"""Photographs in and pictures out: what every kind of file becomes, and what survives the way through."""

from __future__ import annotations

import errno
import os
import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
import torch
from conftest import picture, pixels
from PIL import Image, ImageCms

from fastperc import InputError
from fastperc.photos.photo import (
    ALPHA_FORMATS,
    SUFFIXES,
    Photo,
    contact_sheet,
    find_images,
    read_image,
    to_image,
    write_image,
)

MAKE, ORIENTATION, EXIF_IFD, DATE, GPS_IFD = 0x010F, 0x0112, 0x8769, 0x9003, 0x8825
CAMERA = {MAKE: "Maker", EXIF_IFD: {DATE: "2020:01:02 03:04:05"}, GPS_IFD: {1: "N"}}
RAMP = np.arange(600).reshape(20, 30)


def exif(**more):
    tags = Image.Exif()
    for tag, value in (CAMERA | {int(key[1:]): value for key, value in more.items()}).items():
        tags[tag] = value
    return tags.tobytes()


def through(image, path, **options):
    """``image``, saved by Pillow under ``path``, as fastperc reads it."""
    image.save(path, **options)
    return read_image(path)


def icc_profile(space, pcs, **tags):
    """An ICC profile, for which Pillow has no writer."""
    tags["wtpt"] = struct.pack(">4s4x3I", b"XYZ ", 0xF6D6, 0x10000, 0xD32D)
    table, body, start = b"", b"", 132 + 12 * len(tags)
    for name, data in tags.items():
        table += struct.pack(">4sII", name.encode(), start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    kind = b"prtr" if space == b"CMYK" else b"mntr"
    head = struct.pack(">I4sI4s4s4s12x4s28x3I", start + len(body), b"lcms", 0x02100000, kind, space, pcs, b"acsp",
                       0xF6D6, 0x10000, 0xD32D)  # fmt: skip
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
LINEAR_GRAY = icc_profile(b"GRAY", b"XYZ ", kTRC=struct.pack(">4s4xI", b"curv", 0))
# Lightness 78 without black ink and 0 with it, whatever the other inks.
BLACK_INK = icc_profile(
    b"CMYK",
    b"Lab ",
    A2B0=struct.pack(">4s4x4B9i", b"mft1", 4, 3, 2, 0, *(65536, 0, 0), *(0, 65536, 0), *(0, 0, 65536))
    + bytes(range(256)) * 4
    + bytes([200, 128, 128, 0, 128, 128] * 8)
    + bytes(range(256)) * 3,
)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_and_its_tag_dropped(tmp_path, orientation, suffix):
    stored = Image.new("RGB", (32, 16), "black")
    stored.paste("white", (0, 0, 16, 8))  # the corner that tells
    # Where EXIF says that the stored top left corner is shown.
    corner = {1: "tl", 2: "tr", 3: "br", 4: "bl", 5: "tl", 6: "tr", 7: "br", 8: "bl"}[orientation]
    photo = through(stored, tmp_path / f"in{suffix}", exif=exif(_274=orientation))
    width, height = photo.rgb.size
    assert (width, height) == ((32, 16) if orientation < 5 else (16, 32))
    x, y = {"t": 4, "b": height - 5}[corner[0]], {"l": 4, "r": width - 5}[corner[1]]
    bright = pixels(photo.rgb.convert("L")) > 128
    assert bright[x, y] and abs(bright.mean() - 0.25) < 0.02

    write_image(tmp_path / f"out{suffix}", photo)
    assert ORIENTATION not in Image.open(tmp_path / f"out{suffix}").getexif()


@pytest.mark.parametrize("target", [".jpg", ".png", ".webp", ".tif"])
@pytest.mark.parametrize("source", [".jpg", ".png", ".webp", ".tif"])
def test_other_exif_survives(tmp_path, source, target):
    photo = through(picture(32, 24), tmp_path / f"in{source}", exif=exif(_274=6))
    write_image(tmp_path / f"out{target}", photo.resized(16))
    with Image.open(tmp_path / f"out{target}") as written:
        tags = written.getexif()
        assert tags[MAKE] == "Maker"
        assert tags.get_ifd(EXIF_IFD)[DATE] == "2020:01:02 03:04:05"
        assert tags.get_ifd(GPS_IFD)[1] == "N"
        assert tags.get(256, 12) == 12, "a TIFF's own width is not that of the picture"


@pytest.mark.parametrize("damage", ["no tags", "cut short", "text as a fraction"])
def test_damaged_exif_does_not_cost_the_picture(tmp_path, damage):
    tags = {
        "no tags": b"Exif\0\0no tags at all",
        "cut short": exif(_274=6)[:-9],
        "text as a fraction": exif(_274=6).replace(b"\x01\x0f\0\2", b"\x01\x0f\0\5"),
    }[damage]
    assert tags != exif(_274=6)
    photo = through(picture(32, 24), tmp_path / "in.png", exif=tags)
    upright = picture(32, 24) if damage == "no tags" else picture(32, 24).transpose(Image.Transpose.ROTATE_270)
    assert (pixels(photo.rgb) == pixels(upright)).all()
    write_image(tmp_path / "out.jpg", photo)


def test_exif_too_long_for_jpeg_is_left_out(tmp_path):
    photo = through(picture(32, 24), tmp_path / "in.png", exif=exif(_270="x" * 70_000))
    write_image(tmp_path / "out.jpg", photo)
    assert len(photo.metadata["exif"]) > 70_000
    assert not Image.open(tmp_path / "out.jpg").getexif()


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif", ".jp2", ".tga"])
def test_alpha_is_kept(tmp_path, suffix):
    image, alpha = picture(32, 24), picture(32, 24, seed=1).getchannel("R")
    image.putalpha(alpha)
    write_image(tmp_path / f"out{suffix}", through(image, tmp_path / "in.png"))
    with Image.open(tmp_path / f"out{suffix}") as written:
        assert (pixels(written.convert("RGBA").getchannel("A")) == pixels(alpha)).all()


@pytest.mark.parametrize("suffix", [".jpg", ".bmp", ".ppm"])
def test_alpha_is_shown_on_white_where_there_is_none(tmp_path, suffix):
    photo = Photo(Image.new("RGB", (32, 32), (200, 0, 0)), Image.new("L", (32, 32), 0))
    photo.alpha.paste(255, (0, 0, 16, 32))
    write_image(tmp_path / f"out{suffix}", photo)
    written = pixels(read_image(tmp_path / f"out{suffix}").rgb)
    assert np.abs(written[:, :8] - (200, 0, 0)).max() <= 4
    assert written[:, 24:].min() >= 251


def test_grayscale(tmp_path):
    gray = picture(32, 24).convert("L")
    photo = through(gray, tmp_path / "in.png")
    assert (pixels(photo.rgb) == pixels(gray)[..., None]).all() and photo.alpha is None


def test_grayscale_with_alpha(tmp_path):
    image = picture(32, 24).convert("LA")
    image.putalpha(picture(32, 24, seed=1).getchannel("G"))
    photo = through(image, tmp_path / "in.png")
    assert (pixels(photo.rgb) == pixels(image)[..., :1]).all()
    assert (pixels(photo.alpha) == pixels(image)[..., 1]).all()


def test_palette(tmp_path):
    image = picture(32, 24).convert("P", palette=Image.Palette.ADAPTIVE)
    photo = through(image, tmp_path / "in.png")
    assert (pixels(photo.rgb) == pixels(image.convert("RGB"))).all() and photo.alpha is None


@pytest.mark.parametrize("suffix", [".png", ".gif"])
def test_palette_with_a_transparent_color(tmp_path, suffix):
    image = Image.new("P", (32, 24), 1)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.paste(0, (0, 0, 16, 24))
    photo = through(image, tmp_path / f"in{suffix}", transparency=0)
    assert (pixels(photo.alpha)[:, :16] == 0).all() and (pixels(photo.alpha)[:, 16:] == 255).all()
    assert (pixels(photo.rgb)[:, 16:] == (200, 100, 50)).all()


def test_palette_with_half_transparent_colors(tmp_path):
    image = Image.new("P", (32, 24), 1)
    image.putpalette([10, 20, 30, 200, 100, 50])
    photo = through(image, tmp_path / "in.png", transparency=bytes([0, 128]))
    assert (pixels(photo.alpha) == 128).all()


def test_one_bit(tmp_path):
    image = picture(32, 24).convert("1")
    photo = through(image, tmp_path / "in.png")
    assert (pixels(photo.rgb) == 255 * pixels(image)[..., None]).all()
    assert set(np.unique(pixels(photo.rgb))) == {0, 255}


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bit_grayscale_keeps_its_range(tmp_path, suffix):
    values = (RAMP * 109).astype(np.uint16)  # 0 … 65291
    photo = through(Image.fromarray(values), tmp_path / f"in{suffix}")
    assert Image.open(tmp_path / f"in{suffix}").mode.startswith("I")
    assert (pixels(photo.rgb) == np.round(values / 257)[..., None]).all()


def png_of_sixteen_bits(pixels, color_type, transparent=b""):
    """A PNG by hand: Pillow writes no 16-bit RGB. ``pixels`` are [H, W, C]."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    head = chunk(b"IHDR", struct.pack(">2I5B", width, height, 16, color_type, 0, 0, 0))
    transparent = transparent and chunk(b"tRNS", transparent)
    return b"\x89PNG\r\n\x1a\n" + head + transparent + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


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
    photo = through(cmyk, tmp_path / "in.jpg", quality=95)
    assert np.abs(pixels(photo.rgb) - (255, 0, 0)).max() <= 4


@pytest.mark.parametrize("top", [1.0, 255.0])
def test_floating_point_tiff(tmp_path, top):
    values = np.linspace(0, top, 600, dtype=np.float32).reshape(20, 30)
    photo = through(Image.fromarray(values), tmp_path / "in.tif")
    assert np.abs(pixels(photo.rgb) - values[..., None] / top * 255).max() <= 0.5


def test_floating_point_extremes(tmp_path):
    values = np.full((20, 30), 100, np.float32)
    values[0, :4] = np.nan, np.inf, -np.inf, -5
    photo = through(Image.fromarray(values), tmp_path / "in.tif")
    assert pixels(photo.rgb)[0, :5, 0].tolist() == [0, 255, 0, 0, 100]


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_an_rgb_profile_is_kept(tmp_path, mode, suffix):
    photo = through(picture(32, 24).convert(mode), tmp_path / "in.png", icc_profile=SRGB)
    assert (pixels(photo.rgb) == pixels(picture(32, 24).convert(mode).convert("RGB"))).all()
    write_image(tmp_path / f"out{suffix}", photo)
    assert Image.open(tmp_path / f"out{suffix}").info["icc_profile"] == SRGB


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_a_gray_profile_is_converted_to_srgb(tmp_path, mode):
    image = Image.new("L", (32, 24), 128).convert(mode.replace("I;16", "L"))
    if mode == "I;16":
        image = Image.fromarray(np.full((24, 32), 128 * 257, np.uint16))
    photo = through(image, tmp_path / "in.png", icc_profile=LINEAR_GRAY)
    assert (pixels(photo.rgb) == 188).all()  # linear 0.502 in sRGB
    assert "icc_profile" not in photo.metadata


def test_a_cmyk_profile_is_converted_to_srgb(tmp_path):
    image = Image.new("CMYK", (32, 24), (10, 200, 30, 0))
    photo = through(image, tmp_path / "in.tif", icc_profile=BLACK_INK)
    assert (pixels(photo.rgb) == 194).all()  # L* 78.4
    assert "icc_profile" not in photo.metadata


@pytest.mark.parametrize("profile", [b"nonsense", LINEAR_GRAY, LINEAR_GRAY[:140]], ids=["nonsense", "gray", "cut"])
def test_a_profile_that_does_not_fit_is_dropped(tmp_path, profile):
    photo = through(picture(32, 24), tmp_path / "in.png", icc_profile=profile)
    assert (pixels(photo.rgb) == pixels(picture(32, 24))).all()
    assert "icc_profile" not in photo.metadata


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".bmp"])
def test_dpi_is_kept(tmp_path, suffix):
    photo = through(picture(32, 24), tmp_path / "in.png", dpi=(300, 150))
    write_image(tmp_path / f"out{suffix}", photo)
    assert Image.open(tmp_path / f"out{suffix}").info["dpi"] == pytest.approx((300, 150), abs=0.1)


@pytest.mark.parametrize("dpi", [1e6, 0])
def test_an_absurd_dpi_is_dropped(tmp_path, dpi):
    photo = through(picture(32, 24), tmp_path / "in.png", dpi=(dpi, dpi))
    assert "dpi" in Image.open(tmp_path / "in.png").info and photo.metadata == {}


def test_a_tiff_without_dpi_has_none(tmp_path):
    assert through(picture(32, 24), tmp_path / "in.tif").metadata == {}


@pytest.mark.parametrize("suffix", sorted(SUFFIXES))
def test_every_writable_suffix_round_trips(tmp_path, suffix):
    photo = Photo(picture(48, 32), metadata={"dpi": (300.0, 300.0), "exif": exif(), "icc_profile": SRGB})
    write_image(tmp_path / f"out{suffix.upper()}", photo)
    written = read_image(tmp_path / f"out{suffix.upper()}").rgb
    assert written.size == (48, 32)
    if Image.registered_extensions()[suffix] in ("JPEG", "WEBP", "AVIF"):  # WebP halves the resolution of colour
        assert np.abs(pixels(written.convert("L")) - pixels(photo.rgb.convert("L"))).mean() < 2.5
    else:
        assert (pixels(written) == pixels(photo.rgb)).all()


def test_formats():
    assert {".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp"} <= SUFFIXES
    assert not {".gif", ".pdf", ".eps", ".ico", ".h5", ".txt", ""} & SUFFIXES
    assert "JPEG" not in ALPHA_FORMATS


@pytest.mark.parametrize("name", ["out", "out.gif", "out.txt", "out.png.", "out.h5"])
def test_an_unwritable_suffix_is_refused(tmp_path, name):
    with pytest.raises(InputError, match="no image format"):
        write_image(tmp_path / name, Photo(picture(32, 24)))
    assert not list(tmp_path.iterdir())


def test_a_picture_too_large_for_its_format_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"out\.webp: cannot be written as WEBP"):
        write_image(tmp_path / "out.webp", Photo(Image.new("RGB", (16_400, 16))))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("existing", [False, True], ids=["new", "existing"])
@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr)
def test_a_failed_write_leaves_no_trace(tmp_path, monkeypatch, failure, existing):
    target = tmp_path / "out.png"
    if existing:
        target.write_bytes(b"what was there")

    def save(self, path, *args, **options):
        path.write_bytes(b"half of a")
        raise failure

    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(type(failure)) as caught:
        write_image(target, Photo(picture(32, 24)))
    if isinstance(failure, OSError):
        assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(target))
    assert list(tmp_path.iterdir()) == ([target] if existing else [])
    assert not existing or target.read_bytes() == b"what was there"


def test_writing_follows_a_link_and_makes_folders(tmp_path):
    (tmp_path / "link.png").symlink_to(tmp_path / "new" / "folder" / "real.png")
    write_image(tmp_path / "link.png", Photo(picture(32, 24)))
    assert (tmp_path / "link.png").is_symlink()
    assert read_image(tmp_path / "new" / "folder" / "real.png").rgb.size == (32, 24)


def test_a_name_as_long_as_names_can_be(tmp_path):
    path = tmp_path / ("é" * 125 + ".png")  # 254 of 255 bytes
    write_image(path, Photo(picture(32, 24)))
    assert read_image(path).rgb.size == (32, 24)


def test_to_image_clamps_and_rounds_to_nearest():
    levels = torch.tensor([-3.0, -0.001, 0.0, 0.49, 0.51, 1.0, 127.4, 127.6, 254.51, 255.0, 300.0]) / 255
    image = to_image(levels.expand(3, 2, -1))
    assert (image.mode, image.size) == ("RGB", (11, 2))
    assert pixels(image)[0, :, 0].tolist() == [0, 0, 0, 0, 1, 1, 127, 128, 255, 255, 255]


def test_tensor_and_back_is_exact():
    photo = Photo(Image.fromarray(np.arange(768, dtype=np.uint8).reshape(16, 16, 3)))
    x = photo.tensor()
    assert (x.shape, x.dtype) == ((1, 3, 16, 16), torch.float32) and x.max() == 1
    assert (pixels(to_image(x[0])) == pixels(photo.rgb)).all()


@pytest.mark.parametrize(("size", "long_side", "expected"), [((64, 32), 16, (16, 8)), ((3, 500), 50, (1, 50))], ids=str)
def test_resized(size, long_side, expected):
    photo = Photo(picture(*size), picture(*size).getchannel("R"), {"dpi": (72, 72)}).resized(long_side)
    assert photo.rgb.size == photo.alpha.size == expected
    assert photo.metadata == {"dpi": (72, 72)}


def test_resizing_beyond_memory_is_refused():
    with pytest.raises(InputError, match="1000000×500000 is larger than"):
        Photo(picture(64, 32)).resized(1_000_000)


def test_find_images(tmp_path):
    names = ["b.JPG", "a.png", "nested/deep/c.webp", "nested/d.gif", "Z.tif"]
    for name in [*names, ".hidden.png", ".cache/e.png", "nested/.f.png", "notes.txt", "paper.pdf", "film.mpg", "jpg"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert find_images(tmp_path) == sorted(tmp_path / name for name in names)


def test_find_images_follows_links_but_not_in_circles(tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    (tmp_path / "here" / "a.png").touch()
    (tmp_path / "there" / "b.png").touch()
    (tmp_path / "here" / "back").symlink_to(tmp_path / "here")
    (tmp_path / "here" / "over").symlink_to(tmp_path / "there")
    (tmp_path / "there" / "again").symlink_to(tmp_path / "here")
    (tmp_path / "here" / "itself").symlink_to(tmp_path / "here" / "itself")
    assert find_images(tmp_path / "here") == [tmp_path / "here" / "a.png", tmp_path / "here" / "over" / "b.png"]


@pytest.mark.parametrize("name", ["missing", "empty", "file.txt", "only-hidden"])
def test_find_images_refuses_a_folder_without_any(tmp_path, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").touch()
    (tmp_path / "only-hidden").mkdir()
    (tmp_path / "only-hidden" / ".a.png").touch()
    with pytest.raises(InputError, match=name):
        find_images(tmp_path / name)


def test_contact_sheet():
    rows = [torch.zeros(3, 3, 16, 20), torch.full((3, 3, 16, 20), 0.5)]
    sheet = pixels(contact_sheet(rows, gap=4))
    assert sheet.shape == (16 + 4 + 16, 20 + 4 + 20 + 4 + 20, 3)
    assert (sheet[:16, :20] == 0).all() and (sheet[16:20] == 255).all() and (sheet[:, 20:24] == 255).all()
    assert (sheet[20:, 24:44] == 128).all()


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
def test_what_is_no_file_is_refused(tmp_path, kind, reason):
    (tmp_path / "folder").mkdir()
    (tmp_path / "in").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match=f"{kind}: .*{reason}"):
        read_image(tmp_path / kind)


@pytest.mark.filterwarnings("error")
def test_a_decompression_bomb_is_refused_and_a_large_image_is_not_warned_of(tmp_path, monkeypatch):
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
