"""The Triton kernels, one file an operation; installed as ``fastperc.kernels``.

A module of kernels is imported when it is first used: importing this package does not import Triton.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastperc.kernels import (
        chain_passes,
        configs,
        conv_bn_relu,
        deferred,
        fold_gradient,
        gram_loss,
        instance_norm,
        loss_terms,
        lpips_distance,
        norm_coefficients,
        pack_weights,
        relu_masks,
        residual_inputs,
        rgb_conv_head,
        rgb_conv_stem,
        rgb_weight_gradient,
        subpixel_conv_bn_relu,
        sum_parts,
        tv_loss,
        vgg_loss,
        weight_gradient,
    )

__all__ = [
    "chain_passes",
    "configs",
    "conv_bn_relu",
    "deferred",
    "fold_gradient",
    "gram_loss",
    "instance_norm",
    "loss_terms",
    "lpips_distance",
    "norm_coefficients",
    "pack_weights",
    "relu_masks",
    "residual_inputs",
    "rgb_conv_head",
    "rgb_conv_stem",
    "rgb_weight_gradient",
    "subpixel_conv_bn_relu",
    "sum_parts",
    "tv_loss",
    "vgg_loss",
    "weight_gradient",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(f"{__name__}.{name}")
