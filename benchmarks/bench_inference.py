"""Whole networks in eval mode."""

from __future__ import annotations

from harness import DEVICE, DTYPE, Case, runs
from networks import forward, image

from fastperc import SuperResolutionNet, TransformNet

NETWORKS = {"paper": lambda: TransformNet("paper"), "x4": lambda: SuperResolutionNet(4)}
SIZES = {
    "cpu": [("paper", 256, 256), ("paper", 512, 512), ("x4", 72, 72)],
    "cuda": [("paper", 256, 256), ("paper", 512, 512), ("paper", 1080, 1920), ("x4", 270, 480)],
}

CASES = [
    Case(
        "inference",
        "inference",
        f"{name} 1x3x{height}x{width}",
        DTYPE,
        module=NETWORKS[name],
        inputs=lambda height=height, width=width: (image(1, height, width),),
        reference=forward,
        channels_last=True,
        tolerance={"fp32": (1e-5, 0), "bf16": (5e-2, 0)}[DTYPE],
    )
    for name, height, width in SIZES[DEVICE]
]


@runs(CASES)
def test_inference(measure, case, provider):
    measure(case, provider)
