"""Training photos: the order is a function of seed and position, and damage is skipped and counted."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import picture
from PIL import Image

from fastperc import InputError, dispatch
from fastperc.training import packed
from fastperc.training.crops import PhotoCrops, batches
from fastperc.training.packed import ahead


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
        here = [(windows == one).all(dim=(2, 3, 4)).nonzero().tolist() for one in (crop, crop.flip(2))]
        (place,) = here[0] or here[1]
        places.add(tuple(place))
    rows, columns = zip(*places)
    assert len(places) > 6 and max(rows) - min(rows) > 8 and max(columns) - min(columns) > 8
    assert PhotoCrops(tmp_path, 64, resize=False)[0][0].shape == (3, 64, 64), "a small photo is made larger"


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
    """A crop of a photo twice as wide as high is one of its windows, or the mirror image of one."""
    photo = picture(48, 24)
    photo.save(tmp_path / "wide.png")
    pixels = torch.frombuffer(bytearray(photo.tobytes()), dtype=torch.uint8).view(24, 48, 3).permute(2, 0, 1)
    windows = [pixels[:, :, left : left + 24] for left in range(25)]
    crops = PhotoCrops(tmp_path, 24)
    seen = set()
    for i in range(40):
        crop, _ = crops[i]
        found = [j for j, window in enumerate(windows) if torch.equal(crop, window)]
        found += [100 + j for j, window in enumerate(windows) if torch.equal(crop, window.flip(2))]
        assert len(found) == 1
        seen.add(found[0])
    assert len(seen) > 10 and min(seen) < 100 <= max(seen)


@pytest.mark.parametrize("size", [(200, 100), (37, 90), (16, 16), (10, 300)], ids=str)
def test_any_photo_gives_full_crops(tmp_path, size):
    picture(*size).save(tmp_path / "photo.jpg")
    for i in range(5):
        assert PhotoCrops(tmp_path, 33)[i][0].shape == (3, 33, 33)


def test_photos_are_read_as_everywhere_else(tmp_path):
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


def packs():
    folder = dispatch.cache_folder() / "photos"
    return sorted(folder.iterdir()) if folder.exists() else []


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "some photos"
    (folder / "within").mkdir(parents=True)
    for i in range(5):
        picture(30 + 9 * i, 40, seed=i).save(folder / ("within" if i % 2 else "") / f"{i}.png")
    (folder / "broken.jpg").write_bytes(b"not an image")
    return folder


def same(a, b):
    return all(torch.equal(a[i][0], b[i][0]) and a[i][1] == b[i][1] for i in range(2 * len(a.paths)))


@pytest.mark.parametrize("size", [16, 35], ids=str)
@pytest.mark.parametrize("resize", [True, False], ids=["resized", "own-pixels"])
def test_packed_photos_give_the_same_crops(photos, resize, size):
    decoded = PhotoCrops(photos, size, 5, resize)
    assert same(decoded, PhotoCrops(photos, size, 5, resize, cache=True))
    assert same(decoded, PhotoCrops(photos, size, 5, resize, cache=True)), "as found again"
    assert not all(one[1] == frozenset() for one in map(decoded.__getitem__, range(6)))


def test_photos_are_packed_once(photos, monkeypatch, capsys):
    crops = PhotoCrops(photos, 16, cache=True)
    first = capsys.readouterr().err
    (place,) = packs()
    assert f"photos packed: {place} (0 MiB); --cache off does without" in first
    monkeypatch.setattr(packed, "prepared", None)  # it cannot be called
    again = PhotoCrops(photos, 16, cache=True)
    assert same(crops, again) and f"photos as packed before: {place} (0 MiB)" in capsys.readouterr().err
    entries = json.loads((place / "index.json").read_text())["photos"]
    assert (place / "photos.u8").stat().st_size == 3 * sum(entry[1] * entry[2] for entry in entries if entry)


@pytest.mark.parametrize("change", ["another", "fewer", "touched"])
def test_a_changed_folder_is_packed_anew(photos, change):
    for size in (16, 20):
        PhotoCrops(photos, size, cache=True)
    before = packs()
    if change == "another":
        picture(33, 33).save(photos / "9.png")
    elif change == "fewer":
        (photos / "0.png").unlink()
    else:
        os.utime(photos / "0.png", ns=(1, 1))
    assert same(PhotoCrops(photos, 16), PhotoCrops(photos, 16, cache=True))
    after = packs()
    assert len(after) == 2 and len(set(before) & set(after)) == 1, "what was packed at another size stays"


@pytest.mark.parametrize("damage", ["cut", "no-index", "half-an-index"])
def test_damaged_packs_are_made_anew(photos, damage):
    crops = PhotoCrops(photos, 16, cache=True)
    (place,) = packs()
    del crops
    if damage == "cut":
        os.truncate(place / "photos.u8", 1000)
    elif damage == "no-index":
        (place / "index.json").unlink()
    else:
        (place / "index.json").write_text('{"bytes": 1000, "pho')
    assert same(PhotoCrops(photos, 16), PhotoCrops(photos, 16, cache=True))
    assert len(packs()) == 1 and packs()[0] == place


def test_what_a_killed_run_left_is_never_read_and_goes_in_the_end(photos, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    PhotoCrops(photos, 16, cache=True)
    (place,) = packs()
    left = [place.with_name(f".{place.name}.{name}") for name in ("0000", "1111")]
    for folder in left:
        shutil.copytree(place, folder)
        (folder / "index.json").unlink()
    old = time.time() - 2 * packed.ABANDONED
    for entry in (left[0], *left[0].iterdir()):
        os.utime(entry, (old, old))
    shutil.rmtree(place)
    assert same(PhotoCrops(photos, 16), PhotoCrops(photos, 16, cache=True))
    assert packs() == sorted([place, left[1]]), "the other may still be at work"

    shutil.rmtree(place)
    monkeypatch.setattr(packed.os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        PhotoCrops(photos, 16, cache=True)
    assert packs() == [left[1]]


def test_runs_pack_at_the_same_time(photos, monkeypatch):
    """All of them decode; the first to be done wins, the others take what is there."""
    together, real = threading.Barrier(3), os.fsync
    monkeypatch.setattr(packed.os, "fsync", lambda file: (real(file), together.wait(30)))
    found = []
    runs = [threading.Thread(target=lambda: found.append(PhotoCrops(photos, 16, cache=True))) for _ in range(3)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert len(found) == 3 and len(packs()) == 1
    assert all(same(crops, PhotoCrops(photos, 16)) for crops in found)


@pytest.mark.parametrize("cause", ["limit", "disk", "file"])
def test_photos_that_cannot_be_packed_are_decoded(photos, monkeypatch, capsys, cause):
    needed = 3 * 16 * 16 * 5
    if cause == "limit":
        monkeypatch.setattr(packed, "LARGEST", needed - 1)
    elif cause == "disk":
        monkeypatch.setattr(packed.shutil, "disk_usage", lambda path: SimpleNamespace(free=2 * needed - 1))
    else:
        dispatch.cache_folder().mkdir(parents=True)
        (dispatch.cache_folder() / "photos").write_text("in the way")
    crops = PhotoCrops(photos, 16, cache=True)
    (told,) = capsys.readouterr().err.splitlines()
    wanted = "cannot be written (" if cause == "file" else "packed they would take 0 MiB"
    assert told.startswith("photos are decoded as they are needed: ") and wanted in told
    assert crops.packed is None and same(crops, PhotoCrops(photos, 16))


@pytest.mark.parametrize("content", ["no image", "half an image"])
def test_nothing_is_packed_of_a_folder_without_a_readable_photo(tmp_path, content):
    picture(60, 50).save(tmp_path / "a.jpg")
    half = (tmp_path / "a.jpg").read_bytes()[:700]
    (tmp_path / "a.jpg").write_bytes(b"no image" if content == "no image" else half)
    with pytest.raises(InputError, match=f"{tmp_path}: none of the 1 images can be read"):
        PhotoCrops(tmp_path, 16, cache=True)[0]
    assert packs() == []


def test_a_photo_too_long_is_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(packed, "MAX_PIXELS", 16 * 100)
    picture(200, 8).save(tmp_path / "long.png")
    picture(20, 20).save(tmp_path / "square.png")
    for cache in (False, True):
        crops = PhotoCrops(tmp_path, 16, cache=cache)
        assert set().union(*(crops[i][1] for i in range(2))) == {str(tmp_path / "long.png")}


def test_work_is_done_ahead_and_in_order():
    begun = []

    def work(item):
        begun.append(item)
        time.sleep(0.01 * (item % 3))
        return item * item

    results = ahead(work, iter(range(50)), threads=3, depth=5)
    assert [next(results) for _ in range(4)] == [0, 1, 4, 9]
    results.close()
    assert len(begun) <= 4 + 5, "no more than was asked for and five"
    assert list(ahead(work, range(20), 3, 5)) == [item * item for item in range(20)]
    failing = ahead(lambda item: 1 // (item - 2), range(9), 2, 4)
    assert [next(failing), next(failing)] == [-1, -1]
    with pytest.raises(ZeroDivisionError):
        next(failing)
