"""Packed photos: the same crops, packed once, packed again when a file changes, and never read half-written."""

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
from pictures import picture
from PIL import Image

from fastperc import InputError
from fastperc.files import cache_folder
from fastperc.training import packed
from fastperc.training.crops import PhotoCrops


def packs():
    folder = cache_folder() / "photos"
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
@pytest.mark.parametrize("resize", [True, False, (35, 50)], ids=["resized", "own-pixels", "several-scales"])
def test_packed_photos_give_the_same_crops(photos, resize, size):
    decoded = PhotoCrops(photos, size, 5, resize)
    assert same(decoded, PhotoCrops(photos, size, 5, resize, cache=True))
    assert same(decoded, PhotoCrops(photos, size, 5, resize, cache=True)), "from the file packed before"
    assert any(unreadable for _, unreadable in map(decoded.__getitem__, range(6)))


def test_photos_are_packed_once(photos, capsys):
    crops = PhotoCrops(photos, 16, cache=True)
    (folder,) = packs()
    assert f"packed the photos into {folder} (0 MiB); --cache off turns this off" in capsys.readouterr().err
    for photo in photos.rglob("*.png"):  # of the same size and age, and an image no more
        state = photo.stat()
        photo.write_bytes(bytes(state.st_size))
        os.utime(photo, ns=(state.st_atime_ns, state.st_mtime_ns))
    again = PhotoCrops(photos, 16, cache=True)
    assert same(crops, again) and f"using the photos packed in {folder} (0 MiB)" in capsys.readouterr().err
    entries = json.loads((folder / "index.json").read_text())["photos"]
    assert (folder / "photos.u8").stat().st_size == 3 * sum(entry[1] * entry[2] for entry in entries if entry)


def test_photos_for_several_scales_are_packed_at_the_largest_and_never_enlarged(photos):
    crops = PhotoCrops(photos, 16, resize=(20, 36), cache=True)
    sides = {path.name: min(crops.packed[i].shape[:2]) for i, path in enumerate(crops.paths) if path.suffix == ".png"}
    assert sides == {"0.png": 30, "1.png": 36, "2.png": 36, "3.png": 36, "4.png": 36}


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
    assert len(after) == 2 and len(set(before) & set(after)) == 1, "photos packed at another size stay"


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


@pytest.mark.parametrize("cache", [True, False], ids=["packed", "decoded"])
@pytest.mark.parametrize("resize", [True, False, (24, 40)], ids=["resized", "own-pixels", "several-scales"])
def test_colors_hidden_under_transparency_are_not_seen(tmp_path, resize, cache):
    levels = np.zeros((40, 40, 4), np.uint8)  # black that is transparent, and a white disc
    y, x = np.mgrid[:40, :40] - 19.5
    levels[x**2 + y**2 < 15**2] = 255
    Image.fromarray(levels).save(tmp_path / "disc.png")
    crops = PhotoCrops(tmp_path, 24, 0, resize, cache=cache)
    assert all((crops[i][0] == 255).all() for i in range(4))


def test_packs_of_an_older_version_are_neither_read_nor_kept(photos, monkeypatch):
    version = packed.FORMAT
    monkeypatch.setattr(packed, "FORMAT", 1)
    PhotoCrops(photos, 16, cache=True)
    (older,) = packs()
    monkeypatch.setattr(packed, "FORMAT", version)
    PhotoCrops(photos, 16, cache=True)
    assert version > 1 and len(packs()) == 1 and packs() != [older]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_named_pipe_is_not_waited_for(photos):
    os.mkfifo(photos / "pipe.png")
    assert same(PhotoCrops(photos, 16), PhotoCrops(photos, 16, cache=True))


def test_a_killed_runs_folder_is_never_read_and_is_removed_later(photos, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    PhotoCrops(photos, 16, cache=True)
    (place,) = packs()
    left = [place.with_name(f".{place.name}.{name}") for name in ("0000", "1111")]
    for folder in left:
        shutil.copytree(place, folder)
        (folder / "index.json").unlink()
    old = time.time() - 2 * packed.ABANDONED_AFTER
    for entry in (left[0], *left[0].iterdir()):
        os.utime(entry, (old, old))
    shutil.rmtree(place)
    assert same(PhotoCrops(photos, 16), PhotoCrops(photos, 16, cache=True))
    assert packs() == sorted([place, left[1]]), "the other run may still be packing"

    shutil.rmtree(place)
    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        PhotoCrops(photos, 16, cache=True)
    assert packs() == [left[1]]


def test_runs_pack_at_the_same_time(photos, monkeypatch):
    """All of them decode; the first to finish puts its folder in place, the others use that one."""
    barrier, fsync = threading.Barrier(3), os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (fsync(file), barrier.wait(30)))
    results = []
    runs = [threading.Thread(target=lambda: results.append(PhotoCrops(photos, 16, cache=True))) for _ in range(3)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert len(results) == 3 and len(packs()) == 1
    assert all(same(crops, PhotoCrops(photos, 16)) for crops in results)


@pytest.mark.parametrize("cause", ["limit", "disk", "file"])
def test_photos_that_cannot_be_packed_are_decoded(photos, monkeypatch, capsys, cause):
    needed = 3 * 16 * 16 * 5
    if cause == "limit":
        monkeypatch.setattr(packed, "MAX_BYTES", needed - 1)
    elif cause == "disk":
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2 * needed - 1))
    else:
        cache_folder().mkdir(parents=True)
        (cache_folder() / "photos").write_text("in the way")
    crops = PhotoCrops(photos, 16, cache=True)
    (message,) = capsys.readouterr().err.splitlines()
    reason = "cannot be written (" if cause == "file" else "which would take 0 MiB"
    assert message.startswith("not packing the photos") and reason in message
    assert message.endswith("; decoding them as needed")
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
