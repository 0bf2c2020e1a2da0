"""Images that a folder holds and no command can read are counted and named; plugins make some of them readable."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from pictures import picture, pixels
from PIL import Image

from fastperc import InputError
from fastperc.photos import formats
from fastperc.photos.folders import find_images, search
from fastperc.photos.photo import read_image

HEIC = "run `pip install 'fastperc[heif]'`"
RAW = "develop the camera's raw data into a JPEG or a TIFF of 16 bits"
missing = {suffix for suffix in formats.PLUGINS if suffix in formats.UNREADABLE_SUFFIXES}
needs_no_plugin = pytest.mark.skipif(".heic" not in missing or ".jxl" not in missing, reason="a plugin is installed")


@pytest.fixture
def closed(monkeypatch):
    """A function that makes a folder unreadable, also for root."""
    listed = os.scandir

    def close(*folders):
        def scandir(path="."):
            if Path(path) in folders:
                raise PermissionError(13, "Permission denied", str(path))
            return listed(path)

        monkeypatch.setattr(os, "scandir", scandir)

    return close


@pytest.fixture
def mixed(here):
    """A folder with one image that can be read and several files that cannot."""
    Path("photos/sub").mkdir(parents=True)
    picture(128, 96).save("photos/a.png")
    for name in ("b.HEIC", "c.jxl", "sub/d.heic", "e.nef", "f.svg", "notes.txt", ".hidden.heic", "film.mov"):
        Path("photos", name).write_bytes(b"not for Pillow")
    return Path("photos")


@needs_no_plugin
def test_search_names_what_it_leaves_out(mixed):
    found = search(mixed)
    assert found.images == [mixed / "a.png"]
    assert found.unreadable == [mixed / name for name in ("b.HEIC", "c.jxl", "e.nef", "f.svg", "sub/d.heic")]
    assert found.left_out == 5
    (line,) = found.lines()
    assert line == (
        "skipped 5 files (photos/b.HEIC, photos/c.jxl, photos/e.nef and 2 more); "
        f".heic, .jxl: {HEIC}; .nef: {RAW}; .svg: save it as PNG"
    )


@needs_no_plugin
@pytest.mark.parametrize("command", ["stylize", "sr upscale", "sr eval"])
def test_commands_name_and_count_what_they_leave_out(run, mixed, model, sr_model, command):
    options = {
        "stylize": ["photos", "-o", "out", "--model", model],
        "sr upscale": ["photos", "-o", "out", "--model", sr_model],
        "sr eval": ["--data", "photos", "--methods", "bicubic"],
    }[command]
    status, _, err = run(*command.split(), *options)
    film_is_named = command != "sr eval" and find_spec("av") is None  # or else it is read, and refused
    count = 6 if film_is_named else 5
    assert f"skipped {count} files (photos/b.HEIC, photos/c.jxl, photos/e.nef and {count - 3} more); " in err
    assert ".heic, .jxl: run" in err and (".mov: run" in err) == film_is_named
    assert ("skipped photos/film.mov: not a film" in err) == (command != "sr eval" and not film_is_named)
    assert status == (0 if command == "sr eval" else 2)
    assert command == "sr eval" or [path.name for path in Path("out").iterdir()] == ["a.png"]


@needs_no_plugin
def test_train_names_what_it_leaves_out(run, mixed, vgg_options):
    options = (
        "--style",
        "photos/a.png",
        "--data",
        "photos",
        "--size",
        16,
        "--iterations",
        1,
        "--batch",
        1,
        "--workers",
        0,
    )
    status, _, err = run("train", *options, "--out", "run", "--preset", "instance", "--width", 2, *vgg_options)
    assert status == 0 and "skipped 5 files (" in err and "b.HEIC" in err


def test_a_folder_that_cannot_be_listed_is_named_and_counted(run, mixed, model, closed):
    Path("photos/b.HEIC").unlink()
    for name in ("c.jxl", "sub/d.heic", "e.nef", "f.svg", "film.mov"):
        Path("photos", name).unlink()
    closed(mixed / "sub")
    status, _, err = run("stylize", "photos", "-o", "out", "--model", model)
    assert err.splitlines()[0] == "skipped 1 folder (photos/sub): Permission denied" and status == 2
    assert [path.name for path in Path("out").iterdir()] == ["a.png"]


def test_an_input_folder_that_cannot_be_listed_is_refused(refused, mixed, model, closed):
    closed(mixed)
    refused("stylize", "photos", "-o", "out", "--model", model, says="photos: cannot be read (Permission denied)")


@needs_no_plugin
def test_a_folder_of_nothing_else_is_refused_in_one_line(refused, here, model):
    Path("phone").mkdir()
    for i in range(5):
        Path(f"phone/{i}.heic").touch()
    refused("stylize", "phone", "--model", model,
            says="phone: no images in this folder; skipped 5 files (phone/0.heic, phone/1.heic, phone/2.heic and "
                 f"2 more); .heic: {HEIC}")  # fmt: skip


@needs_no_plugin
@pytest.mark.parametrize(
    ("name", "says"),
    [("a.heic", f"a.heic: Pillow cannot read .heic; {HEIC}"), ("a.JXL", f"a.JXL: Pillow cannot read .jxl; {HEIC}"),
     ("a.cr3", f"a.cr3: Pillow cannot read .cr3; {RAW}"), ("a.svg", "a.svg: Pillow cannot read .svg; save it as PNG")],
)  # fmt: skip
def test_a_single_file_is_refused_with_what_to_do(refused, here, model, name, says):
    Path(name).write_bytes(b"not for Pillow")
    refused("stylize", name, "--model", model, says=says)


def test_content_decides_not_the_suffix(tmp_path):
    picture(32, 24).save(tmp_path / "in.heic", "PNG")
    assert (pixels(read_image(tmp_path / "in.heic").rgb) == pixels(picture(32, 24))).all()


def test_find_images_prints_what_it_leaves_out(tmp_path, capsys):
    picture(32, 24).save(tmp_path / "a.png")
    (tmp_path / "b.nef").touch()
    assert find_images(tmp_path) == [tmp_path / "a.png"]
    assert capsys.readouterr().err.startswith(f"skipped 1 file ({tmp_path}/b.nef); .nef: {RAW}")
    (tmp_path / "a.png").unlink()
    with pytest.raises(InputError, match="no images in this folder; skipped 1 file"):
        find_images(tmp_path)


PLUGIN = """
from PIL import Image, PngImagePlugin

def register():
    Image.register_open(FORMAT, PngImagePlugin.PngImageFile, lambda head: head.startswith(bytes([137]) + b"PNG"))
    Image.register_extension(FORMAT, SUFFIX)
"""


@needs_no_plugin
def test_installed_plugins_are_used(here):
    """Stand-ins for the two packages, which read PNG."""
    Path("pillow_heif.py").write_text("FORMAT, SUFFIX = 'HEIF', '.heic'" + PLUGIN + "register_heif_opener = register\n")
    Path("pillow_jxl.py").write_text("FORMAT, SUFFIX = 'JXL', '.jxl'" + PLUGIN + "register()\n")
    Path("photos").mkdir()
    for name in ("a.heic", "b.jxl"):
        picture(32, 24).save(f"photos/{name}", "PNG")
    code = (
        "from pathlib import Path\nfrom fastperc.photos.folders import search\n"
        "from fastperc.photos.jobs import plan_jobs\n"
        "print(search('photos')); print(plan_jobs([Path('photos')], 'out', 'wave'))"
    )
    environment = os.environ | {"PYTHONPATH": f"{here}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert "photos/a.heic" in result.stdout and "unreadable=[]" in result.stdout, result.stderr
    assert "out/a.heic.png" in result.stdout and "out/b.jxl.png" in result.stdout


@pytest.mark.parametrize(
    ("package", "suffix"), [("pillow_heif", ".heic"), ("pillow_heif", ".heif"), ("pillow_jxl", ".jxl")]
)
def test_the_real_plugins(tmp_path, package, suffix):
    pytest.importorskip(package)
    picture(64, 48).save(tmp_path / f"in{suffix}", quality=95)
    assert abs(pixels(read_image(tmp_path / f"in{suffix}").rgb) - pixels(picture(64, 48))).mean() < 8
    assert Image.registered_extensions()[suffix] not in formats.SAVE_OPTIONS


# Frames


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
@pytest.mark.parametrize("command", ["stylize", "sr upscale", "sr eval", "optimize"])
def test_a_line_says_that_the_first_frame_alone_is_used(run, here, model, sr_model, vgg_options, command, suffix):
    Path("data").mkdir()
    frames = [picture(128, 96, seed=i) for i in range(3)]
    frames[0].save(f"data/a.{suffix}", save_all=True, append_images=frames[1:])
    optimize = [f"data/a.{suffix}", "--style", "photo.png", "--style-size", 16, "--iterations", 1, *vgg_options]
    options = {
        "stylize": [f"data/a.{suffix}", "-o", "out.jpg", "--model", model],
        "sr upscale": [f"data/a.{suffix}", "-o", "out.jpg", "--model", sr_model],
        "sr eval": ["--data", "data", "--methods", "bicubic"],
        "optimize": [*optimize, "-o", "out.png"],
    }[command]
    status, _, err = run(*command.split(), *options)
    assert status == 0
    assert err.count(f"data/a.{suffix}: holds 3 frames; only the first is used\n") == 1


@pytest.mark.parametrize("command", ["optimize", "train"])
def test_the_frames_of_a_painting_are_counted(run, here, vgg_options, command):
    frames = [picture(32, 24, seed=i) for i in range(3)]
    frames[0].save("painting.gif", save_all=True, append_images=frames[1:])
    options = "--style", "painting.gif", "--style-size", 16, "--iterations", 1, *vgg_options
    if command == "optimize":
        result = run("optimize", "photo.png", "-o", "out.png", *options)
    else:
        Path("photos").mkdir()
        Path("photo.png").rename("photos/photo.png")
        result = run("train", "--data", "photos", "--out", "run", "--size", 16, "--workers", 0, *options)
    assert result.status == 0, result.err
    assert result.err.count("painting.gif: holds 3 frames; only the first is used\n") == 1
