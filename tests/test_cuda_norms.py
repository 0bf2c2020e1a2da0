"""The CUDA kernels of norms, run on the CPU through the operations that use them: against float64, in every dtype and
layout, in several orders of threads, and under sanitizers. tests/norm_cases.py has the formulas."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import emulation
import pytest
import torch
from cases import dtype_id, error, no_worse
from norm_cases import ACTIVATIONS, DTYPES, ENDS, MORE_NORMS, NORMS, features, norm_of, run
from torch import nn

from fastperc import backends, ops, use_backend
from fastperc.types import RELU

# Odd shapes; planes and channels of whole vectors; several tiles of an image; several blocks of channels.
SHAPES = [(2, 3, 7, 11), (1, 1, 5, 9), (2, 5, 33, 65), (2, 8, 40, 68), (1, 264, 4, 4)]
LAYOUTS = {
    "nchw": lambda x: x.contiguous(),
    "nhwc": lambda x: x.contiguous(memory_format=torch.channels_last),
    "shifted": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),  # no vector is aligned
}
SKIPS = {
    "same": lambda x: x,
    "other-layout": lambda x: x.contiguous() if x.stride(1) == 1 else x.contiguous(memory_format=torch.channels_last),
    "cropped": lambda x: nn.functional.pad(x, (2, 2, 2, 2))[..., 2:-2, 2:-2],
    "wide-crop": lambda x: nn.functional.pad(x, (8, 8, 2, 2))[..., 2:-2, 8:-8],  # its rows are aligned
    "expanded": lambda x: x[:1, :1].expand(x.shape),
    "shifted": LAYOUTS["shifted"],
}
SANITIZED = "(order_of_threads and fp16 and not 264) or (skip_lies and fp32) or image_in or picture_out"
ROUNDING = {torch.float32: 4e-7, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def matches(emulated, norm, x, activation, skip, orders=emulation.ORDERS):
    """Compares the kernels with float64 and with plain PyTorch, and with themselves in another order of threads."""
    exact, exact_statistics = run("reference", norm, x, activation, skip, torch.float64)
    stock, _ = run("reference", norm, x, activation, skip, torch.float32)
    results = []
    for order in orders:
        with emulated.on_gpu(order):
            results.append(run("native", norm, x, activation, skip, x.dtype))
    ours, statistics = results[0]
    for mine, theirs, wanted in zip(ours, stock, exact):
        assert mine.isfinite().all()
        terms_cancel = wanted.numel() == 1  # in the gradient of a single slope
        no_worse(mine, theirs, wanted, ROUNDING[x.dtype] * (4 if terms_cancel else 1))
    for others, _ in results[1:]:
        assert all(map(torch.equal, ours, others)), "the result depends on the order of threads"
    assert all(error(mine, wanted) < 1e-6 for mine, wanted in zip(statistics, exact_statistics))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(
    ("shape", "layout"),
    [(shape, layout) for shape in SHAPES for layout in (LAYOUTS if shape[1] < 100 else ["nhwc"])],
    ids=lambda value: value if isinstance(value, str) else "x".join(map(str, value)),
)
def test_matches_the_formula_in_every_order_of_threads(emulated, shape, dtype, layout):
    x = LAYOUTS[layout](features(shape).to(dtype))
    orders = emulation.ORDERS if shape[1] < 100 else (2,)
    for kind, (activation, with_skip) in zip(("batch", "instance", "batch"), ENDS.values()):
        skip = LAYOUTS[layout](features(shape).to(dtype)) if with_skip else None
        matches(emulated, norm_of(kind, shape[1]), x, activation, skip, orders)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_norm_and_activation(emulated, activation):
    for kind, with_skip, layout in product(MORE_NORMS, (False, True), ("nchw", "nhwc")):
        if kind == "none" and not with_skip:
            continue  # the activation by itself
        x = LAYOUTS[layout](features((2, 8, 20, 16)))
        skip = LAYOUTS[layout](features(x.shape)) if with_skip else None
        matches(emulated, norm_of(kind, 8), x, ACTIVATIONS[activation], skip, orders=(2,))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("skip", SKIPS)
def test_a_skip_lies_anywhere(emulated, skip, dtype):
    for kind, layout in product(NORMS, ("nchw", "nhwc")):
        x = LAYOUTS[layout](features((2, 8, 6, 16)).to(dtype))
        matches(emulated, norm_of(kind, 8), x, RELU, SKIPS[skip](x.flip(3)), orders=(2,))


def test_a_mean_far_from_zero_costs_no_digits(emulated):
    x = torch.randn(2, 6, 40, 30) + 1000
    for layout in LAYOUTS.values():
        matches(emulated, norm_of("batch", 6), layout(x), RELU, None, orders=(2,))


def test_infinity_and_nan_stay(emulated):
    x = features((1, 4, 8, 8))
    x[0, 0, 3, 3], x[0, 1, 2, 2] = float("inf"), float("nan")
    with emulated.on_gpu(), use_backend("native"):
        y = ops.norm_relu(x, nn.InstanceNorm2d(4), RELU)
    assert y[0, :2].isnan().all() and y[0, 2:].isfinite().all()


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_the_choice_on_a_gpu(emulated, layout, monkeypatch):
    """Dense maps of either layout run natively; a bare batch norm is cuDNN's, and what is not dense is PyTorch's."""
    x = LAYOUTS[layout](features((1, 8, 200, 200)))
    with emulated.on_gpu(), backends.recorded() as choices:
        ops.norm_relu(x, nn.BatchNorm2d(8))
        ops.norm_relu(x, nn.InstanceNorm2d(8), None)
        ops.norm_relu(x, nn.BatchNorm2d(8), None)
        ops.norm_relu(x[..., 1:], nn.BatchNorm2d(8))
        ops.norm_relu(x.double(), nn.BatchNorm2d(8).double())
    assert [choice.backend for choice in choices] == ["native", "native", "reference", "reference", "reference"]


def test_the_gradient_of_a_gradient(emulated):
    x = features((2, 3, 4, 5)).requires_grad_()
    penalties = []
    for native in (True, False):
        with (
            emulated.on_gpu() if native else use_backend("reference"),
            use_backend("native" if native else "reference"),
        ):
            (gradient,) = torch.autograd.grad(ops.norm_relu(x, nn.BatchNorm2d(3)).pow(3).sum(), x, create_graph=True)
            penalties.append(torch.autograd.grad(gradient.square().sum(), x)[0])
    assert error(*penalties) < 1e-5


@pytest.mark.slow
def test_clean_under_sanitizers(tmp_path):
    """Tests of the CUDA kernels once more, in a process whose memory AddressSanitizer watches."""
    if reason := emulation.why_not() or emulation.why_not_sanitized():
        pytest.skip(reason)
    emulation.build(tmp_path, sanitized=True)
    files = [__file__, Path(__file__).with_name("test_cuda_epilogues.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-s", "-p", "no:cacheprovider", *files, "-k", SANITIZED]
    done = subprocess.run(command, env=os.environ | emulation.sanitizers(tmp_path), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
