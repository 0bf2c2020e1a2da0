"""Every operation in plain PyTorch.

One definition, three uses: the oracle the tests compare with (in float64), the path taken where no fused kernel
serves, and the baseline the benchmarks time. Each function is written as its formula reads; none is tuned.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def widen(x: Tensor) -> Tensor:
    """Half precision as float32, anything wider as it is: sums of squares overflow in half precision."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def tv_loss(x: Tensor, norm: str = "l2", reduction: str = "sum") -> Tensor:
    """Total variation of ``x`` [N, C, H, W]: Σ(dx² + dy²) for ``"l2"``, Σ(|dx| + |dy|) for ``"l1"``.

    ``reduction="mean"`` divides by the number of elements of ``x``. Returns a scalar, float32 or wider.
    """
    x = widen(x)
    dx = x[..., :, 1:] - x[..., :, :-1]
    dy = x[..., 1:, :] - x[..., :-1, :]
    total = dx.square().sum() + dy.square().sum() if norm == "l2" else dx.abs().sum() + dy.abs().sum()
    return total / x.numel() if reduction == "mean" else total


def gram_matrix(x: Tensor) -> Tensor:
    """ψψᵀ / (C·H·W), ψ being ``x`` [N, C, H, W] as a C × H·W matrix (paper, equation 3).

    Returns [N, C, C] in float32 or wider, under autocast too: Σψ² over one 256 × 256 map passes float16's 65,504 as
    soon as the mean square reaches 1, and dividing afterwards is too late.

    Raises:
        ValueError: ``x`` is not [N, C, H, W], or has no elements to a map.
    """
    if x.dim() != 4 or 0 in x.shape[1:]:
        raise ValueError(f"gram_matrix needs features of shape [N, C, H, W] with C, H, W ≥ 1, got {list(x.shape)}")
    with torch.autocast(x.device.type, enabled=False):
        psi = widen(x).flatten(2)
        return psi @ psi.mT / (x.shape[1] * x.shape[2] * x.shape[3])


def gram_loss(x: Tensor, target: Tensor) -> Tensor:
    """‖G(x) − target‖²_F averaged over the batch (paper, equation 4); ``target`` [N or 1, C, C] is a Gram matrix."""
    return (gram_matrix(x) - target).square().sum(dim=(1, 2)).mean()


def feature_loss(x: Tensor, target: Tensor) -> Tensor:
    """‖x − target‖² / (C·H·W) averaged over the batch (paper, equation 2); both [N, C, H, W]."""
    with torch.autocast(x.device.type, enabled=False):
        return F.mse_loss(widen(x), widen(target))


class FrozenConv(NamedTuple):
    """A 3×3 convolution of a fixed network, followed by ReLU."""

    weight: Tensor  # [O, I, 3, 3]
    bias: Tensor  # [O]
    pooled: bool  # whether a 2×2 max pooling stands before it


def vgg_features(x: Tensor, convs: Sequence[FrozenConv], taps: Collection[int]) -> dict[int, Tensor]:
    """The activations of a VGG network, [N, C, H, W] each, by index into ``convs``, computed as deep as asked."""
    features = {}
    for i, conv in enumerate(convs[: 1 + max(taps)]):
        if conv.pooled:
            x = F.max_pool2d(x, 2)
        x = F.conv2d(x, conv.weight, conv.bias, padding=1).relu()
        if i in taps:
            features[i] = x
    return features


def reflect_pad(x: Tensor, left: int, right: int, top: int, bottom: int) -> Tensor:
    """``x`` [N, C, H, W] mirrored outwards about its border pixels, any number of times over.

    ``F.pad`` reflects once and so refuses a border as wide as the image; a 16-pixel image under a border of 40 needs
    several reflections, which successive calls give exactly.
    """
    while left or right or top or bottom:
        height, width = x.shape[-2:]
        step = (min(left, width - 1), min(right, width - 1), min(top, height - 1), min(bottom, height - 1))
        x = F.pad(x, step, mode="reflect")
        left, right, top, bottom = left - step[0], right - step[1], top - step[2], bottom - step[3]
    return x


def luma(x: Tensor) -> Tensor:
    """BT.601 luma of RGB ``x`` [N, 3, H, W], in ``x``'s own range: [N, 1, H, W]."""
    weights = x.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    return (x * weights).sum(dim=1, keepdim=True)
