"""Photos in memory: tensors, sizes and contact sheets; and finding the images of a folder."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pictures import picture, pixels
from PIL import Image

from fastperc import InputError
from fastperc.photos.photo import Photo, contact_sheet, find_images, to_image


def test_to_image_clamps_and_rounds_to_nearest():
    levels = torch.tensor([-3.0, -0.001, 0.0, 0.49, 0.51, 1.0, 127.4, 127.6, 254.51, 255.0, 300.0]) / 255
    image = to_image(levels.expand(3, 2, -1))
    assert (image.mode, image.size) == ("RGB", (11, 2))
    assert pixels(image)[0, :, 0].tolist() == [0, 0, 0, 0, 1, 1, 127, 128, 255, 255, 255]


def test_tensor_and_back_is_exact():
    photo = Photo(Image.fromarray(np.arange(768, dtype=np.uint8).reshape(16, 16, 3)))
    x = photo.tensor()
    assert (x.shape, x.dtype) == ((1, 3, 16, 16), torch.float32) and x.max() == 1
    assert (pixels(to_image(x[0])) == pixels(photo.rgb)).all()


@pytest.mark.parametrize(("size", "long_side", "expected"), [((64, 32), 16, (16, 8)), ((3, 500), 50, (1, 50))], ids=str)
def test_resized(size, long_side, expected):
    photo = Photo(picture(*size), picture(*size).getchannel("R"), {"dpi": (72, 72)}).resized(long_side)
    assert photo.rgb.size == photo.alpha.size == expected
    assert photo.metadata == {"dpi": (72, 72)}


def test_resizing_to_too_many_pixels_is_refused():
    with pytest.raises(InputError, match="1000000×500000 is larger than"):
        Photo(picture(64, 32)).resized(1_000_000)


def test_find_images(tmp_path):
    names = ["b.JPG", "a.png", "nested/deep/c.webp", "nested/d.gif", "Z.tif"]
    for name in [*names, ".hidden.png", ".cache/e.png", "nested/.f.png", "notes.txt", "paper.pdf", "film.mpg", "jpg"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert find_images(tmp_path) == sorted(tmp_path / name for name in names)


def test_find_images_follows_links_and_visits_each_folder_once(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "more").mkdir()
    (tmp_path / "photos" / "a.png").touch()
    (tmp_path / "more" / "b.png").touch()
    (tmp_path / "photos" / "back").symlink_to(tmp_path / "photos")
    (tmp_path / "photos" / "over").symlink_to(tmp_path / "more")
    (tmp_path / "more" / "again").symlink_to(tmp_path / "photos")
    (tmp_path / "photos" / "itself").symlink_to(tmp_path / "photos" / "itself")
    assert find_images(tmp_path / "photos") == [tmp_path / "photos" / "a.png", tmp_path / "photos" / "over" / "b.png"]


@pytest.mark.parametrize("name", ["missing", "empty", "file.txt", "only-hidden"])
def test_find_images_refuses_a_folder_without_any(tmp_path, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").touch()
    (tmp_path / "only-hidden").mkdir()
    (tmp_path / "only-hidden" / ".a.png").touch()
    with pytest.raises(InputError, match=name):
        find_images(tmp_path / name)


def test_contact_sheet():
    rows = [torch.zeros(3, 3, 16, 20), torch.full((3, 3, 16, 20), 0.5)]
    sheet = pixels(contact_sheet(rows, gap=4))
    assert sheet.shape == (16 + 4 + 16, 20 + 4 + 20 + 4 + 20, 3)
    assert (sheet[:16, :20] == 0).all() and (sheet[16:20] == 255).all() and (sheet[:, 20:24] == 255).all()
    assert (sheet[20:, 24:44] == 128).all()
