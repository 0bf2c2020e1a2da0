"""Plain and fused training compared: what counts as agreement, and that neither is taken for the other."""

from __future__ import annotations

import json
import random
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from conftest import picture
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

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
    assert convergence.main(command) in (0, 1)
    written = json.loads((tmp_path / "out.json").read_text())
    assert (written["iterations"], written["stock_threads"], written["style"]) == (3, [1, 2, 3], "painting.png")
    for name in ("residual", "non-residual"):
        losses = written[name]["losses"]
        assert [len(one) for one in (*losses["stock"], losses["fused"])] == [3] * 4
        assert losses["fused"][0] == pytest.approx(losses["stock"][0][0], rel=1e-3), "the same weights and photos"
        assert written[name]["agrees"] == (written[name]["fused_distance"] <= written[name]["stock_distance"])
    with Image.open(tmp_path / "out.png") as image:
        assert image.size == (1840, 600)
    assert str(tmp_path) not in (tmp_path / "out.json").read_text()


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.names.add(str(operation))
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_only_a_fused_run_has_operations_that_are_not_pytorchs_own(photo_folder, vgg_file, tmp_path, fused):
    picture(70, 50, seed=9).save(tmp_path / "painting.png")
    recipe = StyleRecipe(
        style=str(tmp_path / "painting.png"),
        data=str(photo_folder),
        vgg=str(vgg_file),
        style_layers=("relu1_2", "relu2_2"),
        size=32,
        iterations=2,
        workers=0,
    )
    with Operations() as operations:
        losses = convergence.losses_of(recipe, 1, fused)
    found = {name.split(".")[0] for name in operations.names}
    assert len(losses) == 2 and "aten" in found
    assert bool(found - {"aten", "prim", "profiler"}) == fused


def test_a_run_that_is_not_what_it_claims_is_refused(command, monkeypatch):
    monkeypatch.setattr(convergence.backends, "use_backend", lambda name: nullcontext())
    with pytest.raises(RuntimeError, match="the plain run ran on native"):
        convergence.main(command)


@pytest.mark.parametrize(
    ("change", "told"),
    [(("--iterations", "1"), "averaged over 2"), (("--style", "none.png"), "none.png: no such file")],
)
def test_bad_input(command, capsys, change, told):
    with pytest.raises(SystemExit) as stopped:
        convergence.main([*command, *change])
    assert stopped.value.code == 2 and told in capsys.readouterr().err


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


def test_runs_that_do_not_differ_tell_nothing():
    (one,) = curves(1, 0.05)
    with pytest.raises(ValueError, match="of which the plain ones differ"):
        convergence.compare([one, one, one], one)
