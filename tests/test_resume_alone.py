"""``--resume`` and ``--out`` alone go on with a run; what its files hold must be what it was, wherever they lie."""

from __future__ import annotations

import json
import shlex
import shutil
import signal

import pytest
import torch
from pictures import picture
from training_runs import finish, run_here, start, stop_in_iteration, tensors, train_options, training_metadata

from fastperc import checkpoints
from fastperc.cli import main
from fastperc.files import read_tensors, write_tensors

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def project(photo_folder, vgg_file, tmp_path):
    """A folder with photos, VGG weights and a painting, and the options of a run on them."""
    folder = tmp_path / "project"
    shutil.copytree(photo_folder, folder / "photos")
    shutil.copy(vgg_file, folder / "vgg.npz")
    options = train_options(folder / "photos", folder / "vgg.npz", folder)
    return folder, [*options, "--preset", "instance", "--padding", "reflect", "--residual", "no", "--lr", "0.002"]


def stop(options, out, *more):
    """Runs until a signal in iteration five."""
    with pytest.MonkeyPatch.context() as patch:
        stop_in_iteration(patch, 5)
        assert run_here(options, out, *more) == 0
    assert training_metadata(out / "checkpoint.safetensors")["step"] == 5


def equal(out, other):
    actual, expected = (tensors(run / "checkpoint.safetensors") for run in (out, other))
    return actual.keys() == expected.keys() and all(torch.equal(actual[name], expected[name]) for name in actual)


def test_the_line_that_says_stopped_names_the_command_that_goes_on(project, tmp_path, capsys):
    _, options = project
    whole, out = tmp_path / "whole", tmp_path / "a run"
    assert run_here(options, whole, "--decay", "--average", "--noise", "0.1", "--resize", "32-40") == 0
    stop(options, out, "--decay", "--average", "--noise", "0.1", "--resize", "32-40")
    errors = capsys.readouterr().err
    command = errors.strip().rpartition("; go on by: fastperc ")[2]
    assert command == f"train --resume --out {shlex.quote(str(out))}"
    assert main(shlex.split(command)) == 0
    assert equal(out, whole)


def test_what_is_given_must_agree(project, tmp_path, capsys):
    _, options = project
    out = tmp_path / "run"
    stop(options, out)
    alone = ["train", "--resume", "--out", str(out)]
    for change, message in {
        "--lr 0.1 --seed 3": "was trained with lr 0.002, not 0.1; seed 0, not 3; give the same to resume",
        "--residual yes": "'residual': False}, not {",
        "--width 8": "'width': 4",
        "--style-size 40": "style_size None, not 40",
    }.items():
        assert main([*alone, *change.split()]) == 2
        assert message in capsys.readouterr().err, change
    agreeing = ["--lr", "0.002", "--preset", "instance", "--residual", "no", "--width", "4", "--iterations", "7"]
    assert main([*alone, *agreeing, "--checkpoint-every", "1"]) == 0
    assert training_metadata(out / "checkpoint.safetensors")["step"] == 7


def test_without_a_run_the_options_are_required(tmp_path, capsys):
    assert main(["train", "--resume", "--out", str(tmp_path / "run")]) == 2
    assert (
        "run: holds no run to resume; the following arguments are required: --style, --data" in capsys.readouterr().err
    )
    assert main(["sr", "train", "--resume", "--out", str(tmp_path / "run")]) == 2
    assert "required: --data" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_super_resolution_resumes_alone(photo_folder, tmp_path, run):
    out = tmp_path / "run"
    basic = ["sr", "train", "--data", photo_folder, "--device", "cpu", "--workers", 0]
    basic += ["--size", 32, "--scale", 2, "--batch", 1, "--average"]
    assert run(*basic, "--out", out, "--iterations", 2).status == 0
    status, _, errors = run("sr", "train", "--resume", "--out", out, "--iterations", 4)
    assert status == 0 and "×2" in errors and "from iteration 2" in errors
    status, _, errors = run("sr", "train", "--resume", "--out", out, "--scale", 4)
    assert status == 2 and "scale 2, not 4" in errors


def test_a_project_that_has_moved_goes_on(project, tmp_path):
    folder, options = project
    out = folder / "run"
    whole = tmp_path / "whole"
    assert run_here(options, whole) == 0
    stop(options, out)
    folder.rename(tmp_path / "elsewhere")
    moved = [option.replace(str(folder), str(tmp_path / "elsewhere")) for option in options]
    assert run_here(moved, tmp_path / "elsewhere" / "run", "--resume") == 0
    assert equal(tmp_path / "elsewhere" / "run", whole)


def repaint(folder):
    picture(70, 50, seed=8).save(folder / "painting.png")


def retouch(folder):
    (folder / "photos" / "2.jpg").write_bytes((folder / "photos" / "2.jpg").read_bytes() + b"x")


def rename(folder):
    (folder / "photos" / "2.jpg").rename(folder / "photos" / "7.jpg")


def add(folder):
    picture(40, 40).save(folder / "photos" / "9.jpg")


def retrain_vgg(folder):
    names = {name: 1.01 * tensor for name, tensor in read_tensors(folder / "vgg.npz")[0].items()}
    write_tensors(folder / "vgg.npz", names, {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (repaint, "the painting ("),
        (retouch, "the photos (7 photos, "),
        (rename, "the photos (7 photos, "),
        (add, "8 photos, "),
        (retrain_vgg, "VGG-16's weights ("),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_other_contents_under_the_same_names_are_refused(project, tmp_path, capsys, change, message):
    folder, options = project
    out = tmp_path / "run"
    stop(options, out)
    before = (out / "checkpoint.safetensors").read_bytes()
    change(folder)
    assert run_here(options, out, "--resume") == 2
    errors = capsys.readouterr().err
    assert "was trained on other contents: " in errors and message in errors and " now)" in errors
    assert (out / "checkpoint.safetensors").read_bytes() == before


def test_the_same_weights_in_another_format_are_the_same(project, tmp_path):
    folder, options = project
    out = tmp_path / "run"
    stop(options, out)
    weights, _ = read_tensors(folder / "vgg.npz")
    write_tensors(folder / "vgg.safetensors", weights, {})
    assert run_here(options, out, "--resume", "--vgg", str(folder / "vgg.safetensors")) == 0


def test_the_number_of_iterations_belongs_to_a_decaying_rate(project, tmp_path, capsys):
    _, options = project
    assert run_here(options, tmp_path / "run", "--decay") == 0
    assert run_here(options, tmp_path / "run", "--decay", "--resume", "--iterations", "14") == 2
    assert "was trained with iterations 12, not 14" in capsys.readouterr().err


def test_a_checkpoint_of_before_goes_on_with_a_painting_of_the_same_name(project, tmp_path, capsys):
    """It says nothing about contents."""
    folder, options = project
    out = tmp_path / "run"
    stop(options, out)
    loaded, metadata = read_tensors(out / "checkpoint.safetensors")
    training = checkpoints.read_training(out / "checkpoint.safetensors")
    for name in ("contents", "average", "noise", "stability"):
        del training[name]
    write_tensors(out / "checkpoint.safetensors", loaded, {**metadata, "training": json.dumps(training)})
    picture(70, 50, seed=9).save(folder / "other.png")
    assert run_here(options, out, "--resume", "--style", str(folder / "other.png")) == 2
    assert "name of the painting painting.png, not other.png" in capsys.readouterr().err
    assert run_here(options, out, "--resume") == 0


@pytest.mark.parametrize(
    "damage",
    [
        {"contents": 5},
        {"lr": "high"},
        {"style_layers": [1, 2]},
        {"style_layers": None},
        {"resize": ["a", "b"]},
        {"network": "paper"},
        {"iterations": None},
        {"step": "x"},
        {"device": 3},
        {"nonesuch": 1},
    ],
    ids=lambda damage: next(iter(damage)),
)
def test_damaged_metadata_is_refused(project, tmp_path, capsys, damage):
    _, options = project
    out = tmp_path / "run"
    assert run_here(options, out, "--iterations", "1") == 0
    loaded, metadata = read_tensors(out / "checkpoint.safetensors")
    training = json.dumps(json.loads(metadata["training"]) | damage)
    write_tensors(out / "checkpoint.safetensors", loaded, metadata | {"training": training})
    capsys.readouterr()
    assert main(["train", "--resume", "--out", str(out)]) == 2
    errors = capsys.readouterr().err
    assert "not a checkpoint of such a training run" in errors and errors.count("\n") == 1


def test_a_network_that_cannot_be_built_is_refused(project, tmp_path, capsys):
    _, options = project
    out = tmp_path / "run"
    assert run_here(options, out, "--iterations", "1") == 0
    loaded, metadata = read_tensors(out / "checkpoint.safetensors")
    training = json.dumps(json.loads(metadata["training"]) | {"network": {"preset": "paper", "depth": 3}})
    write_tensors(out / "checkpoint.safetensors", loaded, metadata | {"training": training})
    assert main(["train", "--resume", "--out", str(out)]) == 2
    assert "no network can be made of {'preset': 'paper', 'depth': 3}" in capsys.readouterr().err


def test_a_second_run_in_the_same_folder_is_refused(project, tmp_path):
    _, options = project
    out = tmp_path / "run"
    first = start([*options, "--iterations", "100000"], out)
    for line in first.stderr:
        if "photos ·" in line:
            break
    while not (out / "losses.csv").exists():
        assert first.poll() is None
    status, errors = finish(start(options, out, "--resume"))
    assert status == 2 and "run: another run is training here; wait for it, or name another folder" in errors
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert (out / ".lock").exists(), "a killed run leaves it"
    assert run_here(options, out, "--resume") == 0, "and nobody minds"
    assert not (out / ".lock").exists()


def test_a_run_does_not_train_on_what_runs_have_drawn(project, capsys):
    folder, options = project
    out = folder / "photos" / "runs" / "one"
    stop(options, out)
    errors = capsys.readouterr().err
    assert "7 photos ·" in errors and "left out" not in errors
    assert run_here(options, out, "--resume") == 0
    errors = capsys.readouterr().err
    assert f"left out 2 images that runs in {folder / 'photos'} have drawn" in errors and "7 photos ·" in errors
    (folder / "photos" / "previews").mkdir()
    picture(40, 40).save(folder / "photos" / "previews" / "mine.png")
    assert run_here(options, folder / "other") == 0
    assert "8 photos ·" in capsys.readouterr().err, "a folder of that name without a run beside it is the user's"


def test_a_dead_network_is_told(project, tmp_path, capsys):
    _, options = project
    assert run_here(options, tmp_path / "run") == 0
    assert "alike" not in capsys.readouterr().err
    assert run_here(options, tmp_path / "dead", "--preset", "paper", "--lr", "100") == 0
    assert "iteration 12: the network paints all photos alike; begin again with a lower --lr" in capsys.readouterr().err
