"""Photographs through a style network, from files to files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import picture
from PIL import Image

from fastperc import InputError, TransformNet, freeze, reference
from fastperc.images import Photo, read_image
from fastperc.reference import Window
from fastperc.stylize import plan, read_photo, stylize, stylize_files


@pytest.fixture(scope="module")
def engine():
    torch.manual_seed(0)
    return freeze(TransformNet("instance", width=4))


class Inverse:
    """An engine whose painting is known: the negative. It paints in two parts."""

    scale = -1.0

    def tiles(self, image, tile, dtype, watch):
        height, width, _ = image.shape
        for top, rows in ((0, 7), (7, height - 7)):
            part = image[top : top + rows].permute(2, 0, 1)[None].to(dtype) / 255
            yield Window(top, 0, rows, width), 1 + self.scale * part


def pixels(image):
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("size", [(16, 16), (17, 23), (33, 18), (61, 47)], ids=lambda size: f"{size[0]}x{size[1]}")
def test_the_painting_is_as_large_as_the_photo(engine, size):
    photo = Photo(picture(*size))
    painting = stylize(engine, photo).rgb
    assert (painting.mode, painting.size) == ("RGB", size)
    assert (pixels(painting) != pixels(photo.rgb)).mean() > 0.5


def test_alpha_and_metadata_are_passed_on(engine):
    photo = Photo(picture(20, 18), picture(20, 18).getchannel("R"), {"dpi": (300, 300)})
    painting = stylize(engine, photo)
    assert painting.alpha is photo.alpha and painting.metadata == {"dpi": (300, 300)}


@pytest.mark.parametrize("keep_colors", [False, True], ids=["", "keep-colors"])
def test_strength_0_is_the_photo_itself(engine, keep_colors):
    photo = Photo(picture(33, 21))
    assert (pixels(stylize(engine, photo, 0.0, keep_colors).rgb) == pixels(photo.rgb)).all()


@pytest.mark.parametrize("strength", [0.25, 0.5, 1.0])
def test_strength_blends_photo_and_painting(strength):
    photo = Photo(picture(33, 21))
    blend = pixels(stylize(Inverse(), photo, strength).rgb)
    expected = (1 - strength) * pixels(photo.rgb) + strength * (255 - pixels(photo.rgb))
    assert np.abs(blend - expected).max() <= 0.51


def test_keep_colors_takes_the_lightness_and_keeps_the_chroma():
    # Mid-tones about grey, so that no channel is clamped.
    photo = Photo(Image.fromarray((110 + 30 * np.random.default_rng(0).random((18, 20, 3))).astype(np.uint8)))
    x = photo.tensor()
    y = stylize(Inverse(), photo, keep_colors=True).tensor()
    chroma_x, chroma_y = x - reference.luma(x), y - reference.luma(y)
    assert (chroma_x - chroma_y).abs().max() <= 1.01 / 255
    assert (reference.luma(y) - reference.luma(1 - x)).abs().max() <= 0.51 / 255


def test_an_output_that_is_not_a_number_is_an_error():
    engine = Inverse()
    engine.scale = float("nan")
    with pytest.raises(FloatingPointError, match="not a number"):
        stylize(engine, Photo(picture(20, 18)))


def test_read_photo_resizes(tmp_path):
    picture(64, 48).save(tmp_path / "in.png")
    assert read_photo(tmp_path / "in.png").rgb.size == (64, 48)
    assert read_photo(tmp_path / "in.png", 32).rgb.size == (32, 24)


@pytest.mark.parametrize(
    ("size", "reason"),
    [(None, "15×64 is too small"), (32, "8×32 is too small"), (10**6, "234375×1000000 is larger than")],
    ids=["as-it-is", "32", "1000000"],
)
def test_read_photo_refuses_sizes_that_no_network_takes(tmp_path, size, reason):
    picture(15, 64).save(tmp_path / "in.png")
    with pytest.raises(InputError, match=f"in.png: {reason}"):
        read_photo(tmp_path / "in.png", size)


def test_files_are_written_in_folders_that_are_made(engine, tmp_path):
    picture(32, 24).save(tmp_path / "a.png")
    jobs = [(tmp_path / "a.png", tmp_path / "new" / "folder" / "a.png")]
    assert stylize_files(engine, jobs) == 0
    expected = stylize(engine, Photo(picture(32, 24))).rgb
    assert (pixels(read_image(jobs[0][1]).rgb) == pixels(expected)).all()


def test_one_bad_file_does_not_stop_the_rest(engine, tmp_path, capsys):
    for name in ("a.png", "c[red].png"):
        picture(32, 24).save(tmp_path / name)
    (tmp_path / "b[bold] :dog:.png").write_bytes(b"no image")
    (tmp_path / "out").mkdir()
    jobs = [(path, tmp_path / "out" / path.name) for path in sorted(tmp_path.glob("*.png"))]
    assert stylize_files(engine, jobs) == 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.png", "c[red].png"]
    err = capsys.readouterr().err
    assert f"skipped {tmp_path}/b[bold] :dog:.png: not an image" in err and "3/3" in err


def test_the_only_file_being_bad_is_an_error(engine, tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"a\.png: not an image"):
        stylize_files(engine, [(tmp_path / "a.png", tmp_path / "b.png")])
    assert not (tmp_path / "b.png").exists()


# What becomes of which inputs. A tree of files, its names relative to the folder the test runs in.
FILES = ["a.jpg", "b.png", "anim.gif", "scan", "photos/a.jpg", "photos/nested/c.webp", "photos/d.gif", "other/a.jpg"]
PLANS = {
    "one, beside": (["a.jpg"], None, {"a.jpg": "a-wave.jpg"}),
    "one, to a file": (["a.jpg"], "x/out.PNG", {"a.jpg": "x/out.PNG"}),
    "one, to a folder": (["a.jpg"], "new", {"a.jpg": "new/a.jpg"}),
    "one, to a folder with a dot": (["a.jpg"], "existing.d", {"a.jpg": "existing.d/a.jpg"}),
    "unwritable format": (["anim.gif"], None, {"anim.gif": "anim-wave.gif.png"}),
    "no suffix": (["scan"], None, {"scan": "scan-wave.png"}),
    "several, beside": (["a.jpg", "b.png"], None, {"a.jpg": "a-wave.jpg", "b.png": "b-wave.png"}),
    "several, to a folder": (["a.jpg", "anim.gif"], "o", {"a.jpg": "o/a.jpg", "anim.gif": "o/anim.gif.png"}),
    "the same twice": (["a.jpg", "./a.jpg"], "o", {"a.jpg": "o/a.jpg"}),
    "a file and its folder": (["other", "other/a.jpg"], "o", {"other/a.jpg": "o/a.jpg"}),
    "folder": (
        ["photos"],
        "o",
        {"photos/a.jpg": "o/a.jpg", "photos/d.gif": "o/d.gif.png", "photos/nested/c.webp": "o/nested/c.webp"},
    ),
    "folder, beside": (["other"], None, {"other/a.jpg": "{here}/other-wave/a.jpg"}),
    "folder, to the one above": (["photos/nested"], "photos", {"photos/nested/c.webp": "photos/c.webp"}),
    "folder, to itself where no name collides": (["gifs"], "gifs", {"gifs/e.gif": "gifs/e.gif.png"}),
    "folder, to one within": (["again"], "again/out", {"again/f.png": "again/out/f.png"}),
    "file and folder": (["b.png", "other"], "o", {"b.png": "o/b.png", "other/a.jpg": "o/a.jpg"}),
}


@pytest.fixture
def tree(tmp_path, monkeypatch):
    for name in [*FILES, "gifs/e.gif", "again/f.png", "again/out/f.png", "finished/out/f.png", "file.d"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for name in ("existing.d", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "link.jpg").symlink_to("a.jpg")
    (tmp_path / "circle.jpg").symlink_to("circle.jpg")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", PLANS)
def test_plan(tree, name):
    inputs, out, expected = PLANS[name]
    jobs = plan([Path(path) for path in inputs], out and Path(out), "wave")
    assert jobs == [(Path(source), Path(target.format(here=tree))) for source, target in expected.items()]
    assert not Path("o").exists(), "planning makes no folders"


def test_plan_for_the_folder_one_is_in(tree, monkeypatch):
    monkeypatch.chdir(tree / "other")
    assert plan([Path(".")], None, "wave") == [(Path("a.jpg"), tree / "other-wave" / "a.jpg")]


REFUSED = {
    "missing": (["a.jpg", "missing.jpg"], "o", "missing.jpg: no such file or folder"),
    "circle": (["circle.jpg"], None, "circle.jpg: no such file or folder"),
    "a name too long": (["x" * 300], None, "no such file or folder"),
    "empty folder": (["empty"], None, "empty: no images"),
    "only earlier results": (["finished"], "finished/out", "no images in this folder besides those in finished/out"),
    "unknown suffix": (["a.jpg"], "out.xyz", "no image format is written as '.xyz'"),
    "not a folder": (["a.jpg"], "scan", "scan: no image format"),
    "several to a picture": (["a.jpg", "b.png"], "out.png", "out.png: several images need a folder"),
    "several to a file": (["a.jpg", "b.png"], "file.d", "file.d: several images need a folder"),
    "folder to a picture": (["photos"], "out.png", "out.png: several images need a folder"),
    "over the input": (["a.jpg"], "a.jpg", "a.jpg: would overwrite an input"),
    "over a link to it": (["a.jpg"], "link.jpg", "link.jpg: would overwrite an input"),
    "over the input of another": (["other/a.jpg", "a.jpg"], ".", "a.jpg: would overwrite an input"),
    "folder over itself": (["other"], "other", "other/a.jpg: would overwrite an input"),
    "two of one name": (["a.jpg", "photos/a.jpg"], "o", "photos/a.jpg and a.jpg would both become o/a.jpg"),
    "two folders of one name": (["photos", "other"], "o", "other/a.jpg and photos/a.jpg would both become o/a.jpg"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_plan_refuses(tree, name):
    inputs, out, reason = REFUSED[name]
    with pytest.raises(InputError) as caught:
        plan([Path(path) for path in inputs], out and Path(out), "wave")
    assert reason in str(caught.value)
