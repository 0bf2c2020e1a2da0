"""Networks that fastperc did not define: frozen, and one step of their training without the optimizer."""

from __future__ import annotations

from collections.abc import Callable

from gallery import SIZES, networks
from harness import DEVICE, Case, Measure, runs
from networks import forward, image
from providers import Provider
from torch import Tensor, nn

import fastperc

NETWORKS = networks()
FROZEN = {  # name, dtype, of an image at a time
    "cpu": [
        *((name, "fp32") for name in SIZES),
        ("transformer_net", "bf16"),
        ("edsr", "bf16"),
    ],
    "cuda": [(name, "bf16") for name in SIZES],
}
TRAINED = {  # name, batch, side
    "cpu": [
        ("transformer_net", 1, 256),
        ("cyclegan", 2, 96),  # of one image PyTorch 2.13's gradients are wrong
        ("unet", 1, 256),
        ("edsr", 4, 48),
        ("srresnet", 4, 48),
        ("rrdb", 2, 64),
        ("resnet18", 4, 224),
        ("resnet50", 2, 224),
        ("mobilenet_v2", 4, 224),
    ],
    "cuda": [
        ("transformer_net", 4, 256),
        ("cyclegan", 1, 256),
        ("unet", 4, 256),
        ("edsr", 16, 48),
        ("srresnet", 16, 48),
        ("rrdb", 8, 32),
        ("resnet18", 64, 224),
        ("resnet50", 32, 224),
        ("mobilenet_v2", 32, 224),
    ],
}
TRAINING_DTYPE = {"cpu": "fp32", "cuda": "amp"}[DEVICE]
# torch.compile takes up to a minute for each. In inference on a CPU it is behind OpenVINO on all of them.
COMPILED = {"cpu": {("transformer_net", "training"), ("edsr", "training"), ("resnet18", "training")}, "cuda": None}
# Of an output. Deep networks round more than one layer, and tests hold fastperc to 1e-5.
TOLERANCE = {"fp32": (5e-5, 0.05), "bf16": (0.1, 0), "amp": (0.1, 1.0)}


def is_compiled(name: str, mode: str) -> bool:
    """Whether torch.compile is a peer."""
    chosen = COMPILED[DEVICE]
    return chosen is None or (name, mode) in chosen


def freeze(module: nn.Module, *inputs: Tensor) -> Callable[[Tensor], Tensor]:
    """``module`` as fastperc runs it with constant weights."""
    return fastperc.freeze(module)


def accelerate(module: nn.Module) -> nn.Module:
    """``module`` as fastperc trains it, with the same parameters."""
    return fastperc.accelerate(module)


def frozen(name: str, dtype: str) -> Case:
    """One image in eval mode."""
    height, width = SIZES[name].benchmark
    return Case(
        "gallery",
        "inference",
        f"{name} 1x3x{height}x{width}",
        dtype,
        module=NETWORKS[name],
        inputs=lambda: (image(1, height, width),),
        reference=forward,
        fused=forward,
        freeze=freeze,
        channels_last=True,
        tolerance=TOLERANCE[dtype],
        compiled=is_compiled(name, "inference"),
    )


def trained(name: str, n: int, side: int) -> Case:
    """Forward and backward of a batch in train mode."""
    return Case(
        "gallery",
        "forward+backward",
        f"{name} {n}x3x{side}x{side}",
        TRAINING_DTYPE,
        module=NETWORKS[name],
        inputs=lambda: (image(n, side, side),),
        reference=forward,
        fused=forward,
        accelerate=accelerate,
        channels_last=True,
        tolerance=TOLERANCE[TRAINING_DTYPE],
        compiled=is_compiled(name, "training"),
    )


CASES = [*(frozen(*sizes) for sizes in FROZEN[DEVICE]), *(trained(*sizes) for sizes in TRAINED[DEVICE])]


@runs(CASES)
def test_gallery(measure: Measure, case: Case, provider: Provider) -> None:
    measure(case, provider)
