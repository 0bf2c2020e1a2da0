"""Image files with random damage are read or refused in one line: no crash, no hang, no flood of memory.

``FASTPERC_FUZZ_SECONDS`` sets how long the files of each format are tried; ``FASTPERC_FUZZ_SEED`` makes other files.
"""

from __future__ import annotations

import random
import struct
import time
from io import BytesIO

import numpy as np
import pytest
from damage import LONGEST, SECONDS, SEED, damaged
from photo_files import SRGB, exif, png_of_sixteen_bits, tiff, tiff_page
from pictures import picture

from fastperc import InputError
from fastperc.photos.photo import read_image, write_image


def encoded(kind, **options):
    buffer = BytesIO()
    picture(40, 30).save(buffer, kind, **options)
    return buffer.getvalue()


def seeds(kind):
    """Sound files of a format."""
    if kind == "TIFF":
        ramp = np.arange(1200).reshape(30, 40)
        colors = np.stack([ramp, ramp[::-1], ramp], axis=2)
        small = tiff_page(colors[::4, ::4].astype(np.uint8), 2, _254=1)
        whole = tiff_page(colors.astype(np.uint8), 2)
        yield tiff(small, whole, small)
        yield tiff(tiff_page(colors.astype(np.uint8), 2, _330=small))
        yield tiff(tiff_page(ramp.astype(np.uint16), 0))
        yield tiff(tiff_page(ramp.astype(np.float32), compressed=True, _274=6))
        yield tiff(tiff_page(colors.astype(np.uint16), 2, ">", True), order=">")
        yield tiff(tiff_page(ramp.astype(np.uint8), 3, _320=list(range(768))))
    elif kind == "PNG":
        yield encoded("PNG", exif=exif(), icc_profile=SRGB, dpi=(300, 300))
        yield png_of_sixteen_bits(np.arange(1200).reshape(30, 40, 1), 0, struct.pack(">H", 7))
    elif kind == "GIF":
        yield encoded("GIF", save_all=True, append_images=[picture(40, 30, seed=1)])
    elif kind == "JPEG":
        yield encoded("JPEG", exif=exif(_274=6), icc_profile=SRGB, comment=b"comment")
    else:
        yield encoded(kind)


@pytest.mark.parametrize(
    "kind", ["TIFF", "PNG", "JPEG", "GIF", "WEBP", "AVIF", "BMP", "TGA", "PPM", "JPEG2000", "ICO", "PCX"]
)
def test_damaged_files(tmp_path, kind):
    rng = random.Random(f"{SEED} {kind}")
    sound = list(seeds(kind))
    path, end, tried = tmp_path / "in", time.monotonic() + SECONDS, 0
    while time.monotonic() < end or tried < 20:
        start, tried = time.monotonic(), tried + 1
        path.write_bytes(damaged(rng.choice(sound), rng))
        try:
            photo = read_image(path)
            if photo.rgb.width * photo.rgb.height < 100_000:
                for suffix in (".png", ".jpg", ".tif"):
                    write_image(tmp_path / f"out{suffix}", photo)
        except InputError as error:
            assert str(error).startswith(f"{path}: ") and len(str(error).splitlines()) == 1
        assert time.monotonic() - start < LONGEST
