"""The committed counts of kernel launches are those of the code, without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

# isort: split
import launch_counts

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")


def test_a_training_step_launches_what_the_table_says():
    """After a change: python benchmarks/launch_counts.py, and see that no count has grown."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, launch_counts.__file__, "--check"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_counts_are_of_the_kinds_of_the_table():
    table = json.loads(Path(launch_counts.TABLE).read_text())
    assert all(tuple(kinds) == launch_counts.KINDS for kinds in table.values())
    for name in ("paper", "great_wave", "examples", "×4"):
        assert table[f"{name}, bf16"] == table[f"{name}, fp16"]


@pytest.mark.parametrize(
    ("call", "launches"),
    [
        (lambda x: x.view(4).unsqueeze(0).T.detach(), 0),
        (lambda x: torch.empty_like(x), 0),
        (lambda x: x + 1, 1),
        (lambda x: x.add_(1), 1),
        (lambda x: x.to(torch.float16), 1),
        (lambda x: torch.zeros(3), 1),
        (lambda x: x.split(1), 0),
        (lambda x: nn.functional.pad(x, (1, 1)), 2),
        (lambda x: torch._foreach_add_([x] * 110, 1), 1),
        (lambda x: torch._foreach_add_([x] * 111, 1), 2),
        (lambda x: torch._foreach_copy_([x.clone() for _ in range(65)], [x] * 65), 65 + 2),
        (lambda x: x @ x, 1),
    ],
    ids=["views", "empty", "add", "add_", "to", "zeros", "split", "pad", "foreach", "foreach-111", "foreach-2", "mm"],
)
def test_what_counts_as_a_launch(call, launches):
    launched = []
    x = torch.rand(2, 2)
    with launch_counts.CountedCalls(launched):
        call(x)
    assert sum(one.times for one in launched) == launches


def test_fused_adam_takes_36_weights_a_launch():
    weights = [nn.Parameter(torch.rand(2)) for _ in range(37)]
    optimizer = torch.optim.Adam(weights, fused=True)
    sum(weight.sum() for weight in weights).backward()
    launched = []
    with launch_counts.CountedCalls(launched):
        optimizer.step()
    assert {one.name: one.times for one in launched if one.name.startswith("_f")} == {
        "_foreach_add_": 1,
        "_fused_adam_": 2,
    }
