"""Metadata of photos: what each format keeps of EXIF, XMP, IPTC, texts and profiles, and that sizes fit the picture."""

from __future__ import annotations

import struct
from xml.etree import ElementTree

import numpy as np
import pytest
from photo_files import DATE, EXIF_IFD, ORIENTATION, SRGB, exif, icc_profile, save_and_read, tiff, tiff_page
from pictures import picture, pixels
from PIL import ExifTags, Image, IptcImagePlugin, PngImagePlugin

from fastperc import InputError
from fastperc.photos.metadata import PROFILE_FORMATS
from fastperc.photos.photo import SUFFIXES, Photo, check_size, read_image, write_image

WIDTH, HEIGHT, ARTIST = 0xA002, 0xA003, 0x013B
XMP = b"""<?xpacket begin='' id='W5M0MpCehiHzreSzNTczkc9d'?><x:xmpmeta xmlns:x='adobe:ns:meta/'>
<rdf:RDF xmlns:rdf='http://www.w3.org/1999/02/22-rdf-syntax-ns#'><rdf:Description xmlns:tiff='http://ns.adobe.com/tiff/1.0/'
 xmlns:exif='http://ns.adobe.com/exif/1.0/' xmlns:dc='http://purl.org/dc/elements/1.1/' tiff:Orientation="6"
 tiff:ImageWidth="32" exif:PixelXDimension="32"><exif:PixelYDimension>24</exif:PixelYDimension>
<dc:subject><rdf:Bag><rdf:li>gr\xc3\xbcn</rdf:li></rdf:Bag></dc:subject></rdf:Description></rdf:RDF></x:xmpmeta>
<?xpacket end='w'?>"""


def record(number, value):
    return struct.pack(">BBBH", 0x1C, 2, number, len(value)) + value


IPTC = record(25, b"cat") + record(25, b"grass") + record(120, b"A cat in the grass.")
PHOTOSHOP = b"8BIM\x03\xed\0\0\0\0\0\x10" + bytes(16) + struct.pack(">4sHHI", b"8BIM", 0x0404, 0, len(IPTC)) + IPTC


def segment(marker, data):
    return struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data


def with_metadata(path):
    """A photo file with EXIF, XMP and IPTC, as far as its format holds them; returns the photo read from it."""
    image, suffix = picture(32, 24), path.suffix
    tags = Image.Exif()
    tags.load(exif())
    tags.get_ifd(EXIF_IFD).update({WIDTH: 32, HEIGHT: 24})
    if suffix == ".jpg":
        extra = segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP) + segment(0xED, b"Photoshop 3.0\0" + PHOTOSHOP)
        image.save(path, exif=tags.tobytes(), extra=extra, comment=b"a comment")
    elif suffix == ".tif":
        tags[700], tags[33723] = XMP, IPTC
        image.save(path, exif=tags)
    elif suffix == ".png":
        texts = PngImagePlugin.PngInfo()
        texts.add_itxt("XML:com.adobe.xmp", XMP.decode())
        texts.add_text("Raw profile type iptc", f"\niptc\n{len(PHOTOSHOP):8}\n{PHOTOSHOP.hex()}\n", zip=True)
        texts.add_text("Author", "M. Maker")
        texts.add_itxt("Title", "Grüße")
        image.save(path, exif=tags.tobytes(), pnginfo=texts)
    else:
        image.save(path, exif=tags.tobytes(), xmp=XMP)
    return read_image(path)


FORMATS = [".jpg", ".png", ".tif", ".webp", ".avif"]


def xmp_of(path):
    with Image.open(path) as image:
        return image.info.get("xmp") or b""


@pytest.mark.parametrize("target", FORMATS)
@pytest.mark.parametrize("source", FORMATS)
def test_sizes_in_exif_and_xmp_are_those_of_the_picture(tmp_path, source, target):
    photo = with_metadata(tmp_path / f"in{source}")
    photo.rgb = photo.rgb.resize((128, 96))
    write_image(tmp_path / f"out{target}", photo)
    with Image.open(tmp_path / f"out{target}") as written:
        details = written.getexif().get_ifd(EXIF_IFD)
    assert (details[WIDTH], details[HEIGHT], details[DATE]) == (128, 96, "2020:01:02 03:04:05")
    xmp = xmp_of(tmp_path / f"out{target}")
    for part in (
        b'exif:PixelXDimension="128"',
        b"<exif:PixelYDimension>96<",
        b'tiff:ImageWidth="128"',
        "grün".encode(),
    ):
        assert part in xmp
    assert b"Orientation" not in xmp


def test_a_size_that_is_not_there_is_not_added(tmp_path):
    write_image(tmp_path / "out.jpg", save_and_read(picture(32, 24), tmp_path / "in.jpg", exif=exif()))
    assert WIDTH not in Image.open(tmp_path / "out.jpg").getexif().get_ifd(EXIF_IFD)


def test_no_thumbnail_of_the_photo_is_kept(tmp_path):
    page = tiff_page(np.zeros((12, 16), np.uint8))
    photo = save_and_read(picture(32, 24), tmp_path / "in.jpg", exif=b"Exif\0\0" + tiff(page, page))
    assert Image.open(tmp_path / "in.jpg").getexif().get_ifd(ExifTags.IFD.IFD1)
    photo.metadata.setdefault("exif", exif())
    write_image(tmp_path / "out.jpg", photo)
    assert not Image.open(tmp_path / "out.jpg").getexif().get_ifd(ExifTags.IFD.IFD1)


@pytest.mark.parametrize("orientation", ["attribute", "element"])
def test_an_orientation_in_xmp_alone_is_applied_once(tmp_path, orientation):
    xmp = XMP if orientation == "attribute" else XMP.replace(b'tiff:Orientation="6"', b"").replace(
        b"<dc:subject>", b"<tiff:Orientation>6</tiff:Orientation><dc:subject>"
    )  # fmt: skip
    picture(32, 24).save(tmp_path / "in.webp", xmp=xmp, lossless=True)
    photo = read_image(tmp_path / "in.webp")
    assert photo.rgb.size == (24, 32)
    write_image(tmp_path / "out.png", photo)
    again = read_image(tmp_path / "out.png")
    assert (pixels(again.rgb) == pixels(photo.rgb)).all()
    assert ORIENTATION not in Image.open(tmp_path / "out.png").getexif()


def test_xmp_about_a_gain_map_or_a_video_is_dropped(tmp_path):
    about = b"""xmlns:hdrgm="http://ns.adobe.com/hdr-gain-map/1.0/" hdrgm:Version="1.0" GCamera:MotionPhoto="1" tiff:"""
    directory = b"<Container:Directory>\n<rdf:Seq/></Container:Directory><dc:subject>"
    xmp = XMP.replace(b"tiff:Image", about + b"Image").replace(b"<dc:subject>", directory)
    picture(32, 24).save(tmp_path / "in.webp", xmp=xmp)
    kept = read_image(tmp_path / "in.webp").metadata["xmp"]
    assert not any(name in kept for name in (b"hdrgm:V", b"MotionPhoto", b"Directory"))
    assert "grün".encode() in kept and b"tiff:ImageWidth" in kept


@pytest.mark.parametrize("target", [".jpg", ".png", ".tif"])
@pytest.mark.parametrize("source", [".jpg", ".png", ".tif"])
def test_iptc_is_kept(tmp_path, source, target):
    write_image(tmp_path / f"out{target}", with_metadata(tmp_path / f"in{source}"))
    assert read_image(tmp_path / f"out{target}").metadata["iptc"] == IPTC
    if target != ".png":
        records = IptcImagePlugin.getiptcinfo(Image.open(tmp_path / f"out{target}"))
        assert records[(2, 25)] == [b"cat", b"grass"]


def test_iptc_of_a_tiff_in_numbers_of_32_bits(tmp_path):
    data = IPTC + bytes(-len(IPTC) % 4)
    page = tiff_page(np.zeros((24, 32), np.uint8), _33723=list(struct.unpack(f"<{len(data) // 4}I", data)))
    (tmp_path / "in.tif").write_bytes(tiff(page))
    assert read_image(tmp_path / "in.tif").metadata["iptc"] == data


@pytest.mark.parametrize("suffix", [".webp", ".avif"])
def test_iptc_becomes_xmp_where_there_is_no_iptc(tmp_path, suffix):
    iptc = IPTC + record(80, "Müller & Söhne".encode("latin-1")) + record(116, "© <me>".encode())
    write_image(tmp_path / f"out{suffix}", Photo(picture(32, 24), metadata={"iptc": iptc}))
    xmp = xmp_of(tmp_path / f"out{suffix}")
    texts = [element.text for element in ElementTree.fromstring(xmp).iter() if element.tag.endswith("}li")]
    assert texts == ["cat", "grass", "Müller & Söhne", "© <me>", "A cat in the grass."]
    write_image(tmp_path / "out.jpg", read_image(tmp_path / f"out{suffix}"))
    assert xmp_of(tmp_path / "out.jpg") == xmp


@pytest.mark.parametrize("suffix", [".jpg", ".tif", ".webp", ".avif"])
def test_texts_of_a_png_become_exif(tmp_path, suffix):
    write_image(tmp_path / f"out{suffix}", with_metadata(tmp_path / "in.png"))
    assert Image.open(tmp_path / f"out{suffix}").getexif()[ARTIST] == "M. Maker"


def test_texts_and_comments_are_kept(tmp_path):
    photo = with_metadata(tmp_path / "in.png")
    write_image(tmp_path / "out.png", photo)
    with Image.open(tmp_path / "out.png") as written:
        assert (written.text["Author"], written.text["Title"]) == ("M. Maker", "Grüße")
    photo = with_metadata(tmp_path / "in.jpg")
    for suffix in ("jpg", "png"):
        write_image(tmp_path / f"out.{suffix}", photo)
    assert Image.open(tmp_path / "out.jpg").info["comment"] == b"a comment"
    assert Image.open(tmp_path / "out.png").text["Comment"] == "a comment"


def test_what_is_too_long_for_a_jpeg_is_left_out(tmp_path):
    photo = Photo(picture(32, 24), metadata={"xmp": b"x" * 70_000, "iptc": b"y" * 70_000, "comment": b"z" * 70_000})
    write_image(tmp_path / "out.jpg", photo)
    assert read_image(tmp_path / "out.jpg").metadata == {}


@pytest.mark.parametrize("suffix", sorted(SUFFIXES))
def test_every_format_takes_all_metadata(tmp_path, suffix):
    photo = with_metadata(tmp_path / "in.jpg")
    photo.metadata |= with_metadata(tmp_path / "in.png").metadata
    write_image(tmp_path / f"out{suffix}", photo)
    assert (photo.rgb.size, read_image(tmp_path / f"out{suffix}").rgb.size) == ((24, 32), (24, 32))


@pytest.mark.parametrize("damage", ["cut", "random"])
@pytest.mark.parametrize("source", FORMATS)
def test_damaged_metadata_does_not_prevent_reading_and_writing(tmp_path, source, damage):
    photo = with_metadata(tmp_path / f"in{source}")
    rng = np.random.default_rng(0)
    for name, value in photo.metadata.items():
        if isinstance(value, bytes):
            photo.metadata[name] = value[: len(value) // 2] if damage == "cut" else rng.bytes(len(value))
    for suffix in FORMATS:
        write_image(tmp_path / f"out{suffix}", photo)
        assert read_image(tmp_path / f"out{suffix}").rgb.size == (24, 32)


# Profiles

GAMMA_1 = struct.pack(">4s4xI", b"curv", 0)


def xyz(*values):
    return struct.pack(">4s4x3i", b"XYZ ", *(round(65536 * value) for value in values))


LINEAR_RGB = icc_profile(
    b"RGB ", b"XYZ ", rTRC=GAMMA_1, gTRC=GAMMA_1, bTRC=GAMMA_1,
    rXYZ=xyz(0.4361, 0.2225, 0.0139), gXYZ=xyz(0.3851, 0.7169, 0.0971), bXYZ=xyz(0.1431, 0.0606, 0.7139),
)  # fmt: skip


@pytest.mark.parametrize("suffix", sorted(SUFFIXES))
def test_a_profile_is_kept_or_the_picture_converted(tmp_path, suffix):
    photo = save_and_read(Image.new("RGB", (32, 24), (128, 128, 128)), tmp_path / "in.png", icc_profile=LINEAR_RGB)
    write_image(tmp_path / f"out{suffix}", photo)
    kept = Image.registered_extensions()[suffix] in PROFILE_FORMATS
    with Image.open(tmp_path / f"out{suffix}") as written:
        assert written.info.get("icc_profile") == (LINEAR_RGB if kept else None)
        assert np.abs(pixels(written.convert("RGB")) - (128 if kept else 188)).max() <= 2
    assert (pixels(photo.rgb) == 128).all()


@pytest.mark.parametrize("suffix", [".bmp", ".ppm", ".tga", ".jp2"])
def test_srgb_is_not_changed_by_a_conversion(tmp_path, suffix):
    write_image(tmp_path / f"out{suffix}", Photo(picture(32, 24), metadata={"icc_profile": SRGB}))
    assert (pixels(read_image(tmp_path / f"out{suffix}").rgb) == pixels(picture(32, 24))).all()


# Limits


def test_a_png_with_a_large_profile_and_large_texts_is_read(tmp_path):
    texts = PngImagePlugin.PngInfo()
    texts.add_text("Layers", "x" * (3 << 20), zip=True)
    profile = SRGB + bytes(2 << 20)
    photo = save_and_read(picture(32, 24), tmp_path / "in.png", pnginfo=texts, icc_profile=profile)
    assert len(photo.metadata["icc_profile"]) == len(profile) and len(photo.metadata["text"]["Layers"]) == 3 << 20
    write_image(tmp_path / "out.jpg", photo)
    assert Image.open(tmp_path / "out.jpg").info["icc_profile"] == profile


def test_a_png_with_a_text_beyond_the_bound_is_not_called_damaged(tmp_path):
    texts = PngImagePlugin.PngInfo()
    texts.add_text("Layers", "x" * (65 << 20), zip=True)
    picture(32, 24).save(tmp_path / "in.png", pnginfo=texts)
    with pytest.raises(InputError, match=r"in\.png: holds a text or a profile of more than 64 MiB"):
        read_image(tmp_path / "in.png")


@pytest.mark.parametrize(("suffix", "side"), [(".jpg", 65_501), (".webp", 16_384), (".avif", 65_537), (".tga", 65_536)])
def test_a_picture_too_large_for_a_format(tmp_path, suffix, side):
    check_size(tmp_path / f"out{suffix}", side - 1, 20)
    check_size(tmp_path / "out.png", side, 20)
    for size in ((side, 20), (20, side)):
        with pytest.raises(
            InputError, match=rf"out\{suffix}: cannot be written as \w+, which holds [\d,]+ pixels a side"
        ):
            check_size(tmp_path / f"out{suffix}", *size)
