"""What a TIFF file says about its pages and samples, where Pillow does not heed it."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from PIL import ImagePalette
from PIL.TiffImagePlugin import COMPRESSION_INFO, ImageFileDirectory_v2, TiffImageFile

from fastperc.errors import InputError
from fastperc.photos.samples import Samples

KIND, OLD_KIND, WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC = 254, 255, 256, 257, 258, 259, 262
SAMPLES_PER_PIXEL, STRIP_BYTES, PLANAR, COLOR_MAP, SUB_PAGES, INK_SET, SAMPLE_FORMAT = 277, 279, 284, 320, 330, 332, 339
DNG_VERSION = 50706
WHITE_IS_ZERO, RGB, PALETTE, CMYK, YCBCR, RAW_PHOTOMETRICS = 0, 2, 3, 5, 6, (32803, 34892)
PHOTOMETRICS = {0: "WhiteIsZero", 1: "BlackIsZero", 2: "RGB", 3: "palette", 4: "mask", 5: "CMYK", 6: "YCbCr"}
PHOTOMETRICS |= {8: "CIE Lab", 9: "ICC Lab", 10: "ITU Lab", 32844: "LogL", 32845: "LogLuv"}
SAMPLE_FORMATS = {1: "unsigned integers", 2: "signed integers", 3: "floating-point numbers", 4: "undefined samples"}
SAMPLE_FORMATS |= {5: "complex integers", 6: "complex numbers"}
KINDS = {2: "i", 3: "f"}  # NumPy's letter of each sample format; unsigned integers are "u"
PLANES = {(RGB, 8), (RGB, 16), (CMYK, 8)}  # uncompressed planes that can be decoded, by photometric and bits
NATIVE_ORDER = {"F;32BF": "F;32NF", "I;16BS": "I;16NS", "I;32BS": "I;32NS"}  # Pillow's raw modes
RAW = "holds the raw data of a camera, which Pillow cannot read; develop it into a JPEG or a TIFF of 16 bits"
MAX_PAGES = 10_000


class Page(NamedTuple):
    """A page of a file."""

    number: int
    tags: ImageFileDirectory_v2
    children: list[ImageFileDirectory_v2]  # SubIFDs

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return _size(self.tags)

    def is_preview_of(self, page: Page) -> bool:
        """Whether ``page`` has the same proportions, as near as whole pixels allow, and is more than twice as wide."""
        (width, height), (other_width, other_height) = self.size, page.size
        return other_width > 2 * width and abs(width * other_height / other_width - height) <= max(1, 0.02 * height)


def open_page(image: TiffImageFile, path: Path) -> int:
    """Makes the page that holds the picture the current one of an opened file; returns how many there are.

    A page is a preview if the file says so, or if it is much smaller than another page of the same proportions.

    Raises:
        InputError: Pillow cannot read that page, or the file is a camera's raw data, of which it would read a preview.
    """
    pages = list(_pages(path))
    whole = [page for page in pages if not _is_reduced(page.tags)]
    pictures = [page for page in whole if not any(page.is_preview_of(other) for other in whole)] or pages
    if not pictures:
        return 1
    width, height = pictures[0].size
    for child in (child for page in pages for child in page.children):
        child_width, child_height = _size(child)
        if not _is_reduced(child) and child_width * child_height > width * height:
            raise InputError(RAW)
    with path.open("rb") as file:
        is_cr2 = file.read(12)[8:] == b"CR\2\0"  # Canon's
    tags = pictures[0].tags
    if is_cr2 or DNG_VERSION in pages[0].tags or tags.get(PHOTOMETRIC) in RAW_PHOTOMETRICS:
        raise InputError(RAW)
    try:
        image.seek(pictures[0].number)
    except (SyntaxError, KeyError):  # no mode, or no decoder
        raise InputError(_description(tags)) from None
    return len(pictures)


def prepare(image: TiffImageFile) -> Samples:
    """Corrects how Pillow will decode an opened page, and returns what its samples are.

    Raises:
        InputError: Pillow would decode the samples wrongly.
    """
    tags = image.tag_v2
    samples = _samples(tags)
    photometric, raw = tags.get(PHOTOMETRIC, 0), image.info.get("compression") == "raw"
    if (samples.kind == "i" and samples.bits == 8) or (photometric == CMYK and tags.get(INK_SET, 1) != 1):
        raise InputError(_description(tags))
    if photometric == YCBCR and raw and sum(tags.get(STRIP_BYTES, ())) < 3 * image.width * image.height:
        raise InputError("a TIFF of subsampled YCbCr without compression, which Pillow cannot read")
    if photometric == PALETTE and max(colors := tags.get(COLOR_MAP, (256,))) < 256:  # 8 bits a colour, not 16
        image.palette = ImagePalette.raw("RGB;L", bytes(colors))
    planes = tags.get(PLANAR, 1) == 2 and tags.get(SAMPLES_PER_PIXEL, 1) > 1
    if planes and raw and (photometric, samples.bits) not in PLANES:
        raise InputError(_description(tags))
    order = "L" if tags.prefix == b"II" else "B"
    for i, tile in enumerate(image.tile):
        rawmode, *rest = cast(tuple[str, ...], tile.args)
        if tile.codec_name == "libtiff":  # it gives samples in the processor's order of bytes, whatever the file's is
            rawmode = NATIVE_ORDER.get(rawmode, rawmode)
        elif planes and samples.bits == 16:  # the rawmode is the name of a band, as of planes with 8 bits
            rawmode = f"{rawmode};16{order}"
        image.tile[i] = tile._replace(args=(rawmode, *rest))
    return samples


class _Silence:
    """Sends what C libraries write to stderr to nowhere, as long as at least one thread asks for it."""

    def __init__(self) -> None:
        self.lock, self.users, self.saved = threading.Lock(), 0, -1

    def __enter__(self) -> None:
        with self.lock, suppress(OSError):  # there may be no stderr
            if self.users == 0:
                self.saved = os.dup(2)
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, 2)
                os.close(nowhere)
            self.users += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            if self.users > 0:
                self.users -= 1
                if self.users == 0:
                    os.dup2(self.saved, 2)
                    os.close(self.saved)


silence = _Silence()  # libtiff writes a line for each error that it finds, and Pillow lets it


def why_not_open(path: Path) -> str | None:
    """Says what a TIFF file holds that Pillow cannot open; None for other files."""
    with suppress(Exception), warnings.catch_warnings():  # whatever a damaged file raises, it is not known as a TIFF
        warnings.simplefilter("ignore")
        with path.open("rb") as file:
            if file.read(4) == b"MM\0+":
                return "a BigTIFF in big-endian order, which Pillow cannot read; save it in little-endian order"
        page = next(_pages(path), None)
        if page is None or WIDTH not in page.tags:
            return None
        bits = page.tags.get(BITS, (1,))
        if len(bits) not in (1, page.tags.get(SAMPLES_PER_PIXEL, 1)):  # damaged
            return None
        if page.tags.get(PHOTOMETRIC) in RAW_PHOTOMETRICS or page.children or DNG_VERSION in page.tags:
            return RAW
        return _description(page.tags)
    return None


def _description(tags: ImageFileDirectory_v2) -> str:
    compression = tags.get(COMPRESSION, 1)
    if compression not in COMPRESSION_INFO:
        return f"a TIFF with compression {compression}, which Pillow cannot read; save it without compression"
    bits, kind, photometric = _first(tags, BITS, 1), _first(tags, SAMPLE_FORMAT, 1), tags.get(PHOTOMETRIC, 0)
    words = [
        f"{tags.get(SAMPLES_PER_PIXEL, 1)} × {bits} bits a pixel",
        SAMPLE_FORMATS.get(kind, f"sample format {kind}"),
        PHOTOMETRICS.get(photometric, f"photometric interpretation {photometric}"),
        *(["inks other than CMYK"] if tags.get(INK_SET, 1) != 1 else []),
        *(["in planes"] if tags.get(PLANAR, 1) == 2 else []),
        *(["big-endian"] if tags.prefix == b"MM" else []),
    ]
    return f"a TIFF with {', '.join(words)}: Pillow cannot read it; save it with 8 bits a sample"


def _samples(tags: ImageFileDirectory_v2) -> Samples:
    kind = KINDS.get(_first(tags, SAMPLE_FORMAT, 1), "u")
    return Samples(kind, _first(tags, BITS, 1), white_is_zero=tags.get(PHOTOMETRIC, 0) == WHITE_IS_ZERO)


def _first(tags: ImageFileDirectory_v2, tag: int, default: int) -> int:
    value: Any = tags.get(tag, default)
    return (value[0] if value else default) if isinstance(value, tuple) else value


def _size(tags: ImageFileDirectory_v2) -> tuple[int, int]:
    return int(_first(tags, WIDTH, 0)), int(_first(tags, HEIGHT, 0))


def _is_reduced(tags: ImageFileDirectory_v2) -> bool:
    """Whether a page is flagged as a preview or a mask."""
    return bool(_first(tags, KIND, 0) & 0b101) or _first(tags, OLD_KIND, 1) == 2


def _pages(path: Path) -> Iterator[Page]:
    """The pages of a file. Stops where they take more bytes than the file has: then they overlap."""
    with path.open("rb") as file:
        header = file.read(8)
        if header[2:4] in (b"+\0", b"\0+"):  # BigTIFF
            header += file.read(8)
        budget = path.stat().st_size
        offset, visited = ImageFileDirectory_v2(header).next, set[int]()
        for number in range(MAX_PAGES):
            if not offset or offset in visited or budget < 0:
                return
            visited.add(offset)
            tags, budget = _load(file, header, offset, budget)
            offsets = tags.get(SUB_PAGES, ())
            children = []
            for child_offset in offsets if isinstance(offsets, tuple) else (offsets,):
                if budget >= 0:
                    child, budget = _load(file, header, int(child_offset), budget)
                    children.append(child)
            yield Page(number, tags, children)
            offset = tags.next


def _load(file: BinaryIO, header: bytes, offset: int, budget: int) -> tuple[ImageFileDirectory_v2, int]:
    """The tags of the page at ``offset``, and what is left of the ``budget`` of bytes to read."""
    tags = ImageFileDirectory_v2(header)
    vars(tags)["_tag_data_limit"] = budget  # Pillow 13 sets it alike for the pages that it reads; others do not know it
    file.seek(offset)
    tags.load(file)
    return tags, budget - (file.tell() - offset) - getattr(tags, "_tag_data_size", 0)
