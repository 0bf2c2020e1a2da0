"""The style networks that tests build: every preset, and the options changed one by one."""

from __future__ import annotations

import torch

from fastperc import TransformNet
from fastperc.presets import PRESETS

VARIANTS = [
    *[(preset, residual, {}) for preset in PRESETS for residual in (True, False, "he")],
    ("paper", True, dict(norm="instance", upsample="nearest")),
    ("instance", True, dict(padding="reflect", upsample="nearest")),
    ("eccv16", True, dict(padding="zero")),
    ("eccv16", True, dict(output="caffe")),
    ("instance", True, dict(output="caffe")),
    ("examples", True, dict(norm="batch", upsample="transposed", padding="reflect40")),
]


def variant_id(variant) -> str:
    preset, residual, changes = variant
    return "-".join([preset, {True: "residual", False: "plain", "he": "he"}[residual], *changes.values()])


def build_variant(preset, residual, changes) -> TransformNet:
    net = TransformNet(preset, residual, width=8, **changes)
    for name, tensor in net.state_dict().items():  # away from the values that hide a mistake
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        elif name.endswith(("running_mean", "norm.bias", "norm1.bias", "norm2.bias")):
            tensor.normal_(0, 0.3)
    return net


def activations(net: torch.nn.Module, x: torch.Tensor) -> list[tuple[int, ...]]:
    """The shapes that the layers of ``net`` give, in order: (channels, height, width)."""
    shapes = []
    layers = [net.stem, *net.down, *net.blocks, *net.up, net.head]
    handles = [layer.register_forward_hook(lambda m, i, o: shapes.append(tuple(o.shape[1:]))) for layer in layers]
    with torch.inference_mode():
        net.eval()(x)
    for handle in handles:
        handle.remove()
    return shapes
