"""``fastperc figure2``: two networks trained alike, stopped and resumed, and their losses drawn."""

from __future__ import annotations

import csv
import json
import signal

import numpy as np
import pytest
import torch
from conftest import picture, pixels
from PIL import Image, ImageColor
from safetensors import safe_open

from fastperc import TVLoss
from fastperc.errors import InputError
from fastperc.training import charts, figure2
from fastperc.training.loop import CHECKPOINT


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """On one thread, training repeats itself bit for bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def command(photo_folder, vgg_options, tmp_path):
    """A small figure's command, but for --out."""
    style = tmp_path / "painting.png"
    picture(70, 50, seed=9).save(style)
    return [
        *("figure2", "--style", style, "--data", photo_folder, *vgg_options, "--width", 4, "--workers", 0),
        *("--size", 32, "--batch", 1, "--iterations", 9, "--device", "cpu"),
    ]


def recipe(folder):
    with safe_open(folder / "model.safetensors", "pt") as file:
        return json.loads(file.metadata()["training"])


def losses(folder):
    with (folder / "losses.csv").open() as file:
        return [float(row["total"]) for row in csv.DictReader(file)]


def has_curve(image, color):
    """Whether a line of ``color`` crosses most of the axes."""
    levels = pixels(image.convert("RGB"))[image.height // 6 :]  # below the legend
    columns = (np.abs(levels - ImageColor.getrgb(color)).max(axis=2) < 20).any(axis=0)
    return columns.sum() > 0.4 * levels.shape[1]


def test_trains_twins_and_draws_both(run, command, tmp_path):
    out = tmp_path / "out"
    status, told, errors = run(*command, "--out", out)
    assert status == 0, errors
    assert sorted(path.name for path in out.iterdir()) == ["figure2.png", "non-residual", "residual"]
    residual, other = recipe(out / "residual"), recipe(out / "non-residual")
    assert (residual["network"].pop("residual"), other["network"].pop("residual")) == (True, False)
    assert residual == other and residual["step"] == 9
    ours, theirs = losses(out / "residual"), losses(out / "non-residual")
    assert len(ours) == len(theirs) == 9 and ours != theirs
    head, *ends, reached = told.splitlines()
    assert head == "mean loss of the last 3 of 9 iterations:" and "the residual network" in reached
    for line, name, values in zip(ends, ("residual", "non-residual"), (ours, theirs)):
        assert line.split()[0] == name and float(line.split()[1]) == pytest.approx(sum(values[-3:]) / 3, rel=1e-3)
    with Image.open(out / "figure2.png") as image:
        assert has_curve(image, charts.ORANGE) and has_curve(image, charts.BLUE)
        assert not has_curve(image, "#00ff00")


@pytest.mark.parametrize("stop", [4, 13], ids=["in-the-first", "in-the-second"])
def test_stopped_and_resumed_is_the_whole(run, command, tmp_path, monkeypatch, stop):
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert run(*command, "--out", whole).status == 0
    real, calls = TVLoss.forward, []

    def forward(self, x):
        calls.append(None)
        if len(calls) == stop:
            signal.raise_signal(signal.SIGINT)
        return real(self, x)

    monkeypatch.setattr(TVLoss, "forward", forward)
    status, told, errors = run(*command, "--out", out)
    assert (status, told, len(calls)) == (0, "", stop) and "--resume goes on" in errors
    assert not (out / "figure2.png").exists()
    status, told, errors = run(*command, "--out", out, "--resume")
    assert status == 0 and "mean loss" in told, errors
    assert len(calls) == 18, "each iteration is done once"
    for name in figure2.RUNS:
        assert losses(out / name) == losses(whole / name)
    assert (out / "figure2.png").read_bytes() == (whole / "figure2.png").read_bytes()


@pytest.mark.parametrize("name", figure2.RUNS)
def test_a_run_is_not_overwritten(run, command, tmp_path, name, monkeypatch):
    monkeypatch.setattr(figure2, "train", lambda *_: pytest.fail("trains"))
    (tmp_path / "out" / name).mkdir(parents=True)
    (tmp_path / "out" / name / CHECKPOINT).write_bytes(b"a run")
    status, _, errors = run(*command, "--out", tmp_path / "out")
    assert status == 2 and "holds a run already; continue it with --resume" in errors


def test_another_recipe_does_not_resume(run, command, tmp_path):
    out = tmp_path / "out"
    assert run(*command, "--out", out, "--iterations", 1).status == 0
    status, _, errors = run(*command, "--out", out, "--resume", "--lr", 0.1)
    assert status == 2 and "lr 0.001, not 0.1" in errors
    (out / "non-residual" / "losses.csv").unlink()
    status, _, errors = run(*command, "--out", out, "--resume", "--iterations", 1)
    assert status == 2 and "losses.csv: " in errors


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("--style", "none.png"), "none.png: no such file"),
        (("--data", "none"), "none"),
        (("--size", 8), "at least 16 pixels"),
        (("--residual", "no"), "--residual"),
        (("--init", "x.safetensors"), "--init"),
        (("--iterations", 0), "0 is below 1"),
    ],
    ids=lambda value: str(value[0]).strip("-") if isinstance(value, tuple) else "",
)
def test_bad_input(run, command, tmp_path, change, told):
    status, _, errors = run(*command, "--out", tmp_path / "out", *change)
    assert status == 2 and told in errors and "Traceback" not in errors
    assert not (tmp_path / "out" / "figure2.png").exists()


def test_an_out_that_is_a_file(run, command, tmp_path):
    (tmp_path / "out").write_text("")
    status, _, errors = run(*command, "--out", tmp_path / "out")
    assert status == 2 and "cannot be written" in errors


def test_help(run):
    status, out, _ = run("figure2", "--help")
    assert status == 0 and out.isascii() and max(map(len, out.splitlines())) <= 120


# Losses


def test_losses_are_read_as_far_as_asked(tmp_path):
    path = tmp_path / "losses.csv"
    path.write_text("iteration,total,content,style,tv\n1,2.5,1,1,0.5\n2,1.25,1,0.25,0\n3,1,1,0,0\n")
    assert figure2.read_losses(path, 3) == [2.5, 1.25, 1.0]
    assert figure2.read_losses(path, 2) == [2.5, 1.25]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "not all there"),
        ("iteration,total\n1,2\n", "not all there"),
        ("iteration,total\n1,2\n3,2\n", "not all there"),
        ("iteration,total\n2,2\n1,2\n", "not all there"),
        ("step,loss\n1,2\n2,2\n", "damaged"),
        ("iteration,total\n1,2\n2\n", "damaged"),
        ("iteration,total\n1,2\n2,x\n", "damaged"),
        ("iteration,total\n1,2\n2,nan\n", "not a finite number above 0"),
        ("iteration,total\n1,0\n2,2\n", "not a finite number above 0"),
        ("\x89PNG\n", "damaged"),
    ],
)
def test_losses_that_are_none_are_refused(tmp_path, text, told):
    path = tmp_path / "losses.csv"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=told):
        figure2.read_losses(path, 2)


def test_the_table_tells_when_the_residual_network_is_there():
    falling, level = [10.0 - i for i in range(9)], [5.0] * 9
    assert "at iteration 7" in figure2.table({"residual": falling, "non-residual": level})  # (6 + 5 + 4) / 3
    assert "does not reach" in figure2.table({"residual": level, "non-residual": falling})


# The chart


def test_running_mean():
    values = np.random.default_rng(0).uniform(1, 2, 40)
    expected = np.convolve(values, np.ones(7) / 7, "valid")
    assert charts.running_mean(list(values), 7) == pytest.approx(list(expected))
    assert charts.running_mean([1.0, 2.0], 3) == []


def rows_of(image, color):
    levels = pixels(image)
    return np.nonzero((np.abs(levels - ImageColor.getrgb(color)).max(axis=2) < 20).any(axis=1))[0]


def test_losses_lie_on_a_logarithmic_scale():
    colors = ["#ff0000", "#00ff00", "#0000ff"]
    curves = [charts.Curve([10.0**i] * 5, color) for i, color in enumerate(colors)]
    image = charts.loss_chart([charts.Panel("", curves)])
    low, middle, high = (rows_of(image, color).mean() for color in colors)
    assert low - middle == pytest.approx(middle - high, abs=1) and low - middle > 50


def test_a_band_lies_between_its_edges_and_panels_side_by_side():
    band = charts.Band([1.0] * 4, [2.0] * 4, "#ff0000", opacity=1.0)
    line = charts.Curve([4.0] * 4, "#0000ff")
    image = charts.loss_chart([charts.Panel("left", [band]), charts.Panel("right", [line])])
    left, right = (image.crop((x, 0, x + image.width // 2, image.height)) for x in (0, image.width // 2))
    rows = rows_of(left, "#ff0000")
    assert len(rows) > 50 and (np.diff(rows) == 1).all() and not len(rows_of(right, "#ff0000"))
    distance = rows.min() - rows_of(right, "#0000ff").mean()
    assert distance == pytest.approx(len(rows), abs=3)


@pytest.mark.parametrize("values", [[], [0.0], [1.0, -1.0], [float("nan")], [float("inf")]])
def test_what_has_no_logarithm_is_refused(values):
    with pytest.raises(ValueError, match="finite values above 0"):
        charts.loss_chart([charts.Panel("", [charts.Curve(values, "black")])])


def test_without_matplotlib_nothing_is_trained(run, command, tmp_path, monkeypatch):
    monkeypatch.setattr(charts, "find_spec", lambda name: None)
    status, _, errors = run(*command, "--out", tmp_path / "out")
    assert status == 2 and "pip install 'fastperc[figures]'" in errors and not (tmp_path / "out").exists()


def test_one_iteration_makes_a_chart():
    assert charts.loss_chart([charts.Panel("", [charts.Curve([1.0], "black")])]).size[0] > 0
