"""Nothing that a CUDA graph records waits for the GPU or copies from the host: the engine's pass, the training step.

They run in a process of their own: here Triton's kernels are its interpreter's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from capture import RefusedCalls
from torch import Tensor

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")


def calls_of(*arguments):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, Path(__file__).with_name("capture.py"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@needs_triton
@pytest.mark.slow
def test_a_capture_refuses_nothing_of_the_engine_and_the_training_step():
    calls = calls_of()
    assert sum(name.startswith("engine") for name in calls) == 6 and sum(name.startswith("step") for name in calls) == 7
    assert not {name: found for name, found in calls.items() if found}


@needs_triton
@pytest.mark.slow
def test_a_constant_from_the_host_is_found():
    """The packing of weights once made one on the GPU in each step."""
    (calls,) = calls_of("--spoiled", "step, paper").values()
    assert any(call.startswith("aten.lift_fresh.default at") for call in calls)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: x.new_tensor([1.0, 2.0]),
        lambda x: torch.tensor([1.0, 2.0]),
        lambda x: x[[0, 1]],
        lambda x: x[x > 0],
        lambda x: x.sum().item(),
        lambda x: bool(x.sum() > 1),
        lambda x: x.equal(x),
        lambda x: x.nonzero(),
        lambda x: x.long().unique(),
    ],
    ids=["new_tensor", "tensor", "list-index", "mask", "item", "bool", "equal", "nonzero", "unique"],
)
def test_refused_operations_are_found(call):
    x = torch.rand(4)
    with RefusedCalls() as refused:
        (2 * x).relu()
        assert not refused.calls
        call(x)
    assert refused.calls


@pytest.mark.parametrize(
    ("function", "arguments", "found"),
    [
        (Tensor.tolist, {}, True),
        (Tensor.cpu, {}, True),
        (Tensor.to, {"device": "cpu"}, True),
        (Tensor.to, {"device": torch.device("cuda", 90)}, False),
        (Tensor.to, {"dtype": torch.bfloat16}, False),
        (torch.zeros, {}, True),
        (torch.arange, {"device": "cuda:0"}, False),
        (torch.zeros_like, {}, False),
    ],
    ids=["tolist", "cpu", "to-cpu", "to-cuda", "to-dtype", "zeros", "arange-cuda", "zeros_like"],
)
def test_refused_functions_are_found(function, arguments, found):
    refused = RefusedCalls()
    refused.check(function, (), arguments)
    assert bool(refused.calls) == found
