"""Photographs in and pictures out: whatever a user's file holds becomes 8-bit RGB, and what it carried is kept."""

from __future__ import annotations

import io
import math
import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from torch import Tensor

from fastperc import reference
from fastperc.errors import InputError
from fastperc.files import PathLike, check_readable, write_atomically

# What is written, and the keywords that make it as good as it gets. TIFF stays uncompressed: through libtiff, Pillow
# cannot write the EXIF of a camera.
SAVE_OPTIONS: dict[str, dict[str, Any]] = {
    "PNG": {},
    "JPEG": dict(quality=95, subsampling=0),
    "WEBP": dict(quality=95),
    "AVIF": dict(quality=95, subsampling="4:4:4"),
    "TIFF": {},
    "JPEG2000": {},
    "TGA": {},
    "BMP": {},
    "PPM": {},
}
ALPHA_FORMATS = frozenset({"PNG", "WEBP", "AVIF", "TIFF", "JPEG2000", "TGA"})
SUFFIXES = frozenset(
    suffix for suffix, name in Image.registered_extensions().items() if name in SAVE_OPTIONS and name in Image.SAVE
) - {".pbm", ".pgm", ".pfm"}
# Pillow knows these by their suffix, but decodes none of them itself.
NO_PHOTOS = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "PALM", "PDF", "WMF"})
READABLE_SUFFIXES = frozenset(suffix for suffix, name in Image.registered_extensions().items() if name not in NO_PHOTOS)
# The tags that say how the pixels of the file were laid out (orientation among them), not what the picture shows.
LAYOUT_TAGS = frozenset({*range(254, 269), *range(273, 282), *range(284, 294), 297, 301, *range(317, 360)}) | frozenset(
    {*range(512, 533), 700, 33723, 34377, 34675}  # JPEG in TIFF, XMP, IPTC, Photoshop, ICC
)
MAX_PIXELS = 2 * 89_478_485  # where Pillow itself stops


@dataclass
class Photo:
    """An upright 8-bit RGB image, its alpha channel if it had one, and what else its file carried."""

    rgb: Image.Image
    alpha: Image.Image | None = None
    metadata: dict[str, Any] = field(default_factory=dict)  # icc_profile, exif, dpi: keywords of Image.save

    def levels(self) -> Tensor:
        """uint8 [H, W, 3]."""
        return torch.from_numpy(np.array(self.rgb))

    def is_gray(self) -> bool:
        """Whether red, green and blue are alike everywhere."""
        levels = self.levels()
        return bool((levels == levels[..., :1]).all())

    def tensor(self) -> Tensor:
        """RGB in 0–1, float32 [1, 3, H, W]."""
        return self.levels().permute(2, 0, 1)[None].float() / 255

    def resized(self, long_side: int) -> Photo:
        """The same photo with its longer side ``long_side`` pixels long.

        Raises:
            InputError: that would be more than ``MAX_PIXELS``.
        """
        width, height = self.rgb.size
        scale = long_side / max(width, height)
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        if math.prod(size) > MAX_PIXELS:
            raise InputError(f"{size[0]}×{size[1]} is larger than {MAX_PIXELS:,} pixels")
        alpha = self.alpha and self.alpha.resize(size, Image.Resampling.LANCZOS)
        return Photo(self.rgb.resize(size, Image.Resampling.LANCZOS), alpha, self.metadata)


def read_image(path: PathLike, enough: int | None = None) -> Photo:
    """Opens any image that Pillow can, turned upright by its EXIF orientation; of several frames, the first.

    Grayscale, palette, 16-bit, floating-point and CMYK images become 8-bit RGB. An RGB image keeps its ICC profile
    beside its numbers; any other is converted to sRGB by it.

    Args:
        path: the file.
        enough: where ``enough`` pixels a side will do, a larger JPEG is decoded at a fraction of its size.

    Raises:
        InputError: missing, unreadable, not an image, cut short.
    """
    path = check_readable(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a large image, a corrupt tag: the picture is there all the same
            with Image.open(path) as image:
                if enough is not None:
                    image.draft("RGB", (enough, enough))
                image.load()
                return _photo(image)
    except UnidentifiedImageError:
        raise InputError(f"{path}: not an image, or in a format that Pillow cannot read") from None
    except Image.DecompressionBombError:
        raise InputError(f"{path}: larger than {MAX_PIXELS:,} pixels") from None
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise whatever the damage provokes
        raise InputError(f"{path}: damaged or cut short ({error})") from None


def _photo(image: Image.Image) -> Photo:
    metadata: dict[str, Any] = {}
    dpi = [float(value) for value in image.info.get("dpi", ())]
    if len(dpi) == 2 and all(1 < value < 65536 for value in dpi):  # a TIFF without one says 1
        metadata["dpi"] = tuple(dpi)
    profile = image.info.get("icc_profile") or b""
    image, exif = _upright(image)
    if exif:
        metadata["exif"] = exif

    if image.mode == "F" or image.mode.startswith("I"):
        image = _eight_bit(image)
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
    return Photo(rgb, alpha, metadata)


def _upright(image: Image.Image) -> tuple[Image.Image, bytes]:
    """``image`` turned by its EXIF orientation, and the rest of its EXIF; what is damaged is as good as none."""
    try:
        exif = image.getexif()
    except Exception:
        return image, b""
    image.info.pop("exif", None)  # exif_transpose would write it anew, and fail over a damaged tag
    image = ImageOps.exif_transpose(image)
    for tag in LAYOUT_TAGS & exif.keys():
        del exif[tag]
    try:
        return image, exif.tobytes() if len(exif) else b""
    except Exception:
        return image, b""


def _eight_bit(image: Image.Image) -> Image.Image:
    # Pillow's own conversion clips these at 255. Integers are 16-bit samples; floats are 0–1, or 0–255 if far above 1.
    values = np.asarray(image, dtype=np.float64)
    top = 65535.0 if image.mode != "F" else (1.0 if np.nanmax(values, initial=0.0) <= 2.0 else 255.0)
    gray = Image.fromarray(np.nan_to_num(values / top * 255).clip(0, 255).round().astype(np.uint8))
    if isinstance(transparent := image.info.get("transparency"), int):
        gray.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return gray


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image | None:
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):
        return None  # a profile that cannot be used is as good as none


def check_format(path: PathLike) -> Path:
    """``path`` as a ``Path``, once its suffix is known to name a format that can be written."""
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(
            f"{path}: no image format is written as {path.suffix or 'a name without a suffix'!r}; use .png or .jpg"
        )
    return path


def write_image(path: PathLike, photo: Photo) -> None:
    """Writes ``photo`` in the format of ``path``'s suffix, whole or not at all.

    A format without transparency shows the picture on white. Metadata that a format cannot hold is left out.

    Raises:
        InputError: the suffix names no format that can be written, or that format cannot hold so large an image.
        OSError: the system refused, by a full disk for one.
    """
    path = check_format(path)
    kind = Image.registered_extensions()[path.suffix.lower()]
    image, metadata = photo.rgb, dict(photo.metadata)
    if photo.alpha is not None and kind in ALPHA_FORMATS:
        image = image.copy()
        image.putalpha(photo.alpha)
    elif photo.alpha is not None:
        image = Image.composite(image, Image.new("RGB", image.size, "white"), photo.alpha)
    if kind == "JPEG" and len(metadata.get("exif", b"")) > 65533:  # what a JPEG segment holds
        del metadata["exif"]
    with write_atomically(path) as temporary:
        try:
            image.save(temporary, format=kind, **SAVE_OPTIONS[kind], **metadata)
        except (ValueError, OverflowError, RuntimeError) as error:  # what Pillow's encoders raise on too many pixels
            raise InputError(f"{path}: cannot be written as {kind} ({error})") from None


def to_image(x: Tensor) -> Image.Image:
    """RGB in 0–1 [3, H, W] → an 8-bit image; clamped, then rounded to the nearest level."""
    pixels = reference.to_levels(x.detach().float())
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().cpu().numpy())


def find_images(folder: PathLike) -> list[Path]:
    """Every file under ``folder`` with an image's suffix, at any depth, in a fixed order; hidden ones are left out.

    Links are followed, to each folder once.

    Raises:
        InputError: there is no such folder, or no image in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    images: list[Path] = []
    seen: set[str] = set()
    for directory, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(directory)
        if real in seen:  # links may lead in circles
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        images += (Path(directory, name) for name in files if not name.startswith("."))
    images = sorted(path for path in images if path.suffix.lower() in READABLE_SUFFIXES)
    if not images:
        raise InputError(f"{folder}: no images in this folder")
    return images


def contact_sheet(rows: Iterable[Tensor], gap: int = 4) -> Image.Image:
    """Rows of equally large images [N, 3, H, W] in 0–1 as one picture."""
    rows = [torch.nn.functional.pad(row, (0, gap, 0, gap), value=1.0) for row in rows]
    sheet = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)
    return to_image(sheet[:, :-gap, :-gap])
