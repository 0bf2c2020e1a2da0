"""Training crops: their order is a function of seed and position, and unreadable photos are skipped and named."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pictures import picture
from PIL import Image

from fastperc import InputError
from fastperc.training.crops import PhotoCrops, batches


def test_crops_depend_on_seed_and_position_alone(photo_folder):
    first, second, other = (PhotoCrops(photo_folder, 24, seed) for seed in (3, 3, 4))
    for i in (0, 5, 40):
        crop, _ = first[i]
        assert crop.shape == (3, 24, 24) and crop.dtype == torch.uint8
        assert torch.equal(crop, second[i][0])
    assert not all(torch.equal(first[i][0], other[i][0]) for i in range(7))


def test_every_epoch_shows_every_photo_in_a_new_order(tmp_path):
    for i in range(8):
        Image.new("RGB", (30, 40), (i * 30, 0, 0)).save(tmp_path / f"{i}.png")
    crops = PhotoCrops(tmp_path, 16)
    epochs = [[int(crops[epoch * 8 + i][0][0, 0, 0]) for i in range(8)] for epoch in range(3)]
    assert all(sorted(epoch) == [i * 30 for i in range(8)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_crops_of_the_photos_own_pixels(tmp_path):
    photo = picture(50, 40)
    photo.save(tmp_path / "a.png")
    crops, places = PhotoCrops(tmp_path, 16, resize=False), set()
    whole = torch.from_numpy(np.array(photo)).permute(2, 0, 1)
    windows = whole.unfold(1, 16, 1).unfold(2, 16, 1).permute(1, 2, 0, 3, 4)  # by row and column of the first pixel
    for i in range(12):
        crop, _ = crops[i]
        upright, flipped = ((windows == c).all(dim=(2, 3, 4)).nonzero().tolist() for c in (crop, crop.flip(2)))
        (place,) = upright or flipped
        places.add(tuple(place))
    rows, columns = zip(*places)
    assert len(places) > 6 and max(rows) - min(rows) > 8 and max(columns) - min(columns) > 8
    assert PhotoCrops(tmp_path, 64, resize=False)[0][0].shape == (3, 64, 64), "a small photo is made larger"


@pytest.mark.parametrize("side", [60, 120, 300], ids=["enlarged", "own-size", "reduced"])
def test_crops_at_several_scales(tmp_path, side):
    """The steepness of a ramp in a crop tells the size that the crop's photo was resized to."""
    ramp = np.broadcast_to(np.linspace(0, 255, 2 * side)[None, :, None], (side, 2 * side, 3))
    Image.fromarray(ramp.round().astype(np.uint8)).save(tmp_path / "ramp.png")
    crops, sides, lefts = PhotoCrops(tmp_path, 48, resize=(48, 120)), [], []
    for i in range(200):
        rows = crops[i][0].double().mean(dim=(0, 1)).numpy()
        rows = rows[:: 1 if rows[-1] > rows[0] else -1]
        sides.append(255 * 47 / (rows[-1] - rows[0]) / 2)
        lefts.append(rows[0] / 255)
    assert 46 < min(sides) < 54 and 114 < max(sides) < 125 and abs(np.mean(sides) - 84) < 5
    assert min(lefts) < 0.05 and max(lefts) > 0.6
    again = PhotoCrops(tmp_path, 48, resize=(48, 120))
    assert torch.equal(again[77][0], crops[77][0])


def test_the_smallest_of_several_scales_shows_the_whole_photo(tmp_path):
    photo = picture(90, 90)
    photo.save(tmp_path / "a.png")
    expected = torch.from_numpy(np.array(photo.resize((32, 32), Image.Resampling.BICUBIC))).permute(2, 0, 1)
    crop, _ = PhotoCrops(tmp_path, 32, resize=(32, 32))[0]
    assert torch.equal(crop, expected) or torch.equal(crop.flip(2), expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_begin_anywhere(photo_folder, workers):
    crops = PhotoCrops(photo_folder, 16)
    whole = [batch for batch, _ in batches(crops, 2, 0, 5, 0)]
    rest = [batch for batch, _ in batches(crops, 2, 3, 5, workers)]
    assert len(whole) == 5 and len(rest) == 2
    assert all(torch.equal(a, b) for a, b in zip(whole[3:], rest))


def test_unreadable_photos_are_skipped_and_named(photo_folder):
    crops = PhotoCrops(photo_folder, 16)
    assert len(crops.paths) == 7
    skipped = frozenset().union(*(crops[i][1] for i in range(7)))
    assert skipped == {str(photo_folder / "broken.jpg")}


def test_a_folder_without_a_readable_photo_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        PhotoCrops(tmp_path / "none", 16)
    with pytest.raises(InputError, match="no images"):
        PhotoCrops(tmp_path, 16)
    (tmp_path / "a.jpg").write_bytes(b"not an image")
    with pytest.raises(InputError, match="none of the 1 images can be read"):
        PhotoCrops(tmp_path, 16)[0]


def test_crops_show_the_photo_and_nothing_else(tmp_path):
    """A crop of a photo twice as wide as high is one of its windows, or one flipped left to right."""
    photo = picture(48, 24)
    photo.save(tmp_path / "wide.png")
    pixels = torch.frombuffer(bytearray(photo.tobytes()), dtype=torch.uint8).view(24, 48, 3).permute(2, 0, 1)
    windows = [pixels[:, :, left : left + 24] for left in range(25)]
    crops = PhotoCrops(tmp_path, 24)
    seen = set()
    for i in range(40):
        crop, _ = crops[i]
        matches = [j for j, window in enumerate(windows) if torch.equal(crop, window)]
        matches += [100 + j for j, window in enumerate(windows) if torch.equal(crop, window.flip(2))]
        assert len(matches) == 1
        seen.add(matches[0])
    assert len(seen) > 10 and min(seen) < 100 <= max(seen)


@pytest.mark.parametrize("size", [(200, 100), (37, 90), (16, 16), (10, 300)], ids=str)
def test_any_photo_gives_full_crops(tmp_path, size):
    picture(*size).save(tmp_path / "photo.jpg")
    for i in range(5):
        assert PhotoCrops(tmp_path, 33)[i][0].shape == (3, 33, 33)


def test_photos_are_read_as_the_other_commands_read_them(tmp_path):
    """Upright, 16-bit in their full range, alpha dropped; a large JPEG may be decoded at a fraction of its size."""
    ramp = np.linspace(0, 65535, 24 * 24).reshape(24, 24).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    crop, _ = PhotoCrops(tmp_path, 24)[0]
    assert crop.min() == 0 and crop.max() == 255 and abs(crop.float().mean() - 127.5) < 2

    (tmp_path / "ramp.png").unlink()
    large = picture(8, 8).resize((400, 400), Image.Resampling.BICUBIC)  # smooth: any good resampling agrees
    large.save(tmp_path / "large.jpg", quality=95)
    crop, _ = PhotoCrops(tmp_path, 24)[0]
    small = torch.from_numpy(np.array(large.resize((24, 24), Image.Resampling.BOX))).permute(2, 0, 1)
    assert min((crop.float() - side.float()).abs().mean() for side in (small, small.flip(2))) < 3


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("cache", [False, True], ids=["decoded", "packed"])
def test_processes_share_batches(photo_folder, cache, processes):
    crops = PhotoCrops(photo_folder, 16, cache=cache)
    shares = [list(batches(crops, 4, 1, 3, 0, rank, processes)) for rank in range(processes)]
    for position in range(2):
        batch = torch.cat([share[position][0] for share in shares])
        assert torch.equal(batch, torch.stack([crops[4 + 4 * position + i][0] for i in range(4)]))
    assert shares[0][0][0].is_contiguous(memory_format=torch.channels_last)
