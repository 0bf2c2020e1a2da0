"""Photographs in and pictures out: whatever a user's file holds becomes 8-bit RGB, and what it carried is kept."""

from __future__ import annotations

import io
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

from fastperc.errors import InputError
from fastperc.files import PathLike, check_readable, write_atomically

ORIENTATION = 0x0112  # the EXIF tag
SUFFIXES = frozenset(
    suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN and name in Image.SAVE
) - {".pdf", ".gif", ".eps", ".ps"}
# Per format: carries an alpha channel; and the keywords that make it as good as it gets.
ALPHA_FORMATS = frozenset({"PNG", "WEBP", "TIFF", "JPEG2000", "TGA", "AVIF", "ICO"})
SAVE_OPTIONS: dict[str, dict[str, Any]] = {
    "JPEG": dict(quality=95, subsampling=0),
    "WEBP": dict(quality=95),
    "TIFF": dict(compression="tiff_lzw"),
}


@dataclass
class Photo:
    """An upright 8-bit RGB image, its alpha channel if it had one, and what else its file carried."""

    rgb: Image.Image
    alpha: Image.Image | None = None
    metadata: dict[str, Any] = field(default_factory=dict)  # icc_profile, exif, dpi: keywords of Image.save

    def tensor(self) -> Tensor:
        """RGB in 0–1, float32 [1, 3, H, W]."""
        return torch.from_numpy(np.array(self.rgb)).permute(2, 0, 1)[None].float() / 255

    def resized(self, long_side: int) -> Photo:
        """The same photo with its longer side ``long_side`` pixels long."""
        width, height = self.rgb.size
        scale = long_side / max(width, height)
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        alpha = self.alpha and self.alpha.resize(size, Image.Resampling.LANCZOS)
        return Photo(self.rgb.resize(size, Image.Resampling.LANCZOS), alpha, self.metadata)


def read_image(path: PathLike) -> Photo:
    """Opens any image that Pillow can, turned upright by its EXIF orientation; of several frames, the first.

    Grayscale, palette, 16-bit, floating-point and CMYK images become 8-bit RGB. An RGB image keeps its ICC profile
    beside its numbers; any other is converted to sRGB by it.

    Raises:
        InputError: missing, unreadable, not an image, cut short.
    """
    path = check_readable(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                image.load()
                return _photo(image)
    except UnidentifiedImageError:
        raise InputError(f"{path}: not an image, or in a format that Pillow cannot read") from None
    except Image.DecompressionBombError:
        raise InputError(f"{path}: larger than {2 * Image.MAX_IMAGE_PIXELS:,} pixels") from None  # type: ignore[operator]
    except (OSError, SyntaxError, ValueError, EOFError, IndexError) as error:  # what Pillow's decoders raise on damage
        raise InputError(f"{path}: damaged or cut short ({error})") from None


def _photo(image: Image.Image) -> Photo:
    metadata: dict[str, Any] = {}
    exif = image.getexif()
    profile = image.info.get("icc_profile")
    if dpi := image.info.get("dpi"):
        metadata["dpi"] = tuple(float(value) for value in dpi)
    image = ImageOps.exif_transpose(image)
    if ORIENTATION in exif:
        del exif[ORIENTATION]
    if len(exif):
        metadata["exif"] = exif.tobytes()

    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        rgb, alpha = rgba.convert("RGB"), rgba.getchannel("A")
    else:
        rgb, alpha = _rgb(image), None
    if profile and image.mode in ("RGB", "RGBA", "P"):
        metadata["icc_profile"] = profile
    elif profile and image.mode in ("L", "CMYK"):
        rgb = _to_srgb(image, profile) or rgb
    return Photo(rgb, alpha, metadata)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or image.mode.startswith("I"):
        # Pillow's own conversion clips these at 255. Integers are 16-bit samples; floats are 0–1 unless they exceed 1.
        values = np.asarray(image, dtype=np.float64)
        top = 65535.0 if image.mode != "F" else (1.0 if np.nanmax(values, initial=0.0) <= 1.0 else 255.0)
        values = np.nan_to_num(values / top * 255).clip(0, 255)
        return Image.fromarray(values.round().astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


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
    """
    path = check_format(path)
    kind = Image.registered_extensions()[path.suffix.lower()]
    image = photo.rgb
    if photo.alpha is not None and kind in ALPHA_FORMATS:
        image = image.copy()
        image.putalpha(photo.alpha)
    elif photo.alpha is not None:
        image = Image.composite(image, Image.new("RGB", image.size, "white"), photo.alpha)
    with write_atomically(path) as temporary:
        image.save(temporary, format=kind, **SAVE_OPTIONS.get(kind, {}), **photo.metadata)


def to_image(x: Tensor) -> Image.Image:
    """RGB in 0–1 [3, H, W] → an 8-bit image; clamped, then rounded to the nearest level."""
    pixels = x.detach().float().clamp(0, 1).mul(255).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().cpu().numpy())


def find_images(folder: PathLike) -> list[Path]:
    """Every file under ``folder`` with an image's suffix, at any depth, in a fixed order; hidden ones are left out.

    Raises:
        InputError: there is no such folder, or no image in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    suffixes = Image.registered_extensions()
    images = sorted(
        path
        for directory, names, files in os.walk(folder, followlinks=True)
        for path in (Path(directory, file) for file in files)
        if path.suffix.lower() in suffixes and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not images:
        raise InputError(f"{folder}: no images in this folder")
    return images


def contact_sheet(rows: Iterable[Tensor], gap: int = 4) -> Image.Image:
    """Rows of equally large images [N, 3, H, W] in 0–1 as one picture."""
    rows = [torch.nn.functional.pad(row, (0, gap, 0, gap), value=1.0) for row in rows]
    sheet = torch.cat([torch.cat(list(row), dim=2) for row in rows], dim=1)
    return to_image(sheet[:, :-gap, :-gap])
