"""Jobs: the output file of each input, and bad files among several."""

from __future__ import annotations

from pathlib import Path

import pytest
from pictures import picture, pixels
from PIL import ImageOps

from fastperc import InputError
from fastperc.photos.jobs import plan_jobs, run_jobs
from fastperc.photos.photo import Photo, read_image


def flip(path, watch):
    return Photo(ImageOps.mirror(read_image(path).rgb))


def test_missing_output_folders_are_created(tmp_path):
    picture(32, 24).save(tmp_path / "a.png")
    jobs = [(tmp_path / "a.png", tmp_path / "new" / "folder" / "a.png")]
    assert run_jobs(jobs, "painting", flip) == 0
    expected = ImageOps.mirror(picture(32, 24))
    assert (pixels(read_image(jobs[0][1]).rgb) == pixels(expected)).all()


def test_one_bad_file_does_not_stop_the_rest(tmp_path, capsys):
    for name in ("a.png", "c[red].png"):
        picture(32, 24).save(tmp_path / name)
    (tmp_path / "b[bold] :dog:.png").write_bytes(b"no image")
    (tmp_path / "out").mkdir()
    jobs = [(path, tmp_path / "out" / path.name) for path in sorted(tmp_path.glob("*.png"))]
    assert run_jobs(jobs, "painting", flip) == 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.png", "c[red].png"]
    err = capsys.readouterr().err
    assert f"skipped {tmp_path}/b[bold] :dog:.png: not an image" in err and "3/3" in err


def test_a_bad_file_alone_is_an_error(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"a\.png: not an image"):
        run_jobs([(tmp_path / "a.png", tmp_path / "b.png")], "painting", flip)
    assert not (tmp_path / "b.png").exists()


# inputs, --out → the expected jobs. Names are relative to the folder of the `tree` fixture.
FILES = ["a.jpg", "b.png", "anim.gif", "scan", "photos/a.jpg", "photos/nested/c.webp", "photos/d.gif", "other/a.jpg"]
JOBS = {
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
    "folder, to its parent": (["photos/nested"], "photos", {"photos/nested/c.webp": "photos/c.webp"}),
    "folder, to itself, without a collision of names": (["gifs"], "gifs", {"gifs/e.gif": "gifs/e.gif.png"}),
    "folder, to a subfolder": (["again"], "again/out", {"again/f.png": "again/out/f.png"}),
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


@pytest.mark.parametrize("name", JOBS)
def test_plan_jobs(tree, name):
    inputs, out, expected = JOBS[name]
    jobs = plan_jobs([Path(path) for path in inputs], out and Path(out), "wave")
    assert jobs == [(Path(source), Path(target.format(here=tree))) for source, target in expected.items()]
    assert not Path("o").exists(), "planning creates no folders"


def test_jobs_of_the_current_folder(tree, monkeypatch):
    monkeypatch.chdir(tree / "other")
    assert plan_jobs([Path(".")], None, "wave") == [(Path("a.jpg"), tree / "other-wave" / "a.jpg")]


REFUSED = {
    "missing": (["a.jpg", "missing.jpg"], "o", "missing.jpg: no such file or folder"),
    "circle": (["circle.jpg"], None, "circle.jpg: no such file or folder"),
    "a name too long": (["x" * 300], None, "no such file or folder"),
    "empty folder": (["empty"], None, "empty: no images"),
    "only earlier results": (["finished"], "finished/out", "no images in this folder besides those in finished/out"),
    "unknown suffix": (["a.jpg"], "out.xyz", "cannot write an image as '.xyz'"),
    "not a folder": (["a.jpg"], "scan", "scan: the name has no suffix"),
    "several to an image": (["a.jpg", "b.png"], "out.png", "out.png: several images need a folder"),
    "several to a file": (["a.jpg", "b.png"], "file.d", "file.d: several images need a folder"),
    "folder to an image": (["photos"], "out.png", "out.png: several images need a folder"),
    "over the input": (["a.jpg"], "a.jpg", "a.jpg: would overwrite an input"),
    "over a link to it": (["a.jpg"], "link.jpg", "link.jpg: would overwrite an input"),
    "over the input of another": (["other/a.jpg", "a.jpg"], ".", "a.jpg: would overwrite an input"),
    "folder over itself": (["other"], "other", "other/a.jpg: would overwrite an input"),
    "two of one name": (["a.jpg", "photos/a.jpg"], "o", "photos/a.jpg and a.jpg would both become o/a.jpg"),
    "two folders of one name": (["photos", "other"], "o", "other/a.jpg and photos/a.jpg would both become o/a.jpg"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_plan_jobs_refuses(tree, name):
    inputs, out, reason = REFUSED[name]
    with pytest.raises(InputError) as caught:
        plan_jobs([Path(path) for path in inputs], out and Path(out), "wave")
    assert reason in str(caught.value)
