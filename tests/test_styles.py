"""``fastperc styles``: what ships, and a sheet of pictures in the styles."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pictures import pixels
from PIL import Image

import fastperc
from fastperc import InputError
from fastperc.checkpoints import read_training
from fastperc.files import read_safetensors_header, read_tensors, write_tensors
from fastperc.photos.photo import read_image
from fastperc.photos.sheet import BORDER, GAP, SAMPLE, _columns, labelled_sheet
from fastperc.tools.shipped import Network, details, table
from fastperc.weights import STYLES, SUPER_RESOLUTION

SHIPPED = STYLES | SUPER_RESOLUTION


def test_the_table_lists_all_that_ships(run):
    status, out, err = run("styles")
    header, *lines = out.splitlines()
    assert (status, err) == (0, "") and [line.split()[0] for line in lines] == list(SHIPPED)
    assert header.split("   ")[0] == "name" and max(map(len, lines)) <= 120
    for line, path in zip(lines, SHIPPED.values()):
        training = read_training(path)
        parameters = sum(tensor.numel() for tensor in read_tensors(path)[0].values())
        assert f"{parameters:,}" in line and f"{training['iterations']:,} × {training['batch']} crops" in line
        assert f"{path.stat().st_size / 1e6:.1f} MB" in line


def test_parameters_are_those_of_the_network():
    net = fastperc.load("great_wave")
    assert Network.read(STYLES["great_wave"]).parameters == sum(p.numel() for p in net.parameters())


def test_the_details_are_all_that_the_file_says(run):
    status, out, err = run("styles", "great_wave", "x4_pixel", "great_wave")
    assert (status, err) == (0, "") and out.count("training\n") == 2
    training = read_training(STYLES["great_wave"])
    lines = dict(line.split(maxsplit=1) for line in out.split("\n\nname")[0].splitlines() if len(line.split()) > 1)
    assert lines["iterations"] == str(training["iterations"]) and lines["style"] == training["style"]
    assert lines["style_layers"] == ", ".join(training["style_layers"]) and "tensorboard" not in lines


def test_files_that_say_more_or_less(tmp_path, model):
    tensors, metadata = read_tensors(model)
    assert details(Network.read(model)).splitlines()[0].split() == ["name", "wave"]
    assert table([Network.read(model)]).splitlines()[0].split()[-1] == "trained"
    training = json.dumps({"style": "[red]a.jpg[/red]", "iterations": 5})
    write_tensors(tmp_path / "mine.safetensors", tensors, {**metadata, "license": "CC0-1.0", "training": training})
    mine = Network.read(tmp_path / "mine.safetensors")
    header, line = table([mine]).splitlines()
    assert header.split()[-1] == "licence" and line.split()[-1] == "CC0-1.0" and "[red]a.jpg[/red]" in line
    assert "licence" in details(mine) and "CC0-1.0" in details(mine)


@pytest.mark.parametrize("training", ["[1", "1", '"a"', "[" * 100_000])
def test_damaged_metadata_is_refused(tmp_path, model, training):
    tensors, metadata = read_tensors(model)
    write_tensors(tmp_path / "mine.safetensors", tensors, {**metadata, "training": training})
    with pytest.raises(InputError, match="its metadata is damaged"):
        Network.read(tmp_path / "mine.safetensors")


LENGTH_2, LENGTH_9 = b"\2" + bytes(7), b"\x09" + bytes(7)
BAD_HEADERS = [
    *(b"", b"short", bytes(8), b"\xff" * 8 + b"{}", b"PK\3\4" * 99),
    *(LENGTH_2 + b"[]", LENGTH_2 + b"{", LENGTH_9 + b'{"a":[1]}', LENGTH_9 + b'{"a":"\xff"}'),
]


class TestHeader:
    @pytest.mark.parametrize("path", SHIPPED.values(), ids=SHIPPED)
    def test_is_what_the_whole_file_says(self, path):
        tensors, metadata = read_tensors(path)
        header = read_safetensors_header(path)
        assert header.metadata == metadata
        assert header.shapes == {name: list(tensor.shape) for name, tensor in tensors.items()}

    @pytest.mark.parametrize("content", BAD_HEADERS)
    def test_damaged_ones_are_refused(self, tmp_path, content):
        (tmp_path / "net.safetensors").write_bytes(content)
        with pytest.raises(InputError, match="file, or damaged"):
            read_safetensors_header(tmp_path / "net.safetensors")


def test_listing_imports_no_framework():
    code = "import sys; from fastperc.cli import main; main(['styles']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


class TestSheet:
    def test_of_the_sample(self, run, here):
        assert run("styles", "-o", "sheet.png", "--size", 64) == (0, "", "")
        sheet, sample = read_image("sheet.png").rgb, read_image(SAMPLE).resized(64).rgb
        assert (pixels(sheet.crop((BORDER, BORDER, BORDER + 64, BORDER + sample.height))) == pixels(sample)).all()
        columns = _columns(1 + len(STYLES), *sample.size)
        assert sheet.width == 2 * BORDER + columns * (64 + GAP) - GAP

    def test_of_a_photo_in_one_style(self, run, here):
        assert run("styles", "great_wave", "-o", "new/sheet.jpg", "--photo", "photo.png", "--size", 32).status == 0
        sheet = read_image("new/sheet.jpg").rgb
        painted = fastperc.freeze(fastperc.load("great_wave"))(Image.open("photo.png"))
        left = BORDER + 32 + GAP
        assert np.abs(pixels(sheet.crop((left, BORDER, left + 32, BORDER + 24))) - pixels(painted)).mean() < 6  # a JPEG

    @pytest.mark.slow  # paints four photos in every style
    def test_of_the_documentation_is_drawn_by_its_script(self, here):
        sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
        import style_sheet

        style_sheet.main(["--out", "sheet.jpg"])
        drawn, shown = read_image("sheet.jpg").rgb, read_image(style_sheet.EXAMPLES.parent / "docs" / "styles.jpg").rgb
        assert drawn.size == shown.size and np.abs(pixels(drawn) - pixels(shown)).mean() < 3

    @pytest.mark.parametrize(("count", "columns"), [(1, 1), (2, 2), (3, 3), (4, 2), (5, 3), (6, 3), (9, 3), (12, 4)])
    def test_rows_are_full(self, count, columns):
        assert _columns(count, 450, 300) == columns

    def test_labels_are_below_their_pictures(self):
        cells = [(name, Image.new("RGB", (90, 60), "gray")) for name in ("first", "a longer name")]
        sheet = pixels(labelled_sheet(cells))
        rows = sheet[BORDER + 60 + 2 : -BORDER]
        for left in (BORDER, BORDER + 90 + GAP):
            assert (rows[:, left : left + 90] < 100).any()
        assert (sheet[: BORDER - 1] == 255).all() and (sheet[-BORDER // 2 :] == 255).all()

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            ("monet", "no network 'monet' ships; use composition_vii"),
            ("-o new.png monet", "no style 'monet' ships; use composition_vii, great_wave, starry_night, the_scream"),
            ("-o new.png x4_pixel", "no style 'x4_pixel' ships; use composition_vii"),
            ("--photo photo.png", "--photo is for the sheet, which needs --out FILE"),
            ("--size 64", "--size is for the sheet"),
            ("-o new.xyz", "new.xyz: cannot write an image as '.xyz'"),
            ("-o new.png --photo gone.png", "gone.png: no such file"),
            ("-o photo.png --photo photo.png", "would overwrite an input"),
            ("-o new.png --size 8", "is too small; both sides need at least 16 pixels"),
            ("-o new.png --device nonesuch", "no device 'nonesuch' here"),
        ],
    )
    def test_bad_input(self, refused, options, says):
        refused("styles", *options.split(), says=says)


def test_the_sample_is_a_small_photo():
    assert SAMPLE.stat().st_size < 40_000 and min(read_image(SAMPLE).rgb.size) >= 256
