"""The options that make better style networks, all at once: a run stopped and resumed is the run that was not."""

from __future__ import annotations

import pytest
import torch
from training_runs import losses, run_here, stop_in_iteration, tensors, train_options, training_metadata

ITERATIONS = 20  # of which the last two are averaged
OPTIONS = [
    *("--preset", "instance", "--padding", "reflect", "--upsample", "nearest", "--decay", "--average"),
    *("--noise", "0.05", "--stability", "2", "--resize", "32-48", "--tv-weight", "0.1", "--style-size", "40"),
    *("--iterations", str(ITERATIONS), "--checkpoint-every", "10"),
]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def options(photo_folder, vgg_file, tmp_path_factory):
    return [*train_options(photo_folder, vgg_file, tmp_path_factory.mktemp("style")), *OPTIONS]


@pytest.fixture(scope="module")
def finished(options, tmp_path_factory):
    """The folder of a run that nothing interrupted."""
    out = tmp_path_factory.mktemp("finished") / "run"
    assert run_here(options, out) == 0
    return out


def same_files(out, expected_out):
    """Whether two runs left the same, bit for bit."""
    for file in ("model.safetensors", "checkpoint.safetensors"):
        actual, expected = tensors(out / file), tensors(expected_out / file)
        assert actual.keys() == expected.keys()
        assert [name for name, tensor in expected.items() if not torch.equal(tensor, actual[name])] == []
    last = f"previews/{ITERATIONS:06d}.png"
    return all((out / name).read_bytes() == (expected_out / name).read_bytes() for name in ("losses.csv", last))


@pytest.mark.parametrize("cache", ["auto", "off"])
@pytest.mark.parametrize("stop", [7, ITERATIONS - 1], ids=["before-the-mean", "within-the-mean"])
def test_stopped_and_resumed_is_the_run_that_was_not(options, finished, tmp_path, monkeypatch, stop, cache):
    out = tmp_path / "run"
    stop_in_iteration(monkeypatch, stop)
    assert run_here(options, out, "--cache", cache) == 0
    assert training_metadata(out / "checkpoint.safetensors")["step"] == stop
    assert run_here(options, out, "--cache", cache, "--resume") == 0
    assert same_files(out, finished)


def test_the_recipe_and_the_losses_name_them(finished):
    recipe = training_metadata(finished / "model.safetensors")
    assert [recipe[name] for name in ("average", "noise", "stability", "resize")] == [True, 0.05, 2.0, [32, 48]]
    header, rows = losses(finished)
    assert header == ["iteration", "total", "content", "style", "tv", "stability"] and len(rows) == ITERATIONS
    assert all(abs(total - sum(terms)) < 1e-5 * total and terms[-1] > 0 for _, total, *terms in rows)


def test_the_network_is_the_mean_of_the_last_weights(options, finished, tmp_path, monkeypatch):
    stop_in_iteration(monkeypatch, ITERATIONS - 1)
    assert run_here(options, tmp_path / "run") == 0
    last_but_one, last = (tensors(out / "checkpoint.safetensors") for out in (tmp_path / "run", finished))
    means = tensors(finished / "model.safetensors")
    assert all(torch.allclose(mean, (last_but_one[name] + last[name]) / 2, atol=1e-7) for name, mean in means.items())
    assert any(not torch.allclose(mean, last[name], atol=1e-6) for name, mean in means.items())


def test_a_mean_that_has_begun_is_not_begun_anew(options, finished, tmp_path, capsys):
    constant = [option for option in options if option != "--decay"]
    out = tmp_path / "run"
    assert run_here(constant, out) == 0
    assert run_here(constant, out, "--iterations", "21", "--resume") == 2
    assert "give 20 as before, or many more" in capsys.readouterr().err
    assert run_here(constant, out, "--iterations", "23", "--resume") == 0
    assert training_metadata(out / "model.safetensors")["step"] == 23


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--resize", "16-48"), "--resize 16 is too small for crops of 32 pixels"),
        (("--resize", "48-32"), "48-32 is not a range of pixels like 256-512"),
        (("--resize", "a"), "a is not a range of pixels like 256-512"),
        (("--noise", "-1"), "-1 is not a finite number from 0 up"),
        (("--stability", "inf"), "inf is not a finite number from 0 up"),
    ],
    ids=["small", "reversed", "text", "noise", "stability"],
)
def test_bad_values_are_refused(options, run, tmp_path, change, message):
    status, _, errors = run(*options, "--out", tmp_path / "run", *change)
    assert status == 2 and message in errors
    assert not (tmp_path / "run").exists()
