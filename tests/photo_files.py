"""Parts of image files that tests make by hand: EXIF, ICC profiles and 16-bit PNGs."""

from __future__ import annotations

import struct
import zlib

from PIL import Image, ImageCms

from fastperc.photos.photo import read_image

MAKE, ORIENTATION, EXIF_IFD, DATE, GPS_IFD = 0x010F, 0x0112, 0x8769, 0x9003, 0x8825
CAMERA = {MAKE: "Maker", EXIF_IFD: {DATE: "2020:01:02 03:04:05"}, GPS_IFD: {1: "N"}}


def exif(**more):
    """The EXIF of a camera, and more tags, such as ``_274=6``."""
    tags = Image.Exif()
    for tag, value in (CAMERA | {int(key[1:]): value for key, value in more.items()}).items():
        tags[tag] = value
    return tags.tobytes()


def save_and_read(image, path, **options):
    """Saves ``image`` with Pillow and reads the file with fastperc."""
    image.save(path, **options)
    return read_image(path)


def icc_profile(space, pcs, **tags):
    """The bytes of an ICC profile: Pillow cannot write one."""
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


def png_of_sixteen_bits(pixels, color_type, transparent=b""):
    """The bytes of a PNG with ``pixels`` [H, W, C]: Pillow cannot write 16-bit RGB."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    head = chunk(b"IHDR", struct.pack(">2I5B", width, height, 16, color_type, 0, 0, 0))
    transparent = transparent and chunk(b"tRNS", transparent)
    return b"\x89PNG\r\n\x1a\n" + head + transparent + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff(*pages, order="<"):
    """The bytes of a TIFF file. ``pages`` come from :func:`tiff_page`, made for the same ``order`` of bytes."""
    out = bytearray(struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, 0))
    link = 4
    for tags, strips in pages:
        struct.pack_into(f"{order}I", out, link, _append_page(out, dict(tags), strips, order))
        link = len(out) - 4
    return bytes(out)


def _append_page(out, tags, strips, order):
    """Appends strips, the values of tags, and last the directory; returns where the directory starts."""
    offsets = []
    for strip in strips:
        offsets.append(len(out))
        out += strip
    if 330 in tags:  # a page instead of its offset
        child_tags, child_strips = tags[330]
        tags[330] = _append_page(out, dict(child_tags), child_strips, order)
    tags |= {273: offsets, 279: [len(strip) for strip in strips]}
    entries = b""
    for tag, values in sorted(tags.items()):
        values = values if isinstance(values, (list, tuple)) else [values]
        number, letter = (4, "I") if tag in (273, 279, 330) or max(values) > 65535 else (3, "H")
        data = struct.pack(f"{order}{len(values)}{letter}", *values)
        if len(data) > 4:
            out += bytes(len(out) % 2)
            offset = struct.pack(f"{order}I", len(out))
            out += data
            data = offset
        entries += struct.pack(f"{order}HHI", tag, number, len(values)) + data.ljust(4, b"\0")
    out += bytes(len(out) % 2)
    start = len(out)
    out += struct.pack(f"{order}H", len(tags)) + entries + bytes(4)
    return start


def tiff_page(pixels, photometric=1, order="<", planes=False, compressed=False, **more):
    """A page of a TIFF: tags and strips. ``pixels`` is [H, W] or [H, W, C]; ``more`` are tags such as ``_254=1``."""
    height, width, samples = pixels.reshape(*pixels.shape[:2], -1).shape
    tags = {256: width, 257: height, 258: [8 * pixels.itemsize] * samples, 259: 8 if compressed else 1,
            262: photometric, 277: samples, 278: height, 284: 2 if planes else 1,
            339: [{"u": 1, "i": 2, "f": 3, "c": 6}[pixels.dtype.kind]] * samples}  # fmt: skip
    parts = [pixels[..., i] for i in range(samples)] if planes else [pixels]
    strips = [part.astype(pixels.dtype.newbyteorder(order)).tobytes() for part in parts]
    tags |= {int(key[1:]): value for key, value in more.items()}
    return tags, [zlib.compress(strip) for strip in strips] if compressed else strips
