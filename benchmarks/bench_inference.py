"""Whole networks in eval mode, and video: frames from the CPU's memory to the device, painted, and back."""

from __future__ import annotations

from collections.abc import Callable

import torch
from harness import DEVICE, Case, Measure, runs
from networks import forward, image, trained
from providers import Provider
from torch import Tensor, nn

import fastperc
from fastperc import SuperResolutionNet, TransformNet, reference

NETWORKS = {
    "paper": lambda: trained(TransformNet("paper")),
    "x4": lambda: trained(SuperResolutionNet(4)),
    "great_wave": lambda: fastperc.load("great_wave"),  # instance norm, reflection padding, nearest upsampling
}
SIZES = {  # batch, height, width, dtype
    "cpu": [
        ("paper", 1, 256, 256, "fp32"),
        ("paper", 1, 256, 256, "bf16"),
        ("paper", 1, 512, 512, "fp32"),
        ("paper", 1, 512, 512, "bf16"),
        ("x4", 1, 72, 72, "fp32"),
        ("great_wave", 1, 256, 256, "fp32"),
    ],
    "cuda": [
        ("paper", 1, 256, 256, "bf16"),
        ("paper", 1, 512, 512, "bf16"),
        ("paper", 1, 1080, 1920, "bf16"),
        ("paper", 1, 2160, 3840, "bf16"),
        ("paper", 32, 256, 256, "bf16"),
        ("x4", 1, 270, 480, "bf16"),
        ("great_wave", 1, 1080, 1920, "bf16"),
    ],
}
VIDEOS: dict[str, list[tuple[str, int, int, str, int]]] = {"cpu": [], "cuda": [("paper", 1080, 1920, "bf16", 60)]}
TOLERANCE = {"fp32": (1e-5, 0), "bf16": (5e-2, 0)}


def freeze(module: nn.Module, *inputs: Tensor) -> Callable[[Tensor], Tensor]:
    """An engine of ``module``."""
    return fastperc.freeze(module)


def one_by_one(module: nn.Module, *frames: Tensor) -> Tensor:
    """Paints ``frames``, uint8 [H, W, 3] on the CPU, without an engine; returns the last picture."""
    weight = next(module.parameters())
    for frame in frames:
        x = frame.to(weight.device).permute(2, 0, 1)[None].to(weight.dtype) / 255
        picture = reference.to_levels(module(x))[0].permute(1, 2, 0).cpu()
    return picture


def streamed(engine: fastperc.engine.engine.Engine, *frames: Tensor) -> Tensor:
    """Paints ``frames`` with an engine; returns the last picture."""
    for picture in engine.stream(frames):
        last_picture = picture
    return last_picture


def still(name: str, n: int, height: int, width: int, dtype: str) -> Case:
    """One image, or a batch of them."""
    return Case(
        "inference",
        "inference",
        f"{name} {n}x3x{height}x{width}",
        dtype,
        module=NETWORKS[name],
        inputs=lambda: (image(n, height, width),),
        reference=forward,
        fused=forward,
        freeze=freeze,
        channels_last=True,
        track_memory=height >= 2160,
        tolerance=TOLERANCE[dtype],
    )


def video(name: str, height: int, width: int, dtype: str, frames: int) -> Case:
    """A video of ``frames`` frames."""

    def inputs() -> tuple[Tensor, ...]:
        return tuple(torch.randint(256, (frames, height, width, 3), dtype=torch.uint8))

    return Case(
        "inference",
        "video",
        f"{name} {height}x{width}x3",
        dtype,
        module=NETWORKS[name],
        inputs=inputs,
        reference=one_by_one,
        fused=streamed,
        freeze=freeze,
        channels_last=True,
        tolerance=TOLERANCE[dtype],
        frames=frames,
    )


CASES = [*(still(*sizes) for sizes in SIZES[DEVICE]), *(video(*sizes) for sizes in VIDEOS[DEVICE])]


@runs(CASES)
def test_inference(measure: Measure, case: Case, provider: Provider) -> None:
    measure(case, provider)
