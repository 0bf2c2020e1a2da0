"""What the web page accepts: sizes of files and pictures, lengths of clips, and how many people may wait."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from PIL import Image

from fastperc.errors import InputError
from fastperc.photos.photo import Photo, read_image

MEGA = 1_000_000


class Limits(NamedTuple):
    """Limits of the web page."""

    megabytes: int = 200  # of an uploaded file
    megapixels: int = 50  # of a photo, of a picture, and of a frame
    seconds: int = 60  # of a clip
    waiting: int = 8  # people whose picture is being painted or waits for its turn


def check_pixels(name: str, width: int, height: int, limits: Limits) -> None:
    """Checks the size of a photo or of a picture.

    Raises:
        InputError: it has too many pixels.
    """
    if width * height > limits.megapixels * MEGA:
        raise InputError(f"{name}: {width}×{height} is too large; this page takes up to {limits.megapixels} megapixels")


def check_photo(path: Path, limits: Limits) -> tuple[int, int]:
    """Checks that ``path`` is an image that the page can paint, without decoding it. Returns its width and height.

    Raises:
        InputError: it is not an image, or it has too many pixels.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
    except Exception:  # read_image says what is wrong, or reads what Pillow by itself does not
        width, height = read_image(path).rgb.size
    check_pixels(str(path), width, height, limits)
    return width, height


def check_decoded(path: Path, photo: Photo, limits: Limits) -> Photo:
    """``photo``, which was read from ``path``. Of a TIFF, another page than the first may have been read.

    Raises:
        InputError: it has too many pixels.
    """
    check_pixels(str(path), photo.rgb.width, photo.rgb.height, limits)
    return photo


def check_length(path: Path, seconds: float, limits: Limits) -> None:
    """Checks the length of the part of a clip that is to be painted.

    Raises:
        InputError: it is too long.
    """
    if seconds > limits.seconds:
        raise InputError(
            f"{path}: {seconds:.0f} s is too long; this page paints up to {limits.seconds} s, so choose a part"
        )
