"""``fastperc train`` as a user runs it: it learns, survives being killed, and stops when told or when it must."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import pytest
import torch
from conftest import picture
from PIL import Image
from safetensors import safe_open

from fastperc import TransformNet, TVLoss
from fastperc.cli import build_parser, main
from fastperc.cli.train import recipe_from
from fastperc.training.log import LOG_EVERY, Log
from fastperc.training.objective import build_loss
from fastperc.training.processes import Processes
from fastperc.training.recipe import Recipe, learning_rate
from fastperc.training.step import train_step


@pytest.fixture(scope="module")
def options(photo_folder, vgg_file, tmp_path_factory):
    """The command line of a run small enough for a test, without --out."""
    style = tmp_path_factory.mktemp("style") / "painting.png"
    picture(70, 50, seed=9).save(style)
    return [
        *("train", "--style", str(style), "--data", str(photo_folder), "--vgg", str(vgg_file), "--device", "cpu"),
        *("--preset", "paper", "--width", "4", "--style-layers", "relu1_2,relu2_2", "--content-layer", "relu2_2"),
        *("--size", "32", "--batch", "2", "--iterations", "12", "--checkpoint-every", "3"),
    ]


def start(options, out, *more):
    command = [sys.executable, "-m", "fastperc", *options, "--out", str(out), *more]
    # One thread: with two, this comparison has failed twice in about ten runs of the suite, and nobody knows why yet.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=out.parent, env=environment)


def finish(process):
    _, errors = process.communicate(timeout=300)
    return process.returncode, errors


def tensors(path):
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def metadata(path):
    with safe_open(path, "pt") as file:
        return {key: value for key, value in file.metadata().items()}


@pytest.fixture(scope="module")
def whole_run(options, tmp_path_factory):
    """A run that nothing interrupts."""
    out = tmp_path_factory.mktemp("whole") / "run"
    status, errors = finish(start(options, out))
    assert status == 0, errors
    return out, errors


def test_leaves_a_network_a_checkpoint_and_previews(whole_run):
    out, errors = whole_run
    assert sorted(path.name for path in out.iterdir()) == [
        "checkpoint.safetensors",
        "losses.csv",
        "model.safetensors",
        "previews",
    ]
    previews = sorted(path.name for path in (out / "previews").iterdir())
    assert previews == ["000003.png", "000006.png", "000009.png", "000012.png"]
    with Image.open(out / "previews" / "000012.png") as sheet:
        assert sheet.size == (4 * 36 - 4, 2 * 36 - 4)
    about = metadata(out / "model.safetensors")
    recipe = json.loads(about["training"])
    assert (
        recipe["step"] == 12 and recipe["style"] == "painting.png" and recipe["style_layers"] == ["relu1_2", "relu2_2"]
    )
    assert "1 of 7 photos skipped" in errors and "broken.jpg" in errors and "finished at iteration 12" in errors


def losses(out):
    """The names and the rows of a run's losses."""
    text = (out / "losses.csv").read_text()
    assert text.endswith("\n")
    header, *rows = [line.split(",") for line in text.splitlines()]
    return header, [[int(row[0]), *map(float, row[1:])] for row in rows]


def test_leaves_the_losses_of_each_iteration(whole_run):
    header, rows = losses(whole_run[0])
    assert header == ["iteration", "total", "content", "style", "tv"]
    assert [row[0] for row in rows] == list(range(1, 13))
    assert all(abs(total - sum(terms)) < 1e-5 * total for _, total, *terms in rows)


def test_the_result_stylizes(whole_run, tmp_path):
    out, _ = whole_run
    picture(40, 33).save(tmp_path / "photo.png")
    command = ["stylize", str(tmp_path / "photo.png"), "-o", str(tmp_path / "out.png")]
    assert main([*command, "--model", str(out / "model.safetensors")]) == 0
    assert Image.open(tmp_path / "out.png").size == (40, 33)
    assert main([*command, "--model", str(out / "checkpoint.safetensors")]) == 0


def test_killed_and_resumed_is_bit_for_bit_the_whole_run(options, whole_run, tmp_path):
    out = tmp_path / "run"
    process = start(options, out)
    deadline = time.monotonic() + 120
    while not (out / "previews" / "000006.png").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    stopped_at = json.loads(metadata(out / "checkpoint.safetensors")["training"])["step"]
    assert 6 <= stopped_at < 12

    status, errors = finish(start(options, out, "--resume", "--workers", "0"))
    assert status == 0, errors
    assert f"from iteration {stopped_at}" in errors
    for file in ("model.safetensors", "checkpoint.safetensors"):
        expected, resumed = tensors(whole_run[0] / file), tensors(out / file)
        assert expected.keys() == resumed.keys()
        for name, tensor in expected.items():
            assert torch.equal(resumed[name], tensor), name
    assert (out / "losses.csv").read_bytes() == (whole_run[0] / "losses.csv").read_bytes()


@pytest.mark.parametrize("cache", ["auto", "off"])
def test_resumed_losses_hold_no_iteration_twice(options, whole_run, tmp_path, cache):
    """What came after the checkpoint is dropped, and half a line with it; photos may be packed or not."""
    out = tmp_path / "run"
    assert run(options, out, "--iterations", "6", "--cache", cache) == 0
    text = (out / "losses.csv").read_text()
    (out / "losses.csv").write_text(text + "7,0.1,0.1,0.1,0.1\n8,0.2,0.1,0.1,0.1\n9,0.3")
    assert run(options, out, "--resume", "--cache", "auto") == 0
    assert (out / "losses.csv").read_text().startswith(text)
    (header, mine), (wanted, whole) = losses(out), losses(whole_run[0])
    assert header == wanted and [row[0] for row in mine] == list(range(1, 13))
    assert all(abs(row[1] - expected[1]) < 0.1 * expected[1] for row, expected in zip(mine, whole))


@pytest.mark.parametrize("damage", ["gone", "empty", "of other terms"])
def test_losses_begin_anew_where_there_are_none(options, tmp_path, damage):
    out = tmp_path / "run"
    assert run(options, out, "--iterations", "3") == 0
    if damage == "gone":
        (out / "losses.csv").unlink()
    else:
        (out / "losses.csv").write_text("" if damage == "empty" else "iteration,total\n1,0.5\n")
    assert run(options, out, "--iterations", "5", "--resume") == 0
    header, rows = losses(out)
    assert header == ["iteration", "total", "content", "style", "tv"] and [row[0] for row in rows] == [4, 5]


class Terms(NamedTuple):
    total: torch.Tensor
    tv: torch.Tensor


def log_of(tmp_path, start=0, **fields):
    alone = Processes(torch.device("cpu"))
    return Log(Recipe(data="", iterations=100, **fields), tmp_path, start, alone)


def test_losses_are_fetched_together_and_the_first_that_is_not_finite_is_named(tmp_path):
    log = log_of(tmp_path)
    for values in ([1.0, 2.0], [1 / 3, 1e-12]):
        log.add(Terms(*torch.tensor(values)))
    assert not (tmp_path / "losses.csv").exists(), "nothing is looked at before it is asked for"
    log.write(saved=0)
    log.write(saved=0)
    assert losses(tmp_path) == (["iteration", "total", "tv"], [[1, 1.0, 2.0], [2, 0.333333343, 9.99999996e-13]])
    for total in (4.0, float("nan"), float("inf")):
        log.add(Terms(torch.tensor(total), torch.tensor(1.0)))
    with pytest.raises(FloatingPointError, match=f"the loss is nan at iteration 4; iteration 2 is kept in {tmp_path}"):
        log.write(saved=2)
    log.close()
    assert [row[0] for row in losses(tmp_path)[1]] == [1, 2, 3]


def test_a_gpus_losses_wait_for_many_iterations(tmp_path):
    together = Processes(torch.device("cuda"))
    log = Log(Recipe(data=""), tmp_path, 0, together)
    assert log.every == LOG_EVERY > 1 == log_of(tmp_path).every


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_signals_save_and_stop(options, tmp_path, number):
    out = tmp_path / "run"
    process = start([*options, "--iterations", "100000", "--checkpoint-every", "100000"], out)
    for line in process.stderr:
        if "photos ·" in line:
            break
    time.sleep(1.0)
    process.send_signal(number)
    status, errors = finish(process)
    assert status == 0, errors
    step = json.loads(metadata(out / "model.safetensors")["training"])["step"]
    assert step > 0 and f"stopped at iteration {step}" in errors and "Traceback" not in errors
    assert not [path for path in out.rglob(".*")]


def run(options, out, *more):
    return main([*options, "--out", str(out), "--workers", "0", *more])


def test_resuming_a_finished_run_changes_nothing(options, whole_run):
    out, _ = whole_run
    before = (out / "checkpoint.safetensors").read_bytes()
    assert run(options, out, "--resume") == 0
    assert (out / "checkpoint.safetensors").read_bytes() == before


def test_a_run_is_not_overwritten_nor_resumed_with_another_recipe(options, whole_run, capsys):
    out, _ = whole_run
    before = (out / "checkpoint.safetensors").read_bytes()
    assert run(options, out) == 2
    assert "--resume" in capsys.readouterr().err
    assert run(options, out, "--resume", "--lr", "0.1") == 2
    assert "lr 0.001, not 0.1" in capsys.readouterr().err
    assert (out / "checkpoint.safetensors").read_bytes() == before


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(options, tmp_path, monkeypatch, capsys):
    real, calls = TVLoss.forward, []

    def breaks_at_five(self, x):
        calls.append(None)
        return real(self, x) * (float("nan") if len(calls) == 5 else 1.0)

    monkeypatch.setattr(TVLoss, "forward", breaks_at_five)
    assert run(options, tmp_path / "run") == 1
    errors = capsys.readouterr().err
    assert "the loss is nan at iteration 5" in errors and "iteration 3 is kept" in errors
    kept = tensors(tmp_path / "run" / "checkpoint.safetensors")
    assert all(tensor.isfinite().all() for tensor in kept.values())
    assert json.loads(metadata(tmp_path / "run" / "checkpoint.safetensors")["training"])["step"] == 3


def test_it_learns(options, tmp_path):
    """Forty steps on one painting bring the loss well below where it began."""
    recipe = recipe_from(build_parser().parse_args([*options, "--out", "unused", "--iterations", "40"]))
    torch.manual_seed(0)
    net = TransformNet("instance", width=8)
    loss = build_loss(recipe.style, 32, recipe.vgg, recipe.style_layers, recipe.content_layer)
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    photos = torch.rand(2, 3, 32, 32)
    totals = [train_step(net, loss, optimizer, photos, photos, amp=False).total.item() for _ in range(40)]
    assert totals[-1] < 0.6 * totals[0]


def test_autocast_trains(options, tmp_path):
    assert run(options, tmp_path / "run", "--amp", "--iterations", "2") == 0
    assert all(t.dtype != torch.bfloat16 for t in tensors(tmp_path / "run" / "model.safetensors").values())


def test_tensorboard_logs(options, tmp_path):
    pytest.importorskip("tensorboard")
    assert run(options, tmp_path / "run", "--tensorboard", "--iterations", "2") == 0
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss/total")] == [1, 2]


def test_the_step_size_decays_to_zero_when_asked():
    recipe = Recipe(data="", iterations=100, lr=0.5, decay=True)
    assert learning_rate(recipe, 1) == 0.5
    assert abs(learning_rate(recipe, 51) - 0.25) < 1e-9
    assert 0 < learning_rate(recipe, 100) < 1e-3
    assert learning_rate(Recipe(data=""), 40_000) == 1e-3


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("--style-size", "8"), "the painting's shorter side must have at least 16 pixels, not 8"),
        (("--style-size", "900000"), "painting.png: "),
        (("--size", "8"), "training crops need a side of at least 16 pixels, not 8"),
    ],
    ids=["small-painting", "huge-painting", "small-crops"],
)
def test_sizes_that_cannot_be_are_refused(options, tmp_path, capsys, change, told):
    assert run(options, tmp_path / "run", *change) == 2
    assert told in capsys.readouterr().err
