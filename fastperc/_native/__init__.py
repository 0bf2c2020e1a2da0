"""The only caller of the compiled module: says what it supports, and passes it pointers, stream and device.

Where a function fills a tensor, the caller has allocated it. "Channels-last" means dense in that memory format.
"""

from fastperc._native.convolutions import (
    WINOGRAD_PANEL,
    rgb_conv_head,
    rgb_conv_head_winograd,
    rgb_conv_stem_winograd,
    winograd_conv,
    winograd_lanes,
    winograd_weight_gradient,
    winograd_weights,
)
from fastperc._native.module import (
    _C,
    DTYPES,
    PASS_ACTIVATIONS,
    build_info,
    is_channels_last,
    pixel_step,
    reuse_freed_memory,
    why_not,
)
from fastperc._native.passes import (
    RowLayout,
    Sides,
    channel_mean_m2,
    image_io,
    lpips_distance,
    norm_gradient,
    norm_gradient_sums,
    relu_mask_bwd,
    relu_mask_fwd,
    relu_pool_bwd,
    relu_pool_fwd,
    row_layout,
    scale_shift,
    tv_loss_fwd,
)

__all__ = [
    "DTYPES",
    "PASS_ACTIVATIONS",
    "WINOGRAD_PANEL",
    "_C",
    "RowLayout",
    "Sides",
    "build_info",
    "channel_mean_m2",
    "image_io",
    "is_channels_last",
    "lpips_distance",
    "norm_gradient",
    "norm_gradient_sums",
    "pixel_step",
    "relu_mask_bwd",
    "relu_mask_fwd",
    "relu_pool_bwd",
    "relu_pool_fwd",
    "reuse_freed_memory",
    "rgb_conv_head",
    "rgb_conv_head_winograd",
    "rgb_conv_stem_winograd",
    "row_layout",
    "scale_shift",
    "tv_loss_fwd",
    "why_not",
    "winograd_conv",
    "winograd_lanes",
    "winograd_weight_gradient",
    "winograd_weights",
]
