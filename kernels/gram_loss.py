"""The style loss of several feature maps at once: Gram matrices, their distances to targets, and the gradients.

Each launch serves all layers: a program finds its layer by its number, and each layer has its own block sizes. A Gram
matrix is split over ranges of pixels. ``gram_loss_forward`` and ``gram_loss_backward`` have the kernels.

Products accumulate in float32, and nothing is narrowed before it is scaled: no Gram matrix overflows. There are no
atomics: the result is the same bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import triton
from torch import Tensor

from fastperc.kernels.configs import register_options, shared_memory
from fastperc.kernels.gram_loss_backward import gram_loss_bwd_kernel
from fastperc.kernels.gram_loss_forward import gram_deltas_kernel, gram_finish_kernel, gram_partials_kernel

BLOCK_PIXELS_FWD = 64
BLOCK_PIXELS_BWD = 128
BLOCK_ROWS = 16  # rows of a Gram matrix per program of gram_deltas
PIXELS_PER_PROGRAM = 2048  # of gram_partials
BLOCK_FINISH = 512  # elements of a Gram matrix per program of gram_finish
MAX_BLOCK_CHANNELS = 128
OPTIONS = {
    "gram_partials_kernel": dict(num_warps=8, num_stages=4),
    "gram_partials_kernel of NCHW": dict(num_warps=8, num_stages=2),  # more stages spill on sm_80
    "gram_deltas_kernel": dict(num_warps=4, num_stages=1),
    "gram_finish_kernel": dict(num_warps=4, num_stages=1),
    "gram_loss_bwd_kernel": dict(num_warps=8, num_stages=2),
}


class FeatureMap(NamedTuple):
    """A feature map as the kernels see it."""

    x: Tensor  # [N, C, H, W]
    channels_last: bool
    stride_image: int
    stride: int  # between pixels if channels_last, else between channels

    @property
    def images(self) -> int:
        return self.x.shape[0]

    @property
    def channels(self) -> int:
        return self.x.shape[1]

    @property
    def pixels(self) -> int:
        return self.x.shape[2] * self.x.shape[3]

    @property
    def block(self) -> int:
        return min(max(triton.next_power_of_2(self.channels), 16), MAX_BLOCK_CHANNELS)

    @property
    def blocks(self) -> int:
        return triton.cdiv(self.channels, self.block)

    @property
    def pairs(self) -> int:
        return self.blocks * (self.blocks + 1) // 2

    @property
    def splits(self) -> int:
        return triton.cdiv(self.pixels, PIXELS_PER_PROGRAM)


def as_feature_map(x: Tensor) -> FeatureMap:
    """``x`` [N, C, H, W]; a copy if its pixels are not evenly spaced in memory."""
    height, width = x.shape[2:]
    if x.stride(1) == 1 and (x.stride(2) == width * x.stride(3) or height == 1):
        return FeatureMap(x, True, x.stride(0), x.stride(3))
    if x.stride(3) != 1 or (x.stride(2) != width and height > 1):
        x = x.contiguous()
    return FeatureMap(x, False, x.stride(0), x.stride(1))


def ends(programs: Sequence[int]) -> tuple[int, ...]:
    """For each layer the number of the first program of the next one."""
    return tuple(sum(programs[: i + 1]) for i in range(len(programs)))


def gram_loss_fwd(
    features: Sequence[Tensor], targets: Sequence[Tensor], losses: Tensor, scales: Tensor, halves: Sequence[Tensor]
) -> None:
    """Fills ``losses`` [layers] float32 and, for the backward, ``scales`` [layers] float32 and ``halves``.

    For each layer: ``features`` [N, C, H, W] float16 or bfloat16; ``targets`` [N or 1, C, C] float32, contiguous;
    ``halves`` [N, 2, C, C] in the dtype of the features.
    """
    layers = [as_feature_map(x) for x in features]
    shapes = [(layer.images, layer.pairs, layer.splits, layer.block, layer.block) for layer in layers]
    partials = [losses.new_empty(shape) for shape in shapes]
    partial_ends = ends([layer.images * layer.pairs * layer.splits for layer in layers])
    channels, block = tuple(layer.channels for layer in layers), tuple(layer.block for layer in layers)
    splits = tuple(layer.splits for layer in layers)
    nhwc = all(layer.channels_last for layer in layers)
    gram_partials_kernel[(partial_ends[-1],)](
        tuple(layer.x for layer in layers),
        tuple(partials),
        tuple(layer.pixels for layer in layers),
        splits,
        tuple(layer.stride_image for layer in layers),
        tuple(layer.stride for layer in layers),
        tuple(1 / (layer.channels * layer.pixels) for layer in layers),
        partial_ends,
        CHANNELS=channels,
        CHANNELS_LAST=tuple(layer.channels_last for layer in layers),
        BLOCK_C=block,
        BLOCK_P=BLOCK_PIXELS_FWD,
        PIXELS_PER_PROGRAM=PIXELS_PER_PROGRAM,
        **OPTIONS["gram_partials_kernel" if nhwc else "gram_partials_kernel of NCHW"],
        **register_options(shared_memory(losses.device)),
    )
    piece_ends = ends([layer.images * layer.pairs * (layer.block // BLOCK_ROWS) for layer in layers])
    pieces = losses.new_empty(2, piece_ends[-1])
    deltas = tuple(losses.new_empty(layer.images, layer.channels, layer.channels) for layer in layers)
    gram_deltas_kernel[(piece_ends[-1],)](
        tuple(partials),
        tuple(targets),
        deltas,
        pieces,
        splits,
        tuple(target.stride(0) if target.shape[0] > 1 else 0 for target in targets),
        piece_ends,
        CHANNELS=channels,
        BLOCK_C=block,
        BLOCK_R=BLOCK_ROWS,
        **OPTIONS["gram_deltas_kernel"],
    )
    finish_ends = ends([layer.images * triton.cdiv(layer.channels**2, BLOCK_FINISH) for layer in layers])
    gram_finish_kernel[(finish_ends[-1],)](
        pieces,
        deltas,
        tuple(halves),
        losses,
        scales,
        layers[0].images,
        piece_ends,
        finish_ends,
        CHANNELS=channels,
        BLOCK=BLOCK_FINISH,
        **OPTIONS["gram_finish_kernel"],
    )


def gram_loss_bwd(
    features: Sequence[Tensor], scales: Tensor, halves: Sequence[Tensor], grad_losses: Tensor, grads: Sequence[Tensor]
) -> None:
    """Fills ``grads``, each with the shape and dtype of its feature map, given ``grad_losses`` [layers] float32.

    ``scales`` and ``halves`` are what the forward filled.
    """
    layers, outs = [as_feature_map(x) for x in features], [as_feature_map(grad) for grad in grads]
    bwd_ends = ends([layer.images * layer.blocks * triton.cdiv(layer.pixels, BLOCK_PIXELS_BWD) for layer in layers])
    gram_loss_bwd_kernel[(bwd_ends[-1],)](
        tuple(layer.x for layer in layers),
        tuple(halves),
        tuple(out.x for out in outs),
        scales,
        grad_losses,
        tuple(layer.pixels for layer in layers),
        tuple(layer.stride_image for layer in layers),
        tuple(layer.stride for layer in layers),
        tuple(out.stride_image for out in outs),
        tuple(out.stride for out in outs),
        tuple(4 / layer.x.numel() for layer in layers),
        bwd_ends,
        CHANNELS=tuple(layer.channels for layer in layers),
        CHANNELS_LAST=tuple(layer.channels_last for layer in layers),
        GRAD_CHANNELS_LAST=tuple(out.channels_last for out in outs),
        BLOCK_C=tuple(layer.block for layer in layers),
        BLOCK_P=BLOCK_PIXELS_BWD,
        BLOCK_K=tuple(min(layer.block, 64) for layer in layers),
        **OPTIONS["gram_loss_bwd_kernel"],
        **register_options(shared_memory(scales.device)),
    )
