"""Plain and fused training compared: what counts as agreement, and that neither is taken for the other."""

from __future__ import annotations

import json
import random
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from pictures import picture
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from fastperc import backends, use_backend
from fastperc.training.style import StyleRecipe

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import convergence


@pytest.fixture
def command(photo_folder, vgg_options, tmp_path, monkeypatch):
    monkeypatch.setattr(convergence, "WINDOW", 2)
    style = tmp_path / "painting.png"
    picture(70, 50, seed=9).save(style)
    options = ["--style", style, "--data", photo_folder, *vgg_options, "--device", "cpu", "--size", 32]
    return [str(part) for part in (*options, "--iterations", 3, "--out", tmp_path / "out.json")]


def test_runs_and_writes_losses_and_figure(command, tmp_path):
    """Three iterations are too few to say whether the fused run agrees: the status must be the one that was written."""
    status = convergence.main(command)
    written = json.loads((tmp_path / "out.json").read_text())
    assert (written["iterations"], written["stock_threads"], written["style"]) == (3, [1, 2, 3], "painting.png")
    results = [written[name] for name in ("residual", "non-residual")]
    for result in results:
        losses = result["losses"]
        assert [len(run) for run in (*losses["stock"], losses["fused"])] == [3] * 4
        assert losses["fused"][0] == pytest.approx(losses["stock"][0][0], rel=1e-3), "the same weights and photos"
        assert result["agrees"] == (result["fused_distance"] <= result["stock_distance"])
    assert status == (0 if all(result["agrees"] for result in results) else 1)
    with Image.open(tmp_path / "out.png") as image:
        assert image.size == (1840, 600)
    assert str(tmp_path) not in (tmp_path / "out.json").read_text()


@pytest.mark.parametrize("astray", [None, True, False], ids=["neither", "the residual run", "the other"])
def test_the_exit_status_says_whether_both_fused_runs_agree(command, tmp_path, monkeypatch, astray):
    """``astray``: the kind of block whose fused run ends elsewhere."""
    plain = {1: [3.0, 2.0, 1.0], 2: [3.0, 2.1, 1.1], 3: [3.0, 2.05, 1.05]}

    def losses_of(recipe, threads, fused):
        if not fused:
            return plain[threads]
        return [3.0, 4.0, 4.0] if recipe.network["residual"] is astray else [3.0, 2.04, 1.06]

    monkeypatch.setattr(convergence, "losses_of", losses_of)
    assert convergence.main(command) == (0 if astray is None else 1)
    written = json.loads((tmp_path / "out.json").read_text())
    agree = {residual: written[name]["agrees"] for name, residual in convergence.RUNS.items()}
    assert agree == {True: astray is not True, False: astray is not False}


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.names.add(str(operation))
        return operation(*args, **(kwargs or {}))


@pytest.fixture
def recipe(photo_folder, vgg_file, tmp_path):
    picture(70, 50, seed=9).save(tmp_path / "painting.png")
    return StyleRecipe(
        style=str(tmp_path / "painting.png"),
        data=str(photo_folder),
        vgg=str(vgg_file),
        style_layers=("relu1_2", "relu2_2"),
        size=32,
        iterations=2,
        workers=0,
    )


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_only_a_fused_run_has_operations_that_are_not_pytorchs_own(recipe, fused):
    with Operations() as operations:
        losses = convergence.losses_of(recipe, 1, fused)
    libraries = {name.split(".")[0] for name in operations.names}
    assert len(losses) == 2 and "aten" in libraries
    assert bool(libraries - {"aten", "prim", "profiler"}) == fused


def test_a_fused_run_without_a_kernel_is_refused(recipe):
    with use_backend("reference"), pytest.raises(RuntimeError, match="the fused run ran on reference"):
        convergence.losses_of(recipe, 1, fused=True)


def test_a_plain_run_with_a_kernel_is_refused(recipe, monkeypatch):
    monkeypatch.setattr(backends, "use_backend", lambda name: nullcontext())
    with pytest.raises(RuntimeError, match="the plain run ran on native"):
        convergence.losses_of(recipe, 1, fused=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [(("--iterations", "1"), "averaged over 2"), (("--style", "none.png"), "none.png: no such file")],
)
def test_bad_input(command, capsys, change, message):
    with pytest.raises(SystemExit) as stopped:
        convergence.main([*command, *change])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def curves(n, drift, seed=0):
    """``n`` curves of the same shape, each off by up to ``drift`` of it."""
    rng = random.Random(seed)
    return [[(1 + 30 / i) * (1 + rng.uniform(-drift, drift)) for i in range(1, 101)] for _ in range(n)]


def test_a_fourth_run_of_the_same_agrees_and_another_does_not():
    *stock, fourth = curves(4, 0.05)
    numbers = convergence.compare(stock, fourth)
    assert numbers["agrees"] and 0 < numbers["fused_distance"] <= numbers["stock_distance"] < 0.1
    assert numbers["final_fused"] == pytest.approx(sum(fourth[-25:]) / 25, rel=1e-4)
    numbers = convergence.compare(stock, [1.1 * loss for loss in fourth])
    assert not numbers["agrees"] and numbers["fused_distance"] > 0.08 and numbers["share_within_stock"] == 0


def test_runs_that_do_not_differ_are_refused():
    (curve,) = curves(1, 0.05)
    with pytest.raises(ValueError, match="of which the plain ones differ"):
        convergence.compare([curve, curve, curve], curve)
