"""Which image formats are read and written here, by suffix, and how large a picture each can hold."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from fastperc.errors import InputError
from fastperc.files import PathLike


def _register_plugins() -> None:
    """Lets Pillow read HEIC, JPEG XL and AVIF where the packages for them are installed."""
    with suppress(ImportError):
        from pillow_heif import register_heif_opener

        register_heif_opener()
    with suppress(ImportError):
        import pillow_jxl  # noqa: F401
    if ".avif" not in Image.registered_extensions():  # before Pillow 11.3
        with suppress(ImportError):
            import pillow_avif  # noqa: F401


_register_plugins()

# Pillow calls a PNG damaged if a chunk of text or an ICC profile has more than 1 MiB. XMP of layered pictures has more.
MAX_TEXT = 64 << 20  # bytes of one chunk, uncompressed; of all chunks together four times as many
PngImagePlugin.MAX_TEXT_CHUNK = max(PngImagePlugin.MAX_TEXT_CHUNK, MAX_TEXT)
PngImagePlugin.MAX_TEXT_MEMORY = max(PngImagePlugin.MAX_TEXT_MEMORY, 4 * MAX_TEXT)

# The formats that are written, with Pillow's keywords for the best quality. TIFF stays uncompressed, because Pillow
# cannot write a camera's EXIF through libtiff.
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
MAX_SIDES = {"JPEG": 65_500, "WEBP": 16_383, "AVIF": 65_536, "TGA": 65_535}  # pixels
SUFFIXES = frozenset(
    suffix for suffix, name in Image.registered_extensions().items() if name in SAVE_OPTIONS and name in Image.SAVE
) - {".pbm", ".pgm", ".pfm"}
# Pillow registers suffixes for these formats but cannot decode them by itself.
NO_PHOTOS = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "PALM", "PDF", "WMF"})
READABLE_SUFFIXES = frozenset(suffix for suffix, name in Image.registered_extensions().items() if name not in NO_PHOTOS)

# Suffixes of images that Pillow cannot read, and what to do about them.
PLUGINS = {".heic": "heif", ".heif": "heif", ".hif": "heif", ".jxl": "heif", ".avif": "heif", ".avifs": "heif"}
RAW_SUFFIXES = frozenset(
    {".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dcr", ".dng", ".erf", ".fff", ".gpr", ".iiq", ".kdc", ".mef", ".mos"}
    | {".mrw", ".nef", ".nrw", ".orf", ".pef", ".raf", ".raw", ".rw2", ".rwl", ".sr2", ".srf", ".srw", ".x3f"}
)
OTHER_SUFFIXES = frozenset({".ai", ".emf", ".eps", ".exr", ".hdp", ".jxr", ".svg", ".svgz", ".wdp", ".wmf", ".xcf"})
UNREADABLE_SUFFIXES = (PLUGINS.keys() | RAW_SUFFIXES | OTHER_SUFFIXES) - READABLE_SUFFIXES


# Suffixes of films, which fastperc.video reads by PyAV.
FILM_SUFFIXES = frozenset(
    {".3g2", ".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".mxf", ".ogv"}
    | {".vob", ".webm", ".wmv"}
)


def advice(suffix: str) -> str:
    """What to do about a file with one of ``UNREADABLE_SUFFIXES``, or about a film where PyAV is not installed."""
    if suffix in FILM_SUFFIXES:
        return "run `pip install 'fastperc[video]'`"
    if suffix in PLUGINS:
        return f"run `pip install 'fastperc[{PLUGINS[suffix]}]'`"
    if suffix in RAW_SUFFIXES:
        return "develop the camera's raw data into a JPEG or a TIFF of 16 bits"
    return "save it as PNG"


def check_format(path: PathLike) -> Path:
    """Checks that the suffix of ``path`` names a format that can be written, and returns it as a ``Path``.

    Raises:
        InputError: it does not.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        fault = f"cannot write an image as {path.suffix!r}" if path.suffix else "the name has no suffix"
        raise InputError(f"{path}: {fault}; use .png or .jpg, or end the name of a folder in /")
    return path


def format_of(path: PathLike) -> str:
    """Pillow's name of the format that the suffix of ``path`` names."""
    return Image.registered_extensions()[Path(path).suffix.lower()]


def check_size(path: PathLike, width: int, height: int) -> None:
    """Checks that a picture of that size can be written to ``path``.

    Raises:
        InputError: it is too large for the format that the suffix names.
    """
    name = format_of(check_format(path))
    if max(width, height) > (limit := MAX_SIDES.get(name, max(width, height))):
        raise InputError(
            f"{path}: cannot be written as {name}, which holds {limit:,} pixels a side, not {width}×{height}; "
            "use .png or .tif"
        )
