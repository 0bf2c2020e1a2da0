"""``fastperc figure2``: two networks trained alike, stopped and resumed, and their losses drawn."""

from __future__ import annotations

import numpy as np
import pytest
from pictures import picture, pixels
from PIL import Image, ImageColor
from training_runs import losses, stop_in_iteration, training_metadata

from fastperc.errors import InputError
from fastperc.training import charts, figure2
from fastperc.training.resume import CHECKPOINT

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def command(photo_folder, vgg_options, tmp_path):
    """A small figure's command, but for --out."""
    style = tmp_path / "painting.png"
    picture(70, 50, seed=9).save(style)
    return [
        *("figure2", "--style", style, "--data", photo_folder, *vgg_options, "--width", 4, "--workers", 0),
        *("--size", 32, "--batch", 1, "--iterations", 9, "--device", "cpu"),
    ]


def totals(folder):
    """The total loss of each iteration of a run."""
    return [row[1] for row in losses(folder)[1]]


def has_curve(image, color):
    """Whether a line of ``color`` crosses most of the axes."""
    levels = pixels(image.convert("RGB"))[image.height // 6 :]  # below the legend
    columns = (np.abs(levels - ImageColor.getrgb(color)).max(axis=2) < 20).any(axis=0)
    return columns.sum() > 0.4 * levels.shape[1]


def test_trains_two_networks_alike_and_draws_both(run, command, tmp_path):
    out = tmp_path / "out"
    status, printed, errors = run(*command, "--out", out)
    assert status == 0, errors
    assert sorted(path.name for path in out.iterdir()) == ["figure2.png", "non-residual", "residual"]
    recipes = [training_metadata(out / name / "model.safetensors") for name in figure2.RUNS]
    assert [recipe["network"].pop("residual") for recipe in recipes] == [True, False]
    assert recipes[0] == recipes[1] and recipes[0]["step"] == 9
    residual, non_residual = (totals(out / name) for name in figure2.RUNS)
    assert len(residual) == len(non_residual) == 9 and residual != non_residual
    head, *ends, reached = printed.splitlines()
    assert head == "mean loss of the last 3 of 9 iterations:" and "the residual network" in reached
    for line, name, values in zip(ends, figure2.RUNS, (residual, non_residual)):
        assert line.split()[0] == name and float(line.split()[1]) == pytest.approx(sum(values[-3:]) / 3, rel=1e-3)
    with Image.open(out / "figure2.png") as image:
        assert has_curve(image, charts.ORANGE) and has_curve(image, charts.BLUE)
        assert not has_curve(image, "#00ff00")


@pytest.mark.parametrize("stop", [4, 13], ids=["in-the-first", "in-the-second"])
def test_stopped_and_resumed_is_the_whole(run, command, tmp_path, monkeypatch, stop):
    """Stopped by a signal in iteration ``stop`` of both runs together, which have nine each."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert run(*command, "--out", whole).status == 0
    stop_in_iteration(monkeypatch, stop)
    status, printed, errors = run(*command, "--out", out)
    assert (status, printed) == (0, "") and f"go on by: fastperc figure2 --resume --out {out}\n" in errors
    name, step = ("residual", stop) if stop <= 9 else ("non-residual", stop - 9)
    assert len(totals(out / name)) == training_metadata(out / name / CHECKPOINT)["step"] == step
    assert not (out / "figure2.png").exists()
    status, printed, errors = run("figure2", "--resume", "--out", out)
    assert status == 0 and "mean loss" in printed and f"from iteration {step}" in errors, errors
    for name in figure2.RUNS:
        assert totals(out / name) == totals(whole / name)
    assert (out / "figure2.png").read_bytes() == (whole / "figure2.png").read_bytes()


@pytest.mark.parametrize("name", figure2.RUNS)
def test_a_run_is_not_overwritten(run, command, tmp_path, name):
    checkpoint = tmp_path / "out" / name / CHECKPOINT
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_bytes(b"a run")
    status, _, errors = run(*command, "--out", tmp_path / "out")
    assert status == 2 and "holds a run already; continue it with --resume" in errors
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == [checkpoint]
    assert checkpoint.read_bytes() == b"a run"


def test_another_recipe_does_not_resume(run, command, tmp_path):
    out = tmp_path / "out"
    assert run(*command, "--out", out, "--iterations", 1).status == 0
    status, _, errors = run(*command, "--out", out, "--resume", "--lr", 0.1)
    assert status == 2 and "lr 0.001, not 0.1" in errors
    (out / "non-residual" / "losses.csv").unlink()
    status, _, errors = run(*command, "--out", out, "--resume", "--iterations", 1)
    assert status == 2 and "losses.csv: " in errors


@pytest.mark.parametrize(
    ("change", "message"),
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
def test_bad_input(run, command, tmp_path, change, message):
    status, _, errors = run(*command, "--out", tmp_path / "out", *change)
    assert status == 2 and message in errors and "Traceback" not in errors
    assert not (tmp_path / "out" / "figure2.png").exists()


def test_out_is_a_file(run, command, tmp_path):
    (tmp_path / "out").write_text("")
    status, _, errors = run(*command, "--out", tmp_path / "out")
    assert status == 2 and "cannot be written" in errors


def test_without_matplotlib_nothing_is_trained(run, command, tmp_path, monkeypatch):
    monkeypatch.setattr(charts, "find_spec", lambda name: None)
    status, _, errors = run(*command, "--out", tmp_path / "out")
    assert status == 2 and "pip install 'fastperc[figures]'" in errors and not (tmp_path / "out").exists()


def test_help(run):
    status, out, _ = run("figure2", "--help")
    assert status == 0 and out.isascii() and max(map(len, out.splitlines())) <= 120


def test_losses_are_read_as_far_as_asked(tmp_path):
    path = tmp_path / "losses.csv"
    path.write_text("iteration,total,content,style,tv\n1,2.5,1,1,0.5\n2,1.25,1,0.25,0\n3,1,1,0,0\n")
    assert figure2.read_losses(path, 3) == [2.5, 1.25, 1.0]
    assert figure2.read_losses(path, 2) == [2.5, 1.25]


@pytest.mark.parametrize(
    ("text", "message"),
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
def test_damaged_losses_are_refused(tmp_path, text, message):
    path = tmp_path / "losses.csv"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=message):
        figure2.read_losses(path, 2)


def test_the_table_says_when_the_residual_network_reaches_the_other():
    falling, level = [10.0 - i for i in range(9)], [5.0] * 9
    assert "at iteration 7" in figure2.table({"residual": falling, "non-residual": level})  # (6 + 5 + 4) / 3
    assert "does not reach" in figure2.table({"residual": level, "non-residual": falling})
