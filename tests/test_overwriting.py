"""No command writes over a file that it reads, by whatever name, and no two outputs are one file."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from pictures import picture
from refusals import contents

from fastperc import InputError, files
from fastperc.files import check_distinct, check_overwrites
from fastperc.photos.photo import read_image


@pytest.fixture
def ignoring_case(monkeypatch):
    """A file system that takes upper and lower case for one."""
    stat = os.stat

    def any_case(path, **options):
        try:
            return stat(path, **options)
        except FileNotFoundError:
            folder, name = os.path.split(os.path.abspath(path))
            for other in os.listdir(folder):
                if other.casefold() == name.casefold():
                    return stat(os.path.join(folder, other), **options)
            raise

    def exists(path):
        try:
            return bool(os.stat(path))
        except OSError:
            return False

    files._ignores_case.cache_clear()
    monkeypatch.setattr(os, "stat", any_case)
    monkeypatch.setattr(os.path, "exists", exists)
    yield
    files._ignores_case.cache_clear()


def other_name(kind, path):
    """Another name of the file at ``path``."""
    other = path.with_name(f"other{path.suffix}")
    if kind == "link":
        other.symlink_to(path.name)
    elif kind == "hard link":
        os.link(path, other)
    elif kind == "in a linked folder":
        Path("linked").symlink_to(".")
        other = Path("linked") / path.name
    elif kind == "absolute":
        other = path.absolute()
    else:
        other = path
    return other


NAMES = ["itself", "absolute", "link", "hard link", "in a linked folder"]


@pytest.mark.parametrize("kind", NAMES)
def test_optimize_writes_over_no_input(refused, here, vgg_file, vgg_options, kind):
    picture(32, 24, seed=1).save("painting.png")
    shutil.copy(vgg_file, "vgg.png")  # a name is no proof
    options = ["photo.png", "--style", "painting.png", "--vgg", "vgg.png", *vgg_options[2:]]
    for name in ("photo.png", "painting.png", "vgg.png"):
        out = other_name(kind, Path(name))
        refused("optimize", "-o", out, *options, says=f"{out}: would overwrite an input ({name}); name another output")
        for leftover in ("other.png", "linked"):
            Path(leftover).unlink(missing_ok=True)


@pytest.mark.parametrize("kind", NAMES)
def test_stylize_writes_over_no_input(refused, here, model, kind):
    shutil.copy(model, "model.png")
    for name in ("photo.png", "model.png"):
        out = other_name(kind, Path(name))
        refused(
            "stylize", "photo.png", "-o", out, "--model", "model.png", says=f"{out}: would overwrite an input ({name})"
        )
        for leftover in ("other.png", "linked"):
            Path(leftover).unlink(missing_ok=True)


def test_upscale_does_not_write_over_its_network(refused, here, sr_model):
    Path("out").mkdir()
    shutil.copy(sr_model, "out/photo.png")
    refused(
        "sr", "upscale", "photo.png", "-o", "out", "--model", "out/photo.png", says="would overwrite an input (out/ph"
    )


@pytest.mark.parametrize("option", ["--csv", "--markdown"])
def test_eval_writes_over_no_input(refused, here, sr_model, option):
    Path("data").mkdir()
    picture(128, 96).save("data/a.png")
    shutil.copy(sr_model, "x4.model")
    options = "sr", "eval", "--data", "data", "--methods", "bicubic,x4.model"
    for name in ("data/a.png", "x4.model"):
        refused(*options, option, name, says=f"{name}: would overwrite an input ({name})")
    refused(
        *options, "--csv", "new", "--pictures", "new", says="new: is the folder of new/a.png; give each output its own"
    )
    refused(*options, "--pictures", "data", says="data/a.png: would overwrite an input (data/a.png)")
    refused(
        *options, "--csv", "new", "--markdown", "./new", says="new: is the same file as new; give each output its own"
    )


WRITTEN = ["model.safetensors", "checkpoint.safetensors", "losses.csv", ".lock"]


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("option", ["--style", "--vgg", "--init"])
def test_train_writes_over_no_input(refused, here, photo_folder, vgg_file, model, option, name):
    inputs = {"--style": "photo.png", "--vgg": str(vgg_file), "--init": str(model)}
    Path("run").mkdir()
    shutil.copy(inputs[option], f"run/{name}")
    Path("link").symlink_to(f"run/{name}")
    for path in (f"run/{name}", "link"):
        options = [text for pair in (inputs | {option: path}).items() for text in pair]
        says = (
            "run: holds a run already" if "check" in name else f"run/{name}: would overwrite an input ({here / 'run'}"
        )
        refused("train", "--data", photo_folder, *options, "--size", 16, "--out", "run", says=says)


def test_training_writes_over_no_network_and_no_photo(refused, here, photo_folder, vgg_options, model, sr_model):
    train = "train", "--style", "photo.png", "--size", 16, *vgg_options
    sr_train = "sr", "train", "--size", 64, "--iterations", 1
    Path("run").mkdir()
    shutil.copy(sr_model, "run/model.safetensors")
    for options in (train, sr_train):
        refused(
            *options, "--data", photo_folder, "--out", "run", says="run/model.safetensors: would be overwritten; na"
        )
    says = f"run/model.safetensors: would overwrite an input ({here / 'run/model.safetensors'}); name another output"
    refused(*sr_train, "--data", photo_folder, "--init", "run/model.safetensors", "--out", "run", says=says)
    Path("run/model.safetensors").unlink()
    Path("run/previews").mkdir()
    picture(70, 70).save("run/previews/000001.png")
    says = f"run/previews/000001.png: would overwrite an input ({here / 'run/previews/000001.png'})"
    for options in (train, sr_train):
        refused(*options, "--data", "run", "--cache", "off", "--out", "run", says=says)


def test_figure2_writes_over_no_input(refused, here, photo_folder, vgg_file, vgg_options):
    Path("out/residual").mkdir(parents=True)
    Path("photo.png").rename("out/figure2.png")
    options = "figure2", "--out", "out", "--size", 16, "--data", photo_folder, "--style"
    says = f"out/figure2.png: would overwrite an input ({here / 'out/figure2.png'}); name another output"
    refused(*options, "out/figure2.png", *vgg_options, says=says)
    refused(*options, photo_folder / "0.jpg", *vgg_options, "--data", "out", says=says)
    for folder in ("residual", "non-residual"):
        file = Path("out", folder, "losses.csv")
        file.parent.mkdir(exist_ok=True)
        shutil.copy(vgg_file, file)
        refused(
            *options, photo_folder / "0.jpg", "--vgg", file, says=f"{file}: would overwrite an input ({here / file})"
        )
        file.unlink()


def test_upper_case_is_no_disguise_where_the_system_ignores_case(ignoring_case, here, run, refused, model):
    refused(
        "stylize", "photo.png", "-o", "PHOTO.PNG", "--model", model, says="PHOTO.PNG: would overwrite an input (photo"
    )
    check_overwrites(["new.png"], ["photo.png"])
    with pytest.raises(InputError, match=r"new/A\.png: is the same file as new/a\.png"):
        check_distinct(["new/a.png", "new/A.png"])
    for folder in ("1", "2"):
        Path(folder).mkdir()
    picture(32, 24).save("1/e\u0301.png")
    picture(32, 24).save("2/\u00c9.png")
    refused("stylize", "1", "2", "-o", "new", "--model", model, says="would both become new/")


def test_case_tells_files_apart_where_the_system_does(here):
    Path("A.png").touch()
    if Path("a.png").exists():
        pytest.skip("this file system ignores case")
    check_overwrites(["a.png"], ["A.png"])
    check_distinct(["new/a.png", "new/A.png", "b.png", "B.png"])


def test_one_file_under_two_names_is_painted_once(run, here, model):
    assert run("stylize", "photo.png", here / "photo.png", "-o", "out", "--model", model).status == 0
    assert [path.name for path in Path("out").iterdir()] == ["photo.png"]


# Earlier results


def test_a_second_run_over_all_files_skips_its_own_results(run, here, model):
    picture(32, 24, seed=1).save("other.png")
    Path("anim.gif").symlink_to("photo.png")
    names = ["anim.gif", "other.png", "photo.png"]
    assert run("stylize", *names, "--model", model).status == 0
    results = ["anim-wave.gif.png", "other-wave.png", "photo-wave.png"]
    before = {name: Path(name).read_bytes() for name in results}
    status, out, err = run("stylize", *sorted(path.name for path in here.iterdir()), "--model", model)
    assert (status, out) == (0, "")
    assert err.splitlines()[0] == f"skipped 3 earlier results ({', '.join(results)})"
    assert sorted(path.name for path in here.iterdir()) == sorted(names + results)
    assert {name: Path(name).read_bytes() for name in results} == before


@pytest.mark.parametrize("label", ["wave", "great_wave", "starry_night"])
def test_a_folder_is_painted_without_the_results_in_it(run, here, model, label):
    Path("photos/deep").mkdir(parents=True)
    Path(f"photos/deep-{label}").mkdir()
    for name in ("a.png", f"a-{label}.png", "deep/b.png", f"deep-{label}/b.png", f"alone-{label}.png"):
        picture(32, 24).save(f"photos/{name}")
    status, _, err = run("stylize", "photos", "--model", model)
    assert status == 0
    assert f"skipped 2 earlier results (photos/a-{label}.png, photos/deep-{label}/b.png)" in err
    painted = sorted(str(path.relative_to("photos-wave")) for path in Path("photos-wave").rglob("*.png"))
    assert painted == ["a.png", f"alone-{label}.png", "deep/b.png"]


def test_a_result_is_painted_when_its_photo_is_not_given(run, here, model):
    picture(32, 24).save("photo-wave.png")
    assert run("stylize", "photo-wave.png", "--model", model) == (0, "", "")
    assert Path("photo-wave-wave.png").exists()


def test_upscale_skips_what_it_enlarged_at_any_scale(run, here, sr_model):
    for name in ("photo-x4.png", "photo-x8.png", "photo-wave.png"):
        picture(32, 24).save(name)
    options = "--model", sr_model, "-o", "out"
    status, _, err = run("sr", "upscale", *sorted(path.name for path in here.iterdir()), *options)
    assert status == 0 and "skipped 2 earlier results (photo-x4.png, photo-x8.png)" in err
    assert sorted(path.name for path in Path("out").iterdir()) == ["photo-wave.png", "photo.png"]


# Folders as outputs


@pytest.mark.parametrize("out", ["v1.0/", "new/", "v1.0//", "out.png/", "a/b.c/"])
def test_a_name_that_ends_in_a_slash_is_a_folder(run, here, model, out):
    assert run("stylize", "photo.png", "-o", out, "--model", model).status == 0
    assert read_image(Path(out, "photo.png")).rgb.size == (32, 24)
    picture(32, 24).save("second.png")
    assert run("stylize", "photo.png", "second.png", "-o", out, "--model", model).status == 0
    assert sorted(path.name for path in Path(out).iterdir()) == ["photo.png", "second.png"]


def test_optimize_and_eval_take_a_folder_that_ends_in_a_slash(run, here, vgg_options):
    options = "--style", "photo.png", "--style-size", 16, "--iterations", 1, *vgg_options
    assert run("optimize", "photo.png", "-o", "v1.0/", *options).status == 0
    assert read_image("v1.0/photo.png").rgb.size == (32, 24)
    Path("data").mkdir()
    picture(128, 96).save("data/a.png")
    assert run("sr", "eval", "--data", "data", "--methods", "bicubic", "--pictures", "figures.png/").status == 0
    assert Path("figures.png/a.png").exists()


def test_a_file_is_no_folder(refused, here, model):
    refused("stylize", "photo.png", "-o", "photo.png/", "--model", model, says="photo.png: is a file")


def test_many_outputs_are_checked_quickly(tmp_path):
    names = [tmp_path / "new" / f"{i}.png" for i in range(20_000)]
    check_distinct(names)
    before = contents(tmp_path)
    check_overwrites(names, [])
    assert contents(tmp_path) == before
