"""``fastperc train`` as a user runs it: it learns, leaves its files, and stops on a signal or a loss gone wrong."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from pictures import picture
from PIL import Image
from training_runs import finish, losses, run_here, start, tensors, train_options, training_metadata

from fastperc import TransformNet, TVLoss
from fastperc.cli import build_parser, main
from fastperc.cli.train import recipe_from
from fastperc.training import signals
from fastperc.training.objective import build_loss
from fastperc.training.recipe import Recipe, learning_rate
from fastperc.training.step import train_step


@pytest.fixture(scope="module")
def options(photo_folder, vgg_file, tmp_path_factory):
    return train_options(photo_folder, vgg_file, tmp_path_factory.mktemp("style"))


@pytest.fixture(scope="module")
def finished(options, tmp_path_factory):
    """The folder of a run that nothing interrupted, and what it wrote to stderr."""
    out = tmp_path_factory.mktemp("finished") / "run"
    status, errors = finish(start(options, out))
    assert status == 0, errors
    return out, errors


def test_leaves_a_network_a_checkpoint_and_previews(finished):
    out, errors = finished
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
    recipe = training_metadata(out / "model.safetensors")
    assert (recipe["step"], recipe["style"], recipe["style_layers"]) == (12, "painting.png", ["relu1_2", "relu2_2"])
    assert "1 of 7 photos skipped" in errors and "broken.jpg" in errors and "finished at iteration 12" in errors


def test_leaves_the_losses_of_each_iteration(finished):
    header, rows = losses(finished[0])
    assert header == ["iteration", "total", "content", "style", "tv"]
    assert [row[0] for row in rows] == list(range(1, 13))
    assert all(abs(total - sum(terms)) < 1e-5 * total for _, total, *terms in rows)


def test_the_result_stylizes(finished, tmp_path):
    out, _ = finished
    picture(40, 33).save(tmp_path / "photo.png")
    command = ["stylize", str(tmp_path / "photo.png"), "-o", str(tmp_path / "out.png")]
    assert main([*command, "--model", str(out / "model.safetensors")]) == 0
    assert Image.open(tmp_path / "out.png").size == (40, 33)
    assert main([*command, "--model", str(out / "checkpoint.safetensors")]) == 0


def wait_for_losses(process, out):
    while not (out / "losses.csv").exists():
        assert process.poll() is None
        time.sleep(0.02)


ENDLESS = "--iterations", "100000", "--checkpoint-every", "100000"


@pytest.mark.parametrize("number", signals.SIGNALS, ids=lambda number: number.name)
def test_signals_save_and_stop(options, tmp_path, number):
    out = tmp_path / "run"
    process = start([*options, *ENDLESS], out)
    for line in process.stderr:
        if "photos ·" in line:
            break
    wait_for_losses(process, out)
    process.send_signal(number)
    status, errors = finish(process)
    assert status == 0, errors
    step = training_metadata(out / "model.safetensors")["step"]
    assert step > 0 and f"stopped at iteration {step}" in errors and "Traceback" not in errors
    assert losses(out)[1][-1][0] == step
    assert not [path for path in out.rglob(".*")]


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no SIGHUP here")
def test_nohup_goes_on_without_its_terminal(options, tmp_path):
    out = tmp_path / "run"
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process = start([*options, *ENDLESS], out)
    finally:
        signal.signal(signal.SIGHUP, before)
    wait_for_losses(process, out)
    process.send_signal(signal.SIGHUP)
    time.sleep(1)
    assert process.poll() is None
    process.terminate()
    status, errors = finish(process)
    assert status == 0 and "stopped at iteration" in errors, errors
    assert losses(out)[1][-1][0] == training_metadata(out / "model.safetensors")["step"]


@pytest.mark.skipif(not Path("/dev/ptmx").exists(), reason="no pseudo-terminals here")
@pytest.mark.parametrize("nohup", [False, True], ids=["hangup", "nohup"])
def test_a_terminal_that_is_closed(options, tmp_path, nohup):
    """It ends the run, which saves; what writes to it fails from then on."""
    import pty

    out = tmp_path / "run"
    iterations = ("--iterations", "60") if nohup else ENDLESS
    pid, terminal = pty.fork()
    if not pid:
        if nohup:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        os.environ.update(OMP_NUM_THREADS="1", XDG_CACHE_HOME=str(tmp_path))
        command = [sys.executable, "-m", "fastperc", *options, *iterations, "--out", str(out), "--workers", "0"]
        os.execv(sys.executable, command)
    while not (out / "losses.csv").exists():
        os.read(terminal, 65536)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    step = training_metadata(out / "model.safetensors")["step"]
    assert losses(out)[1][-1][0] == step and (step == 60 or not nohup)
    assert not [path for path in out.rglob(".*")]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(options, tmp_path, monkeypatch, capsys):
    forward, calls = TVLoss.forward, []

    def breaks_at_five(self, x):
        calls.append(None)
        return forward(self, x) * (float("nan") if len(calls) == 5 else 1.0)

    monkeypatch.setattr(TVLoss, "forward", breaks_at_five)
    assert run_here(options, tmp_path / "run") == 1
    errors = capsys.readouterr().err
    assert "the loss is nan at iteration 5" in errors and "iteration 3 is kept" in errors
    kept = tensors(tmp_path / "run" / "checkpoint.safetensors")
    assert all(tensor.isfinite().all() for tensor in kept.values())
    assert training_metadata(tmp_path / "run" / "checkpoint.safetensors")["step"] == 3


def test_it_learns(options):
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
    assert run_here(options, tmp_path / "run", "--amp", "--iterations", "2") == 0
    assert all(t.dtype != torch.bfloat16 for t in tensors(tmp_path / "run" / "model.safetensors").values())


def test_tensorboard_logs(options, tmp_path):
    pytest.importorskip("tensorboard")
    assert run_here(options, tmp_path / "run", "--tensorboard", "--iterations", "2") == 0
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
    ("change", "message"),
    [
        (("--style-size", "8"), "the painting's shorter side must have at least 16 pixels, not 8"),
        (("--style-size", "900000"), "painting.png: "),
        (("--size", "8"), "training crops need a side of at least 16 pixels, not 8"),
    ],
    ids=["small-painting", "huge-painting", "small-crops"],
)
def test_impossible_sizes_are_refused(options, tmp_path, capsys, change, message):
    assert run_here(options, tmp_path / "run", *change) == 2
    assert message in capsys.readouterr().err
