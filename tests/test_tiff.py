"""Reading TIFF files: photometric, sample formats, ranges, byte orders, planes, pages, previews and raw data."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL
import pytest
from photo_files import tiff, tiff_page
from pictures import picture, pixels
from PIL import Image, ImageCms

from fastperc import InputError
from fastperc.photos.photo import read_image

RAMP = np.linspace(0, 1, 600).reshape(20, 30)
COLORS = np.stack([RAMP, 1 - RAMP, np.full((20, 30), 0.5)], axis=2)
ORDERS = {"little-endian": "<", "big-endian": ">"}


def write_and_read(path, *pages, order="<"):
    path.write_bytes(tiff(*pages, order=order))
    return read_image(path)


def of(dtype, values=RAMP):
    """``values`` in 0–1 as numbers that span ``dtype``, or 0–1 for floating-point numbers."""
    dtype = np.dtype(dtype)
    return values.astype(dtype) if dtype.kind == "f" else (values * np.iinfo(dtype).max).round().astype(dtype)


def check_ramp(photo, expected=RAMP[..., None]):
    assert np.abs(pixels(photo.rgb) / 255 - expected).max() <= 1.01 / 255
    assert photo.alpha is None and photo.frames == 1


@pytest.mark.parametrize("compressed", [False, True], ids=["", "compressed"])
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "uint32", "int32", "float32"])
def test_gray_samples(tmp_path, dtype, order, compressed):
    page = tiff_page(of(dtype), order=order, compressed=compressed)
    if (dtype, order) == ("uint32", ">"):
        with pytest.raises(InputError, match="1 × 32 bits a pixel, unsigned integers, BlackIsZero, big-endian"):
            write_and_read(tmp_path / "in.tif", page, order=order)
    else:
        check_ramp(write_and_read(tmp_path / "in.tif", page, order=order))


@pytest.mark.parametrize("compressed", [False, True], ids=["", "compressed"])
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_white_is_zero(tmp_path, dtype, order, compressed):
    page = tiff_page(of(dtype), 0, order, compressed=compressed)
    if (dtype, order) == ("uint16", ">"):
        with pytest.raises(InputError, match="WhiteIsZero, big-endian: Pillow cannot read it; save it with 8 bits"):
            write_and_read(tmp_path / "in.tif", page, order=order)
    else:
        check_ramp(write_and_read(tmp_path / "in.tif", page, order=order), 1 - RAMP[..., None])


@pytest.mark.parametrize("compressed", [False, True], ids=["", "compressed"])
@pytest.mark.parametrize("planes", [False, True], ids=["", "planes"])
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_color_samples(tmp_path, dtype, order, planes, compressed):
    page = tiff_page(of(dtype, COLORS), 2, order, planes, compressed)
    check_ramp(write_and_read(tmp_path / "in.tif", page, order=order), COLORS)


@pytest.mark.parametrize("planes", [False, True], ids=["", "planes"])
@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_color_samples_with_alpha(tmp_path, dtype, order, planes):
    samples = np.concatenate([COLORS, 1 - RAMP[..., None]], axis=2)
    photo = write_and_read(tmp_path / "in.tif", tiff_page(of(dtype, samples), 2, order, planes, _338=2), order=order)
    assert np.abs(pixels(photo.rgb) / 255 - COLORS).max() <= 1.01 / 255
    assert np.abs(pixels(photo.alpha) / 255 - (1 - RAMP)).max() <= 1.01 / 255


@pytest.mark.parametrize("planes", [False, True], ids=["", "planes"])
def test_inks(tmp_path, planes):
    inks = np.concatenate([COLORS, np.zeros((20, 30, 1))], axis=2)
    check_ramp(write_and_read(tmp_path / "in.tif", tiff_page(of("uint8", inks), 5, planes=planes)), 1 - COLORS)


def test_lab(tmp_path):
    lab = ImageCms.profileToProfile(
        picture(30, 20), ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    lab.save(tmp_path / "in.tif")
    assert np.abs(pixels(read_image(tmp_path / "in.tif").rgb) - pixels(picture(30, 20))).mean() < 6


@pytest.mark.parametrize("top", [255, 65535])
def test_a_palette_of_eight_or_sixteen_bits_a_color(tmp_path, top):
    colors = [round(top * value / 255) for value in [*range(256), *range(255, -1, -1), *[128] * 256]]
    check_ramp(write_and_read(tmp_path / "in.tif", tiff_page(of("uint8"), 3, _320=colors)), COLORS)


ROTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@pytest.mark.parametrize("orientation", ROTATIONS)
@pytest.mark.parametrize("compressed", [False, True], ids=["", "compressed"])
@pytest.mark.parametrize(
    ("dtype", "values", "photometric"),
    [("uint8", RAMP, 1), ("uint8", RAMP, 0), ("uint16", RAMP, 1), ("float32", RAMP, 1), ("uint16", COLORS, 2),
     ("uint8", np.repeat(RAMP[..., None], 4, 2), 5), ("uint8", np.repeat(RAMP[..., None], 4, 2), 2)],
    ids=["gray", "white-is-zero", "gray16", "float", "colors16", "inks", "alpha"],
)  # fmt: skip
def test_every_kind_of_samples_is_turned_upright(tmp_path, dtype, values, photometric, compressed, orientation):
    pages = [tiff_page(of(dtype, values), photometric, compressed=compressed, _274=turn) for turn in (1, orientation)]
    expected, photo = (write_and_read(tmp_path / "in.tif", page) for page in pages)
    assert (pixels(photo.rgb) == pixels(expected.rgb.transpose(ROTATIONS[orientation]))).all()


@pytest.mark.skipif(int(PIL.__version__.split(".")[0]) < 13, reason="Pillow reads it from version 13 on")
def test_gray_premultiplied_by_alpha(tmp_path):
    samples = np.stack([RAMP * 0.5, np.full((20, 30), 0.5)], axis=2)
    photo = write_and_read(tmp_path / "in.tif", tiff_page(of("uint8", samples), 1, _338=1))
    assert np.abs(pixels(photo.rgb)[..., 0] / 255 - RAMP).max() <= 2.01 / 255
    assert (pixels(photo.alpha) == 128).all()


# White of samples that do not say where it is


@pytest.mark.parametrize("white", [1, 255, 65535, 2**31 - 1])
@pytest.mark.parametrize("dtype", ["float32", "int32", "uint32"])
def test_white_is_found_from_the_values(tmp_path, dtype, white):
    page = tiff_page((RAMP * white).astype(dtype))
    if dtype == "float32" and white == 2**31 - 1:
        with pytest.raises(InputError, match=r"in.tif: floating-point levels up to 2.15e\+09, of no known range"):
            write_and_read(tmp_path / "in.tif", page)
    elif dtype == "float32" or white > 1:
        check_ramp(write_and_read(tmp_path / "in.tif", page), (RAMP if white != 2**31 - 1 or dtype == "int32" else
                                                               RAMP / 2)[..., None])  # fmt: skip


@pytest.mark.parametrize("white", [1, 255, 65535])
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 1e30, -1e30, -5])
def test_one_extreme_value_leaves_the_others_as_they_are(tmp_path, value, white):
    values = (RAMP * white).astype(np.float32)
    values[0, 0] = value
    photo = write_and_read(tmp_path / "in.tif", tiff_page(values))
    expected = RAMP.copy()
    expected[0, 0] = value > 0
    check_ramp(photo, expected[..., None])


def test_highlights_above_white(tmp_path):
    values = (RAMP * 1.5).astype(np.float32)
    check_ramp(write_and_read(tmp_path / "in.tif", tiff_page(values)), values.clip(0, 1)[..., None])


def test_a_dark_image_with_a_bright_sign(tmp_path):
    values = np.zeros((20, 30), np.float32)
    values[:2, :2] = [[100, 200], [150, 255]]
    check_ramp(write_and_read(tmp_path / "in.tif", tiff_page(values)), values[..., None] / 255)


@pytest.mark.parametrize("value", [0, -3, np.nan, -np.inf])
def test_nothing_but_black(tmp_path, value):
    photo = write_and_read(tmp_path / "in.tif", tiff_page(np.full((20, 30), value, np.float32)))
    assert (pixels(photo.rgb) == 0).all()


# What Pillow cannot decode

UNREADABLE = {
    "floating-point colours": ((COLORS.astype("float32"), 2), "3 × 32 bits a pixel, floating-point numbers, RGB: "),
    "integer colours": ((of("uint32", COLORS), 2), "3 × 32 bits a pixel, unsigned integers, RGB"),
    "half precision": ((of("float16"), 1), "1 × 16 bits a pixel, floating-point numbers, BlackIsZero"),
    "double precision": ((of("float64"), 1), "1 × 64 bits a pixel, floating-point numbers"),
    "signed bytes": ((of("int8"), 1), "1 × 8 bits a pixel, signed integers"),
    "complex numbers": ((RAMP.astype("complex64"), 1), "complex numbers"),
    "gray with alpha": ((of("uint16", COLORS[..., :2]), 1), "2 × 16 bits a pixel, unsigned integers"),
    "ICC Lab": ((of("uint8", COLORS), 9), "ICC Lab"),
    "an unknown photometric": ((of("uint8"), 4711), "photometric interpretation 4711"),
    "a colour filter array": ((of("uint16"), 32803), "holds the raw data of a camera"),
    "linear raw": ((of("uint16", COLORS), 34892), "holds the raw data of a camera"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_samples_that_cannot_be_decoded_are_refused_by_name(tmp_path, name):
    page, says = UNREADABLE[name]
    with pytest.raises(InputError) as caught:
        write_and_read(tmp_path / "in.tif", tiff_page(*page))
    assert str(caught.value).startswith(f"{tmp_path}/in.tif: ") and says in str(caught.value)


REFUSED = {
    "undefined samples": (of("uint8"), dict(_339=4), "undefined samples"),
    "other inks": (of("uint8", np.repeat(COLORS[..., :1], 4, 2)), dict(photometric=5, _332=2), "other than CMYK"),
    "inks in planes of 16 bits": (
        of("uint16", np.repeat(COLORS[..., :1], 4, 2)), dict(photometric=5, planes=True), "CMYK, in planes"
    ),
    "gray and alpha in planes": (of("uint8", COLORS[..., :2]), dict(planes=True, _338=2), "BlackIsZero, in planes"),
    "subsampled": (of("uint8", COLORS)[:10], dict(photometric=6, _257=20, _530=[2, 1]), "subsampled YCbCr"),
    "an unknown compression": (of("uint8"), dict(_259=4711), "compression 4711"),
    "a negative": (of("uint8"), dict(_50706=[1, 4, 0, 0]), "holds the raw data of a camera"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_pillow_would_decode_wrongly_is_refused_by_name(tmp_path, name):
    values, tags, says = REFUSED[name]
    with pytest.raises(InputError, match=says):
        write_and_read(tmp_path / "in.tif", tiff_page(values, **tags))


def test_a_big_endian_bigtiff_is_refused_by_name(tmp_path):
    (tmp_path / "in.tif").write_bytes(b"MM\0+\0\x08\0\0" + bytes(64))
    with pytest.raises(InputError, match="a BigTIFF in big-endian order"):
        read_image(tmp_path / "in.tif")


# Pages


def small(**tags):
    return tiff_page(of("uint8", COLORS)[::4, ::3], 2, **tags)


WHOLE = tiff_page(of("uint8", COLORS), 2)


@pytest.mark.parametrize(
    "preview",
    [small(_254=1), small(_255=2), tiff_page(of("uint8", COLORS)[::4, ::4], 2), tiff_page(of("uint8"), 1, _254=4)],
    ids=["flagged", "flagged as in TIFF 5", "of the same proportions", "mask"],
)
@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
def test_a_preview_is_not_the_picture(tmp_path, preview, first):
    pages = (preview, WHOLE) if first else (WHOLE, preview)
    check_ramp(write_and_read(tmp_path / "in.tif", *pages), COLORS)


def test_a_file_of_previews_gives_the_first(tmp_path):
    assert write_and_read(tmp_path / "in.tif", small(_254=1), small(_254=1)).rgb.size == (10, 5)


def test_several_pages_are_counted(tmp_path):
    other = tiff_page(of("uint8", 1 - COLORS), 2)
    photo = write_and_read(tmp_path / "in.tif", small(_254=1), WHOLE, small(_254=1), other, other)
    assert photo.frames == 3
    assert np.abs(pixels(photo.rgb) / 255 - COLORS).max() <= 1.01 / 255


def test_a_later_page_that_cannot_be_read_does_not_matter(tmp_path):
    assert write_and_read(tmp_path / "in.tif", WHOLE, tiff_page(of("float64"))).frames == 2


@pytest.mark.parametrize("flag", [dict(_254=1), {}], ids=["flagged", "not flagged"])
def test_a_preview_beside_raw_data_is_refused(tmp_path, flag):
    raw = tiff_page(of("uint16"), 32803)
    with pytest.raises(InputError, match="holds the raw data of a camera, which Pillow cannot read; develop it"):
        write_and_read(tmp_path / "in.nef", small(_330=raw, **flag))


@pytest.mark.parametrize(
    ("page", "says"),
    [(tiff_page(of("uint16"), 32803), "holds the raw data of a camera"),
     (tiff_page(of("float64")), "1 × 64 bits a pixel, floating-point numbers"),
     (tiff_page(of("uint8", COLORS), 2, _259=4711), "compression 4711")],
    ids=["raw", "double precision", "compression"],
)  # fmt: skip
def test_a_preview_before_a_page_that_cannot_be_read_is_refused(tmp_path, page, says):
    with pytest.raises(InputError, match=says):
        write_and_read(tmp_path / "in.tif", small(_254=1), page)


def test_the_preview_in_a_cr2_is_refused(tmp_path):
    # The first page is a preview without a flag. The bytes after the header say what the file is.
    (tmp_path / "in.tif").write_bytes(tiff(tiff_page(of("uint8", COLORS), 2)))
    data = bytearray((tmp_path / "in.tif").read_bytes())
    data[8:12] = b"CR\2\0"  # the first pixels
    (tmp_path / "in.tif").write_bytes(data)
    with pytest.raises(InputError, match="holds the raw data of a camera"):
        read_image(tmp_path / "in.tif")


def test_a_picture_with_a_smaller_version_below_it_is_read(tmp_path):
    check_ramp(write_and_read(tmp_path / "in.tif", tiff_page(of("uint8", COLORS), 2, _330=small(_254=1))), COLORS)


def test_pages_in_a_circle(tmp_path):
    data = bytearray(tiff(WHOLE, WHOLE))
    first = int.from_bytes(data[4:8], "little")
    data[-4:] = first.to_bytes(4, "little")
    (tmp_path / "in.tif").write_bytes(data)
    assert read_image(tmp_path / "in.tif").frames == 2


def test_frames_of_an_animation_are_counted(tmp_path):
    for suffix in ("gif", "png", "webp"):
        frames = [picture(32, 24, seed=i) for i in range(3)]
        frames[0].save(tmp_path / f"in.{suffix}", save_all=True, append_images=frames[1:])
        assert read_image(tmp_path / f"in.{suffix}").frames == 3
    picture(32, 24).save(tmp_path / "in.png")
    assert read_image(tmp_path / "in.png").frames == 1


def test_the_second_picture_of_a_jpeg_is_no_frame(tmp_path):
    Image.new("RGB", (32, 24)).save(tmp_path / "in.mpo", save_all=True, append_images=[Image.new("RGB", (32, 24))])
    assert read_image(tmp_path / "in.mpo").frames == 1


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "jpeg", "group4"])
def test_libtiff_prints_nothing_about_damage(tmp_path, capfd, compression):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 400, 3), dtype=np.uint8))
    (image.convert("1") if compression == "group4" else image).save(tmp_path / "in.tif", compression=compression)
    data = bytearray((tmp_path / "in.tif").read_bytes())
    for position in range(1000, len(data) - 1000, 500):
        data[position] ^= 255
    for end in (len(data), len(data) // 2):
        (tmp_path / "in.tif").write_bytes(data[:end])
        try:
            read_image(tmp_path / "in.tif")
        except InputError as error:
            assert "damaged" in str(error) or "not an image" in str(error)
    assert capfd.readouterr() == ("", "")
    os.write(2, b"still there")
    assert capfd.readouterr().err == "still there"


def test_many_threads_read_while_others_print(tmp_path, capfd):
    Image.fromarray(of("uint8", COLORS)).save(tmp_path / "in.tif", compression="tiff_lzw")
    with ThreadPoolExecutor(8) as pool:
        sizes = {photo.rgb.size for photo in pool.map(lambda _: read_image(tmp_path / "in.tif"), range(200))}
    os.write(2, b"still there")
    assert sizes == {(30, 20)} and capfd.readouterr().err == "still there"
