"""What an engine takes besides tensors, and ``fastperc.read_image``: NumPy arrays, PIL images and paths."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pictures import picture
from PIL import Image, ImageCms

import fastperc
from fastperc import InputError, SuperResolutionNet, TransformNet, freeze


@pytest.fixture(scope="module")
def engine():
    return freeze(TransformNet("paper", width=8).eval())


@pytest.fixture(scope="module")
def photo():
    return picture(40, 28)


def levels(image):
    return torch.from_numpy(np.array(image.convert("RGB")))


def test_numpy_levels(engine, photo):
    array = np.array(photo)
    painted = engine(array)
    assert isinstance(painted, np.ndarray) and painted.dtype == np.uint8
    assert np.array_equal(painted, engine(levels(photo)).numpy())
    batch = engine(np.stack([array, array]))
    assert batch.shape == (2, 28, 40, 3) and np.array_equal(batch[1], painted)


def test_numpy_floats(engine):
    x = np.random.default_rng(0).random((2, 3, 20, 24), dtype=np.float32)
    painted = engine(x)
    assert isinstance(painted, np.ndarray) and np.array_equal(painted, engine(torch.from_numpy(x)).numpy())


@pytest.mark.filterwarnings("error")
def test_numpy_memory_that_pytorch_cannot_share(engine, photo):
    array = np.array(photo)
    for view in (array[:, :, ::-1], array[::-1], array[:, ::2], np.asarray(photo)):  # BGR, turned, a slice, read-only
        assert np.array_equal(engine(view), engine(np.array(view)))


def test_pil_images(engine, photo):
    painted = engine(photo)
    assert isinstance(painted, Image.Image) and painted.mode == "RGB"
    assert torch.equal(levels(painted), engine(levels(photo)))
    assert torch.equal(levels(engine(photo, tile=16)), engine(levels(photo), tile=16))


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr"])
def test_pil_modes_become_rgb(engine, photo, mode):
    image = photo.convert(mode)
    assert torch.equal(levels(engine(image)), engine(levels(image)))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparency_is_kept(engine, photo, mode):
    image = photo.convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    image = image.convert("LA").convert("PA") if mode == "PA" else image.convert(mode)
    painted = engine(image)
    assert painted.mode == "RGBA"
    assert np.array_equal(painted.getchannel("A"), image.convert("RGBA").getchannel("A"))
    large = freeze(SuperResolutionNet(4, width=4).eval())(image)
    assert large.mode == "RGBA" and large.size == (160, 112)


def test_a_turned_pil_image_comes_out_upright(engine, photo, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.save(tmp_path / "turned.png", exif=exif)
    upright = photo.transpose(Image.Transpose.ROTATE_270)
    for image in (Image.open(tmp_path / "turned.png"), tmp_path / "turned.png", str(tmp_path / "turned.png")):
        painted = engine(image)
        assert isinstance(painted, Image.Image) and painted.size == (28, 40)
        assert torch.equal(levels(painted), engine(levels(upright)))


def test_a_profile_stays_with_a_pil_image(engine, photo):
    photo = photo.copy()
    photo.info["icc_profile"] = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert engine(photo).info["icc_profile"] == photo.info["icc_profile"]


def test_tiles_and_stream_take_them_too(engine, photo):
    array = np.array(photo)
    ((_, part),) = engine.tiles(photo)
    assert torch.equal(part, engine(levels(photo)).permute(2, 0, 1)[None])
    first, second = engine.stream([array, photo])
    assert isinstance(first, np.ndarray) and isinstance(second, Image.Image)
    assert np.array_equal(first, np.array(second))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ([1, 2, 3], "expected a tensor, a NumPy array, a PIL image or a path, got list"),
        (None, "got NoneType"),
        (np.zeros((20, 20, 3), dtype=np.uint16), "uint16"),
        (np.zeros((20, 20, 3), dtype=complex), "complex128"),
        (np.array(["a"]), "expected uint8 levels"),
        (np.zeros((20, 20), dtype=np.uint8), r"got torch.uint8 \[20, 20\]"),
        (Image.new("I;16", (20, 20)), "mode I;16 has no known range"),
        (Image.new("F", (20, 20)), "mode F has no known range"),
    ],
    ids=["list", "none", "uint16", "complex", "text", "gray", "pil-I;16", "pil-F"],
)
def test_refuses(engine, image, message):
    with pytest.raises(ValueError, match=message) as caught:
        engine(image)
    assert "\n" not in str(caught.value)


def test_a_path_that_cannot_be_read(engine, tmp_path):
    with pytest.raises(InputError, match="no such file"):
        engine(tmp_path / "missing.jpg")


def test_read_image(tmp_path, photo):
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.save(tmp_path / "turned.png", exif=exif)
    image = fastperc.read_image(tmp_path / "turned.png")
    assert image.mode == "RGB" and image.size == (28, 40)
    assert np.array_equal(image, photo.transpose(Image.Transpose.ROTATE_270))
    photo.convert("L").save(tmp_path / "gray.png")
    assert fastperc.read_image(str(tmp_path / "gray.png")).mode == "RGB"
    with pytest.raises(InputError, match="no such file"):
        fastperc.read_image(tmp_path / "missing.png")


def test_read_image_keeps_transparency(tmp_path, photo):
    image = photo.copy()
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    image.save(tmp_path / "clear.png")
    assert np.array_equal(fastperc.read_image(tmp_path / "clear.png"), image)


def test_read_image_converts_the_profile(tmp_path, photo):
    """A profile with another gamma than sRGB's: the image is the one that a colour-managed viewer shows."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    table = {bytes(profile[i : i + 4]): i for i in range(132, 132 + 12 * int.from_bytes(profile[128:132], "big"), 12)}
    for tag in (b"rTRC", b"gTRC", b"bTRC"):  # a curve without entries is the identity: linear light
        offset = int.from_bytes(profile[table[tag] + 4 : table[tag] + 8], "big")
        profile[offset : offset + 12] = b"curv" + bytes(8)
        profile[table[tag] + 8 : table[tag] + 12] = (12).to_bytes(4, "big")
    photo.save(tmp_path / "linear.png", icc_profile=bytes(profile))
    linear = np.array(photo) / 255
    expected = 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    assert np.abs(np.array(fastperc.read_image(tmp_path / "linear.png")) - expected).max() <= 3
