"""Writing photos: what each format keeps of alpha, metadata and profiles, and what happens when a write fails."""

from __future__ import annotations

import errno

import numpy as np
import pytest
from photo_files import DATE, EXIF_IFD, GPS_IFD, MAKE, SRGB, exif, save_and_read
from pictures import picture, pixels
from PIL import Image

from fastperc import InputError
from fastperc.photos.photo import ALPHA_FORMATS, SUFFIXES, Photo, read_image, write_image


@pytest.mark.parametrize("target", [".jpg", ".png", ".webp", ".tif"])
@pytest.mark.parametrize("source", [".jpg", ".png", ".webp", ".tif"])
def test_other_exif_survives(tmp_path, source, target):
    photo = save_and_read(picture(32, 24), tmp_path / f"in{source}", exif=exif(_274=6))
    write_image(tmp_path / f"out{target}", photo.resized(16))
    with Image.open(tmp_path / f"out{target}") as written:
        tags = written.getexif()
        assert tags[MAKE] == "Maker"
        assert tags.get_ifd(EXIF_IFD)[DATE] == "2020:01:02 03:04:05"
        assert tags.get_ifd(GPS_IFD)[1] == "N"
        assert tags.get(256, 12) == 12, "a TIFF's own width is not that of the picture"


def test_exif_too_long_for_jpeg_is_left_out(tmp_path):
    photo = save_and_read(picture(32, 24), tmp_path / "in.png", exif=exif(_270="x" * 70_000))
    write_image(tmp_path / "out.jpg", photo)
    assert len(photo.metadata["exif"]) > 70_000
    assert not Image.open(tmp_path / "out.jpg").getexif()


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif", ".jp2", ".tga"])
def test_alpha_is_kept(tmp_path, suffix):
    image, alpha = picture(32, 24), picture(32, 24, seed=1).getchannel("R")
    image.putalpha(alpha)
    write_image(tmp_path / f"out{suffix}", save_and_read(image, tmp_path / "in.png"))
    with Image.open(tmp_path / f"out{suffix}") as written:
        assert (pixels(written.convert("RGBA").getchannel("A")) == pixels(alpha)).all()


@pytest.mark.parametrize("suffix", [".jpg", ".bmp", ".ppm"])
def test_formats_without_alpha_show_the_picture_on_white(tmp_path, suffix):
    photo = Photo(Image.new("RGB", (32, 32), (200, 0, 0)), Image.new("L", (32, 32), 0))
    photo.alpha.paste(255, (0, 0, 16, 32))
    write_image(tmp_path / f"out{suffix}", photo)
    written = pixels(read_image(tmp_path / f"out{suffix}").rgb)
    assert np.abs(written[:, :8] - (200, 0, 0)).max() <= 4
    assert written[:, 24:].min() >= 251


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_an_rgb_profile_is_kept(tmp_path, mode, suffix):
    photo = save_and_read(picture(32, 24).convert(mode), tmp_path / "in.png", icc_profile=SRGB)
    assert (pixels(photo.rgb) == pixels(picture(32, 24).convert(mode).convert("RGB"))).all()
    write_image(tmp_path / f"out{suffix}", photo)
    assert Image.open(tmp_path / f"out{suffix}").info["icc_profile"] == SRGB


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".bmp"])
def test_dpi_is_kept(tmp_path, suffix):
    photo = save_and_read(picture(32, 24), tmp_path / "in.png", dpi=(300, 150))
    write_image(tmp_path / f"out{suffix}", photo)
    assert Image.open(tmp_path / f"out{suffix}").info["dpi"] == pytest.approx((300, 150), abs=0.1)


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
    with pytest.raises(InputError, match=r"cannot write an image as|the name has no suffix"):
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
