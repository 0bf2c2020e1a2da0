"""Decodes image files of any kind to 8-bit RGB, and encodes pictures with the alpha and metadata of their photo."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageCms, ImageMode, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor

from fastperc import reference
from fastperc.errors import InputError
from fastperc.files import PathLike, check_readable, write_atomically
from fastperc.photos import tiff
from fastperc.photos.folders import find_images as find_images
from fastperc.photos.formats import (
    ALPHA_FORMATS,
    MAX_TEXT,
    SAVE_OPTIONS,
    UNREADABLE_SUFFIXES,
    advice,
    check_format,
    check_size,
    format_of,
)
from fastperc.photos.formats import SUFFIXES as SUFFIXES
from fastperc.photos.metadata import PROFILE_FORMATS, read_metadata, save_keywords, upright
from fastperc.photos.samples import Samples, to_eight_bit
from fastperc.photos.transparency import fill_transparent
from fastperc.progress import say

ANIMATED_FORMATS = frozenset({"AVIF", "DCX", "FLI", "GIF", "JXL", "PNG", "WEBP"})
MAX_PIXELS = 2 * 89_478_485  # Pillow's own limit


@dataclass
class Photo:
    """An upright 8-bit RGB image, its alpha channel if it has one, and the metadata of its file."""

    rgb: Image.Image
    alpha: Image.Image | None = None
    metadata: dict[str, Any] = field(default_factory=dict)  # icc_profile and exif (bytes), and see read_metadata
    frames: int = 1  # pictures in the file, of which this is the first
    gray: bool = False  # whether the file has one channel, beside alpha: an RGB file with equal channels has three

    def visible(self) -> Image.Image:
        """The RGB image, with the colours of nearby visible pixels where alpha is 0."""
        return self.rgb if self.alpha is None else fill_transparent(self.rgb, self.alpha)

    def levels(self) -> Tensor:
        """The levels of :meth:`visible`, uint8 [H, W, 3]."""
        return torch.from_numpy(np.array(self.visible()))

    def tensor(self) -> Tensor:
        """The image as RGB in 0–1, float32 [1, 3, H, W]."""
        return self.levels().permute(2, 0, 1)[None].float() / 255

    def resized(self, long_side: int) -> Photo:
        """A copy whose longer side has ``long_side`` pixels.

        Raises:
            InputError: the copy would have more than ``MAX_PIXELS`` pixels.
        """
        width, height = self.rgb.size
        scale = long_side / max(width, height)
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        if math.prod(size) > MAX_PIXELS:
            raise InputError(f"{size[0]}×{size[1]} is larger than {MAX_PIXELS:,} pixels")
        alpha = self.alpha and self.alpha.resize(size, Image.Resampling.LANCZOS)
        return Photo(self.visible().resize(size, Image.Resampling.LANCZOS), alpha, self.metadata)


def read_image(path: PathLike, enough: int | None = None) -> Photo:
    """Reads an image in any format that Pillow can decode. Of several frames it reads the first.

    The image is rotated upright by its EXIF orientation. Grayscale, palette, 16-bit, floating-point and CMYK images
    become 8-bit RGB, large samples as :func:`to_eight_bit` says. An RGB profile (ICC) is kept; with a gray or CMYK
    profile the image is converted to sRGB. In a TIFF, previews do not count as frames.

    Args:
        path: the file.
        enough: a sufficient size in pixels for both sides; a larger JPEG may then be decoded at a fraction of its size.

    Raises:
        InputError: the file is missing, unreadable, cut short, not an image, or one that Pillow cannot decode right.
    """
    path = check_readable(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about large images and corrupt tags, which do not prevent reading
            # Given a path, Pillow maps the file into memory, and then gets the sides of a TIFF on its side wrong.
            with path.open("rb") as file, Image.open(file) as image:
                samples, pages = _samples(image, path)
                if enough is not None:
                    image.draft("RGB", (enough, enough))
                with tiff.silence if image.format == "TIFF" else nullcontext():
                    image.load()
                photo = _to_photo(image, samples)
                photo.frames = pages or _frames(image)
                return photo
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except (UnidentifiedImageError, KeyError):  # KeyError: a TIFF with an unknown compression
        reason = tiff.why_not_open(path) or "not an image, or in a format that Pillow cannot read"
        if (suffix := path.suffix.lower()) in UNREADABLE_SUFFIXES:
            reason = f"Pillow cannot read {suffix}; {advice(suffix)}"
        raise InputError(f"{path}: {reason}") from None
    except Image.DecompressionBombError:
        raise InputError(f"{path}: larger than {MAX_PIXELS:,} pixels") from None
    except MemoryError:
        raise
    except Exception as error:  # a damaged file can raise anything in Pillow's decoders
        if "MAX_TEXT" in str(error):
            raise InputError(f"{path}: holds a text or a profile of more than {MAX_TEXT >> 20} MiB") from None
        raise InputError(f"{path}: damaged or cut short ({error})") from None


def read_first_frame(path: PathLike) -> Photo:
    """Reads an image as :func:`read_image` does, and prints a line if the file has more frames than the first."""
    photo = read_image(path)
    if photo.frames > 1:
        say(f"{path}: holds {photo.frames} frames; only the first is used")
    return photo


def _samples(image: Image.Image, path: Path) -> tuple[Samples, int]:
    """What the samples of an opened ``image`` are; and the number of pages of a TIFF, whose picture is chosen, or 0.

    Raises:
        InputError: Pillow would decode it wrongly.
    """
    if isinstance(image, TiffImageFile):
        pages = tiff.open_page(image, path)
        return tiff.prepare(image), pages
    if image.format == "FITS" and image.mode != "L":
        raise InputError("a FITS file, whose scale Pillow does not read; save it as a TIFF of 16 bits")
    return Samples("f", 32) if image.mode == "F" else Samples("u", 16), 0


def _frames(image: Image.Image) -> int:
    """How many frames the file has. Further pictures of a JPEG or HEIF are previews or depth maps and do not count."""
    try:
        return getattr(image, "n_frames", 1) if image.format in ANIMATED_FORMATS else 1
    except Exception:  # a later frame is damaged
        return 1


def _to_photo(image: Image.Image, samples: Samples) -> Photo:
    """The photo that a decoded ``image`` holds. Pixels are converted as :func:`read_image` describes."""
    metadata = read_metadata(image)
    gray = ImageMode.getmode(image.mode).basemode == "L"
    profile = image.info.get("icc_profile") or b""
    image, exif = upright(image)
    if exif:
        metadata["exif"] = exif

    if image.mode == "F" or image.mode.startswith("I"):
        image = to_eight_bit(image, samples)
    if image.mode == "La":  # premultiplied by alpha; Pillow converts it to nothing else
        image = image.convert("LA")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        rgb, alpha = rgba.convert("RGB"), rgba.getchannel("A")
    else:
        rgb, alpha = image.convert("RGB"), None

    space = profile[16:20]
    if space == b"RGB ":
        metadata["icc_profile"] = profile
    elif space == b"GRAY" and image.mode in ("1", "L", "LA"):
        rgb = _to_srgb(rgb.getchannel("R"), profile) or rgb
    elif space == b"CMYK" and image.mode == "CMYK":
        rgb = _to_srgb(image, profile) or rgb
    rgb.info = {}  # Image.save would write what it holds
    return Photo(rgb, alpha, metadata, gray=gray)


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image | None:
    """``image`` converted from ``profile`` to sRGB, or None if the profile cannot be used."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):
        return None


def write_image(path: PathLike, photo: Photo) -> None:
    """Writes ``photo`` atomically, in the format that the suffix of ``path`` names.

    Formats without transparency get the picture on white, and formats without an ICC profile get it in sRGB. Other
    metadata that the format cannot hold is left out.

    Raises:
        InputError: the suffix names no format that can be written, or the image is too large for the format.
        OSError: the system refuses to write it, for example because the disk is full.
    """
    path = check_format(path)
    check_size(path, *photo.rgb.size)
    format_name = format_of(path)
    image, profile = photo.rgb, photo.metadata.get("icc_profile")
    if profile and format_name not in PROFILE_FORMATS:
        image = _to_srgb(image, profile) or image
    if photo.alpha is not None and format_name in ALPHA_FORMATS:
        image = image.copy()
        image.putalpha(photo.alpha)
    elif photo.alpha is not None:
        image = Image.composite(image, Image.new("RGB", image.size, "white"), photo.alpha)
    with write_atomically(path) as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about damaged EXIF, which is left out
        metadata = save_keywords(format_name, photo.metadata, image.size)
        try:
            image.save(temporary, format=format_name, **SAVE_OPTIONS[format_name], **metadata)
        except (ValueError, OverflowError, RuntimeError) as error:  # Pillow's encoders, on too many pixels
            raise InputError(f"{path}: cannot be written as {format_name} ({error})") from None


def to_image(x: Tensor) -> Image.Image:
    """Converts RGB in 0–1, floating-point [3, H, W], to an 8-bit image. Clamps, then rounds to the nearest level."""
    levels = reference.to_levels(x.detach().float())
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().cpu().numpy())


def contact_sheet(rows: Iterable[Tensor], gap: int = 4) -> Image.Image:
    """One picture with a row for each of ``rows``: images of equal size, RGB in 0–1 [N, 3, H, W].

    ``gap`` is the white space between images in pixels.
    """
    rows = [torch.nn.functional.pad(row, (0, gap, 0, gap), value=1.0) for row in rows]
    sheet = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)
    return to_image(sheet[:, :-gap, :-gap])
