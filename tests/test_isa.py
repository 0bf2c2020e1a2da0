"""The switch that hides instruction sets; isa.py says how it is set."""

from __future__ import annotations

import os
import subprocess
import sys

import isa
import pytest
import torch

from fastperc import _native, devices

CPU = torch.device("cpu")
WHAT_RUNS = """
import torch
from fastperc import _native, devices
half = [devices.computes_in(dtype, torch.device("cpu")) for dtype in devices.HALF]
print(_native.winograd_lanes(), torch.backends.cpu.get_cpu_capability(), *half)
"""
needs_gcc = pytest.mark.skipif(isa.why_not() is not None, reason=str(isa.why_not()))


@pytest.mark.parametrize("name", isa.LEVELS)
def test_every_source_is_known_to_the_switch(name):
    for path in (isa.ROOT / "csrc").iterdir():
        source = isa.hide(isa.LEVELS[name], path.read_text("utf-8"))
        assert not any(architecture in source for architecture in isa.LEVELS[name].hidden)


OTHER_WAYS = ['__builtin_cpu_supports("avx512f")', "#ifdef __AVX512F__", 'target("arch=x86-64-v4")']


@pytest.mark.parametrize("source", OTHER_WAYS)
def test_another_way_to_choose_is_refused(source):
    with pytest.raises(ValueError, match="does not know how to hide"):
        isa.hide(isa.LEVELS["avx2"], source)


@needs_gcc
@pytest.mark.slow  # compiles the kernels, if that was not done before
@pytest.mark.parametrize(("name", "expected"), [("avx2", "8 AVX2 False False"), ("baseline", "4 DEFAULT False False")])
def test_other_processes_have_it_too(name, expected):
    environment = {**os.environ, **isa.environment(name)}
    done = subprocess.run([sys.executable, "-c", WHAT_RUNS], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == expected, done.stderr


@pytest.mark.skipif(isa.VARIABLE not in os.environ, reason="nothing is hidden")
def test_what_is_hidden_here():
    level = isa.LEVELS[os.environ[isa.VARIABLE]]
    assert _native._C.winograd_lanes() == level.lanes
    assert torch.backends.cpu.get_cpu_capability().lower() == level.pytorch
    assert not any(devices.computes_in(dtype, CPU) for dtype in devices.HALF)
