"""The log of losses: it waits to be asked, writes whole rows, and names the first loss that is not finite."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from training_runs import losses

from fastperc.training.log import GPU_INTERVAL, LossLog
from fastperc.training.processes import Processes
from fastperc.training.recipe import Recipe


class Terms(NamedTuple):
    total: torch.Tensor
    tv: torch.Tensor


def open_log(out, device="cpu"):
    return LossLog(Recipe(data="", iterations=100), out, 0, Processes(torch.device(device)))


def test_losses_are_fetched_together_and_the_first_that_is_not_finite_is_named(tmp_path):
    log = open_log(tmp_path)
    for values in ([1.0, 2.0], [1 / 3, 1e-12]):
        log.add(Terms(*torch.tensor(values)))
    assert not (tmp_path / "losses.csv").exists(), "nothing is fetched before it is asked for"
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
    assert open_log(tmp_path, "cuda").interval == GPU_INTERVAL > 1 == open_log(tmp_path).interval
