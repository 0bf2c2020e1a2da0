"""Runs each part that a GPU is for once, in less than a minute, and checks it: kernels, CUDA graphs, training, video.

    python benchmarks/smoke.py [--tiny]

``--tiny`` takes small pictures, for a CPU. Every check runs, also after one that fails. Exit status 1: one failed.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable
from copy import deepcopy
from itertools import product
from typing import Any

import torch
from networks import perceptual_loss, trained
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fastperc import SuperResolutionNet, TransformNet, _native, freeze, ops, use_backend
from fastperc.devices import computes_in
from fastperc.training.step import EAGER_STEPS, TrainStep, adam
from fastperc.types import RELU, Activation, Epilogue, Geometry, InstanceNorm, Window, same_sides

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "paper": lambda: TransformNet("paper"),
    "examples": lambda: TransformNet("examples"),
    "instance": lambda: TransformNet("instance"),
    "reflect-nearest": lambda: TransformNet("instance", padding="reflect", upsample="nearest"),
    "x4": lambda: SuperResolutionNet(4),
}
STEPS = EAGER_STEPS + 3  # the fourth is recorded as a CUDA graph


def error(actual: Tensor, exact: Tensor) -> float:
    """‖actual − exact‖ / ‖exact‖; infinity for NaN."""
    value = float((actual.double() - exact).norm() / exact.norm())
    return value if value == value else float("inf")


def check_engine(make: Callable[[], nn.Module], dtype: torch.dtype, side: int) -> str:
    """The engine of a network at its first, recording and replaying call, against float64 and stock PyTorch."""
    net = trained(make()).eval().to(DEVICE)
    x = torch.rand(1, 3, side, side + 8, device=DEVICE)
    with torch.no_grad():
        exact, stock = deepcopy(net).double()(x.double()), deepcopy(net).to(dtype)(x.to(dtype))
    engine = freeze(net, dtype)
    pictures = [engine(x) for _ in range(3)]
    ours, theirs = error(pictures[0], exact), error(stock, exact)
    assert all(torch.equal(picture, pictures[0]) for picture in pictures), "a replay differs from the first call"
    assert ours <= 1.5 * theirs + 1e-3, f"error {ours:.2g}, stock PyTorch's {theirs:.2g}"
    return f"error {ours:.2g}, stock PyTorch's {theirs:.2g}"


def check_step(amp: bool, side: int) -> str:
    """Training steps, op by op and then as a CUDA graph, against the same steps op by op."""
    terms, recordings = [], []
    for may_record in (False, True):
        torch.manual_seed(0)
        net = TransformNet("paper").to(DEVICE).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        loss = perceptual_loss("relu2_2", side).to(DEVICE)
        step = TrainStep(net, loss, adam(net.parameters(), 1e-3, DEVICE), amp)
        step.may_record &= may_record
        photos = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8)
        terms.append(torch.stack([step(photos, 1e-3).total.clone() for _ in range(STEPS)]))
        recordings.append(step.recording)
    assert DEVICE.type == "cpu" or recordings[1] is not None, "the step was not recorded"
    off = error(terms[1], terms[0].double())
    assert off <= 3e-2, f"the recorded step differs by {off:.2g}"
    return f"recorded: {recordings[1] is not None}, differs by {off:.2g}"


def check_picture(height: int, width: int) -> str:
    """A picture from 8-bit levels to levels."""
    engine = freeze(trained(TransformNet("paper")).eval().to(DEVICE), torch.bfloat16)
    image = torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, device=DEVICE)
    first = engine(image)
    began = time.perf_counter()
    again = [engine(image) for _ in range(2)][-1]
    again.sum().item()
    assert first.shape == image.shape and torch.equal(first, again), "a replay differs from the first call"
    return f"{height}×{width}, two more in {1000 * (time.perf_counter() - began):.3g} ms"


def check_video(frames: int, height: int, width: int) -> str:
    """Frames from the CPU through the engine and back."""
    engine = freeze(trained(TransformNet("paper")).eval().to(DEVICE), torch.bfloat16)
    shots = [torch.randint(0, 256, (height, width, 3), dtype=torch.uint8) for _ in range(frames)]
    pictures = list(engine.stream(shots))
    assert len(pictures) == frames
    assert all(torch.equal(picture, engine(shot)) for picture, shot in zip(pictures, shots)), "a frame differs"
    return f"{frames} frames of {height}×{width}"


def check_compiled(dtype: torch.dtype, side: int) -> str:
    """The compiled kernels around convolutions, C++ or CUDA, once each: norms in training, epilogues, images."""
    like: dict[str, Any] = {"device": DEVICE, "dtype": dtype}
    if reason := _native.why_not(torch.empty(0, **like)):
        return f"left out: {reason}"
    if not computes_in(dtype, DEVICE):
        return f"left out: no convolution in {dtype} on this processor"
    formats = [torch.channels_last, *[torch.contiguous_format] * (DEVICE.type == "cuda")]
    errors: list[float] = []
    for norm, memory_format in product((nn.BatchNorm2d(8), nn.InstanceNorm2d(8, affine=True)), formats):
        x, skip, incoming = (torch.randn(2, 8, side, side, **like).to(memory_format=memory_format) for _ in range(3))
        results = {}
        for backend, wide in (("native", dtype), ("reference", torch.float64)):
            leaves = [one.to(wide).detach().requires_grad_() for one in (x, skip)]
            copy = deepcopy(norm).to(DEVICE, torch.float64 if wide == torch.float64 else torch.float32)
            with use_backend(backend):
                y = ops.norm_relu(leaves[0], copy, RELU, leaves[1])
            results[backend] = [y.detach(), *torch.autograd.grad(y, [*leaves, *copy.parameters()], incoming.to(wide))]
        errors += map(error, results["native"], results["reference"])

    x = torch.randn(2, 8, side, side, **like).to(memory_format=torch.channels_last)
    weight, bias = torch.randn(8, 8, 3, 3, device=DEVICE) / 8, torch.randn(8, device=DEVICE)
    image = torch.randint(0, 256, (2, side, side, 3), dtype=torch.uint8, device=DEVICE).permute(0, 3, 1, 2)
    instance_norm = InstanceNorm(torch.ones_like(bias), bias, 1e-5)
    calls: list[tuple[Callable[..., Tensor], Any]] = [
        (ops.conv_bn_relu, (weight, bias, Geometry(1, same_sides(1)), Epilogue(None, Activation("relu6"), x))),
        (ops.conv_bn_relu, (weight, bias, Geometry(1, same_sides(1)), Epilogue(instance_norm))),
        (picture, (weight[:3], bias[:3])),
    ]
    for run, arguments in calls:
        with use_backend("native"), torch.no_grad():
            ours = run(x, *arguments)
        with use_backend("reference"), torch.no_grad():
            exact = run(x.double(), *tree_map_only(Tensor, Tensor.double, arguments))
        errors.append(error(ours, exact.double()))
    with use_backend("native"), torch.no_grad():
        window = Window(-3, -5, side + 9, side + 7)
        ours = ops.image_io(image, window, (2.0, -1.0), dtype)
    with use_backend("reference"), torch.no_grad():
        errors.append(error(ours, ops.image_io(image, window, (2.0, -1.0), torch.float64)))
    limit = 1e-4 if dtype == torch.float32 else 2e-2
    assert max(errors) <= limit, f"errors {', '.join(f'{one:.2g}' for one in errors)}"
    return f"{len(errors)} results, error {max(errors):.2g} at most"


def picture(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What a network's last convolution makes of ``x``: RGB in 0–1."""
    out = torch.empty(len(x), 3, *x.shape[2:], dtype=x.dtype, device=x.device)
    ops.rgb_conv_head(x, weight, bias, same_sides(1), "tanh", out)
    return out


def checks(tiny: bool) -> dict[str, Callable[[], str]]:
    """All checks, by name, the most telling first: kernels compile at their first use, and time may run out."""
    side = 32 if tiny else 128

    def engines(dtype: str) -> dict[str, Callable[[], str]]:
        return {
            f"engine {name} {dtype}": lambda make=make: check_engine(make, DTYPES[dtype], side)  # type: ignore[misc]
            for name, make in NETWORKS.items()
        }

    photos = 32 if tiny else 256
    sizes = ((48, 64), (64, 96)) if tiny else ((512, 512), (2160, 3840))
    frames = (3, 48, 64) if tiny else (20, 720, 1280)
    return {
        "step amp": lambda: check_step(True, photos),
        "compiled fp32": lambda: check_compiled(torch.float32, side),
        "compiled fp16": lambda: check_compiled(torch.float16, side),
        **engines("bf16"),
        **{f"picture {size[0]}": lambda size=size: check_picture(*size) for size in sizes},  # type: ignore[misc]
        "video": lambda: check_video(*frames),
        "step fp32": lambda: check_step(False, photos),
        **engines("fp16"),
    }


def main() -> int:
    """The command line; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small pictures")
    failed = 0
    for name, check in checks(parser.parse_args().tiny).items():
        torch.manual_seed(0)
        began = time.perf_counter()
        try:
            outcome = check()
        except Exception as error:
            failed += 1
            outcome = f"FAILED: {error!r}"
            traceback.print_exc()
        print(f"{name:<28}{time.perf_counter() - began:6.2f} s  {outcome}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
