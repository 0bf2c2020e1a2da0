"""Image files with random damage are read or refused in one line: no crash, no hang, no flood of memory.

``FASTPERC_FUZZ_SECONDS`` sets how long the files of each format are tried; ``FASTPERC_FUZZ_SEED`` makes other files.
"""

from __future__ import annotations

import os
import random
import struct
import time
from io import BytesIO

import numpy as np
import pytest
from photo_files import SRGB, exif, png_of_sixteen_bits, tiff, tiff_page
from pictures import picture

from fastperc import InputError
from fastperc.photos.photo import read_image, write_image

SECONDS, SEED = float(os.environ.get("FASTPERC_FUZZ_SECONDS", "1")), int(os.environ.get("FASTPERC_FUZZ_SEED", "0"))
LONGEST = 10.0  # seconds for one file
NUMBERS = (0, 1, 2, 8, 255, 65535, 2**31 - 1, 2**32 - 1)


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


def damaged(data, rng):
    """A copy of ``data`` with some bytes or numbers replaced, removed or repeated; most of them near the start."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4, 8])):
        if len(data) < 8:
            break
        position = rng.randrange(len(data) if rng.random() < 0.5 else min(len(data), 300))
        way = rng.random()
        if way < 0.5:
            data[position] = rng.choice([0, 1, 2, 3, 4, 8, 16, 127, 128, 255, rng.randrange(256)])
        elif way < 0.75:
            number = struct.pack(rng.choice("<>") + "I", rng.choice([*NUMBERS, rng.randrange(len(data))]))
            data[position : position + 4] = number
        elif way < 0.85:
            del data[position : position + rng.randrange(1, 20)]
        elif way < 0.95:
            data[position:position] = data[position : position + rng.randrange(1, 30)]
        else:
            del data[position:]
    return bytes(data)


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
