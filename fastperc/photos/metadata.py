"""The metadata of a photo's file: read once, and written into whatever format the picture gets."""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from contextlib import suppress
from typing import Any
from xml.sax.saxutils import escape

from PIL import Image, ImageOps, PngImagePlugin
from PIL.TiffImagePlugin import TiffImageFile

# EXIF tags about the layout of the file's pixels, orientation included. They do not fit the picture that is written.
LAYOUT_TAGS = frozenset({*range(254, 269), *range(273, 282), *range(284, 294), 297, 301, *range(317, 360)}) | frozenset(
    {*range(512, 533), 700, 33723, 34377, 34675}  # JPEG in TIFF, XMP, IPTC, Photoshop, ICC
)
EXIF_IFD, EXIF_WIDTH, EXIF_HEIGHT = 0x8769, 0xA002, 0xA003
TIFF_XMP, TIFF_IPTC, TIFF_PHOTOSHOP = 700, 33723, 34377
PHOTOSHOP_IPTC = 0x0404  # the number of Photoshop's resource that holds IPTC
# Properties of XMP that do not fit the picture: the orientation, and the gain map or video that a phone appends.
STALE_XMP = re.compile(
    rb'tiff:Orientation="\d"|<tiff:Orientation>\d</tiff:Orientation>|\b(hdrgm|GCamera):\w+="[^"]*"|'
    rb"<(GContainer|Container):Directory>.*?</\2:Directory>",
    re.DOTALL,
)
JPEG_SEGMENT = 65_533  # the most bytes that a segment of a JPEG holds
XMP_HEAD, PHOTOSHOP_HEAD = b"http://ns.adobe.com/xap/1.0/\0", b"Photoshop 3.0\0"
PNG_XMP, PNG_PROFILE = "XML:com.adobe.xmp", "Raw profile type "  # keywords of chunks; the second is ImageMagick's
# Where XMP keeps the texts of IPTC records, by the record's number: the property, the kind of its list, the language.
IPTC_IN_XMP = {
    5: ("dc:title", "Alt", ' xml:lang="x-default"'),
    25: ("dc:subject", "Bag", ""),
    80: ("dc:creator", "Seq", ""),
    116: ("dc:rights", "Alt", ' xml:lang="x-default"'),
    120: ("dc:description", "Alt", ' xml:lang="x-default"'),
}
XMP_PACKET = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:dc="http://purl.org/dc/elements/1.1/">{}</rdf:Description></rdf:RDF></x:xmpmeta>'
)
TEXTS_IN_EXIF = {"Description": 270, "Software": 305, "Author": 315, "Copyright": 33432}  # a PNG's, and EXIF's tags
PROFILE_FORMATS = frozenset({"PNG", "JPEG", "WEBP", "AVIF", "TIFF"})  # they hold an ICC profile


def upright(image: Image.Image) -> tuple[Image.Image, bytes]:
    """``image`` rotated by its EXIF orientation, and the rest of its EXIF. Damaged EXIF counts as none."""
    try:
        exif = image.getexif()
    except Exception:
        return image, b""
    image.info.pop("exif", None)  # exif_transpose would encode it again, and fail on a damaged tag
    image = ImageOps.exif_transpose(image)
    for tag in LAYOUT_TAGS & exif.keys():
        del exif[tag]
    try:
        return image, exif.tobytes() if len(exif) else b""
    except Exception:
        return image, b""


def read_metadata(image: Image.Image) -> dict[str, Any]:
    """The metadata of an opened image file, without EXIF and ICC profile.

    Returns:
        Those that the file has of dpi (a pair of floats), xmp, iptc and comment (bytes), and text (a PNG's texts by
        name).
    """
    metadata: dict[str, Any] = {}
    dpi = [float(value) for value in image.info.get("dpi", ())]
    if len(dpi) == 2 and all(1 < value < 65536 for value in dpi):  # Pillow reports 1 for a TIFF without resolution
        metadata["dpi"] = tuple(dpi)
    text = dict(getattr(image, "text", {}))
    xmp = image.info.get("xmp") or text.get(PNG_XMP)
    xmp = xmp.encode() if isinstance(xmp, str) else xmp
    if isinstance(xmp, bytes):
        metadata["xmp"] = STALE_XMP.sub(b"", xmp)
    with suppress(Exception):  # damaged metadata counts as none
        if iptc := _read_iptc(image, text):
            metadata["iptc"] = iptc
    comment = image.info.get("comment")
    if isinstance(comment, bytes) and comment:
        metadata["comment"] = comment
    text = {name: str(value) for name, value in text.items() if not name.startswith((PNG_XMP, PNG_PROFILE))}
    if text:
        metadata["text"] = text
    return metadata


def save_keywords(format_name: str, metadata: Mapping[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    """The keywords of ``Image.save`` that write ``metadata`` into a file of that format.

    What the format cannot hold is left out. Sizes in EXIF and XMP become ``size``, the picture's width and height.
    """
    keywords = {name: metadata[name] for name in ("dpi", "icc_profile") if name in metadata}
    exif = _exif(metadata.get("exif", b""), size)
    for name, tag in TEXTS_IN_EXIF.items() if format_name != "PNG" else ():
        if (value := metadata.get("text", {}).get(name, "")).isascii() and value and tag not in exif:
            exif[tag] = value
    xmp, iptc = _resized_xmp(metadata.get("xmp", b""), size), metadata.get("iptc", b"")
    if format_name == "TIFF":
        for tag, value in ((TIFF_XMP, xmp), (TIFF_IPTC, iptc)):
            if value:
                exif[tag] = value
    with suppress(Exception):  # Pillow cannot encode some tags of some cameras
        if len(exif) and (encoded := exif.tobytes()):
            keywords["exif"] = encoded
    if format_name == "JPEG":
        if len(keywords.get("exif", b"")) > JPEG_SEGMENT:
            del keywords["exif"]
        keywords["extra"] = _segment(0xE1, XMP_HEAD, xmp) + _segment(0xED, PHOTOSHOP_HEAD, iptc and _resource(iptc))
        if 0 < len(metadata.get("comment", b"")) <= JPEG_SEGMENT:
            keywords["comment"] = metadata["comment"]
    elif format_name == "PNG":
        keywords["pnginfo"] = _png_texts(metadata, xmp, iptc)
    elif format_name in ("WEBP", "AVIF") and (xmp := xmp or _xmp_of_iptc(iptc)):
        keywords["xmp"] = xmp
    return keywords


def _exif(encoded: bytes, size: tuple[int, int]) -> Image.Exif:
    """EXIF as an object, with the picture's size where it had the photo's."""
    exif = Image.Exif()
    if encoded:
        with suppress(Exception):
            exif.load(encoded)
            details = exif.get_ifd(EXIF_IFD)
            for tag, side in zip((EXIF_WIDTH, EXIF_HEIGHT), size):
                if tag in details:
                    details[tag] = side
    return exif


def _resized_xmp(xmp: bytes, size: tuple[int, int]) -> bytes:
    """XMP with the picture's size where it had the photo's."""
    names = (b"exif:PixelXDimension", b"tiff:ImageWidth"), (b"exif:PixelYDimension", b"tiff:ImageLength")
    for name, side in ((name, side) for pair, side in zip(names, size) for name in pair):
        xmp = re.sub(rb"(%s\s*=\s*[\"']|<%s>)\d+" % (name, name), rb"\g<1>%d" % side, xmp)
    return xmp


def _read_iptc(image: Image.Image, text: Mapping[str, str]) -> bytes:
    """The IPTC records of a file: from Photoshop's resources, a tag of a TIFF, or ImageMagick's text in a PNG."""
    resources = image.info.get("photoshop")
    if isinstance(resources, dict) and isinstance(resources.get(PHOTOSHOP_IPTC), bytes):
        return resources[PHOTOSHOP_IPTC]
    if isinstance(image, TiffImageFile):
        # The bytes themselves: some writers declare them to be numbers of 32 bits, of which Pillow gives the first.
        value = getattr(image.tag_v2, "_tagdata", {}).get(TIFF_IPTC, b"")
        return value or _iptc_resource(image.tag_v2.get(TIFF_PHOTOSHOP, b""))
    for name in ("iptc", "8bim"):
        if (profile := text.get(PNG_PROFILE + name)) is not None:
            data = bytes.fromhex("".join(profile.split()[2:]))  # its name, its length, and the bytes
            return _iptc_resource(data) if data.startswith(b"8BIM") else data
    return b""


def _xmp_of_iptc(iptc: bytes) -> bytes:
    """XMP with the texts of IPTC records, for formats that hold no IPTC; empty if there are none."""
    values: dict[int, list[str]] = {}
    start = 0
    while iptc[start : start + 2] == b"\x1c\x02" and len(iptc) >= start + 5:
        number, length = struct.unpack_from(">BH", iptc, start + 2)
        data = iptc[start + 5 : start + 5 + length]
        try:
            text = data.decode()
        except UnicodeDecodeError:
            text = data.decode("latin-1")
        values.setdefault(number, []).append(escape(re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f]", "", text)))
        start += 5 + length
    parts = []
    for number, (name, kind, language) in IPTC_IN_XMP.items():
        if number in values:
            items = "".join(f"<rdf:li{language}>{value}</rdf:li>" for value in values[number])
            parts.append(f"<{name}><rdf:{kind}>{items}</rdf:{kind}></{name}>")
    return XMP_PACKET.format("".join(parts)).encode() if parts else b""


def _iptc_resource(data: bytes) -> bytes:
    """The IPTC records among Photoshop's resources."""
    start = 0
    while data[start : start + 4] == b"8BIM":
        number, name_length = struct.unpack_from(">HB", data, start + 4)
        start += 6 + (name_length + 2) // 2 * 2
        (length,) = struct.unpack_from(">I", data, start)
        if number == PHOTOSHOP_IPTC:
            return data[start + 4 : start + 4 + length]
        start += 4 + (length + 1) // 2 * 2
    return b""


def _resource(iptc: bytes) -> bytes:
    """Photoshop's resource with IPTC records."""
    return struct.pack(">4sHHI", b"8BIM", PHOTOSHOP_IPTC, 0, len(iptc)) + iptc + bytes(len(iptc) % 2)


def _segment(marker: int, head: bytes, data: bytes) -> bytes:
    """A segment of a JPEG; nothing if there is no data or too much."""
    if not data or len(head) + len(data) > JPEG_SEGMENT:
        return b""
    return struct.pack(">BBH", 0xFF, marker, 2 + len(head) + len(data)) + head + data


def _png_texts(metadata: Mapping[str, Any], xmp: bytes, iptc: bytes) -> PngImagePlugin.PngInfo:
    """The chunks of text of a PNG."""
    chunks = PngImagePlugin.PngInfo()
    texts = dict(metadata.get("text", {}))
    if "comment" in metadata:
        texts.setdefault("Comment", metadata["comment"].decode("utf-8", "replace").rstrip("\0"))
    for name, value in texts.items():
        with suppress(UnicodeError, ValueError):  # a name that a chunk cannot have
            chunks.add_text(name, value) if value.isascii() else chunks.add_itxt(name, value)
    if xmp:
        chunks.add_itxt(PNG_XMP, xmp.decode("utf-8", "replace"))
    if iptc:
        data = _resource(iptc).hex()
        lines = "\n".join(data[i : i + 72] for i in range(0, len(data), 72))
        chunks.add_text(f"{PNG_PROFILE}iptc", f"\niptc\n{len(data) // 2:8}\n{lines}\n", zip=True)
    return chunks
