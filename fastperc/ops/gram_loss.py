"""The style loss: Gram matrices of several feature maps at once, their distances to targets, and the gradients.

``"triton"`` is the fused kernel; ``"native"`` leaves the products to the BLAS library: one forward and one backward,
where autograd makes three.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastperc import backends, reference

PIXELS_AT_ONCE = 8192  # of the products left to the BLAS library


def gram_loss(features: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """‖G(x) − target‖²_F averaged over the batch (paper, equation 4), for each layer of ``features``.

    Args:
        features: [N, C, H, W] a layer, of one dtype, any memory format; C, H and W may differ from layer to layer.
        targets: Gram matrices [N or 1, C, C], one a layer.

    Returns:
        [layers]: float64 for float64, else float32 whatever autocast says. Sums are kept in float32 or wider.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    features, targets = tuple(features), tuple(targets)
    check(features, targets)
    first = features[0]
    wide = torch.promote_types(first.dtype, torch.float32)
    with torch.autocast(first.device.type, enabled=False):
        targets = tuple(target.to(first.device, wide) for target in targets)
        obstacle = unsupported(features, targets)
        triton = obstacle or triton_unsupported(first)
        backend = backends.choose("gram_loss", *features, triton=triton, native=obstacle)
        if backend == "reference":
            return torch.stack([reference.gram_loss(x, target) for x, target in zip(features, targets)])
        return _GramLoss.apply(backend, *features, *targets)


def check(features: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    """Raises a ``ValueError`` unless there is a Gram matrix for each layer, and the layers are of a kind."""
    if not features or len(features) != len(targets):
        raise ValueError(f"gram_loss needs a target for each layer, got {len(features)} and {len(targets)}")
    first = features[0]
    for x, target in zip(features, targets):
        if x.dim() != 4 or 0 in x.shape[1:] or target.dim() != 3 or target.shape[1:] != (x.shape[1], x.shape[1]):
            fits = False
        else:
            fits = target.shape[0] in (1, x.shape[0])
        if not fits:
            raise ValueError(
                f"gram_loss needs features [N, C, H, W] and a Gram matrix [N or 1, C, C], "
                f"got {list(x.shape)} and {list(target.shape)}"
            )
        if (x.dtype, x.device, x.shape[0]) != (first.dtype, first.device, first.shape[0]):
            raise ValueError(
                f"gram_loss needs layers of one dtype, device and batch, got {x.dtype} {list(x.shape)} on {x.device} "
                f"beside {first.dtype} {list(first.shape)} on {first.device}"
            )


def unsupported(features: Sequence[Tensor], targets: Sequence[Tensor]) -> str | None:
    """Why only plain PyTorch can take these, or ``None``."""
    if features[0].shape[0] == 0:
        return "the batch is empty"
    if any(target.requires_grad for target in targets):
        return "the target wants a gradient"
    return None


def triton_unsupported(x: Tensor) -> str | None:
    """Why the Triton kernel cannot take features like ``x``, or ``None`` if it can."""
    if x.dtype not in (torch.float16, torch.bfloat16):
        return f"products in {str(x.dtype).removeprefix('torch.')} are left to the BLAS library"
    return backends.triton_unsupported(x)


@torch.library.custom_op("fastperc::gram_loss_fwd", mutates_args=())
def gram_loss_fwd(features: list[Tensor], targets: list[Tensor], backend: str) -> list[Tensor]:
    """The losses [layers], and for the backward the scales [layers] and Δ = G − target of each layer.

    Δ is [N, C, C] for ``"native"``; for ``"triton"`` [N, 2, C, C] in the features' dtype: the sum of the two, times the
    layer's scale.
    """
    losses, scales, *deltas = _outputs(features, targets, backend)
    if backend == "triton":
        from fastperc.kernels import gram_loss as kernels

        with backends.on_device(losses):
            kernels.gram_loss_fwd(features, [target.contiguous() for target in targets], losses, scales, deltas)
        return [losses, scales, *deltas]
    scales.fill_(1)
    for layer, (x, target, delta) in enumerate(zip(features, targets, deltas)):
        for psi, first in _wide_blocks(x):
            delta.baddbmm_(psi, psi.mT, beta=0 if first else 1)
        delta.div_(x[0].numel()).sub_(target)
        losses[layer] = delta.square().sum(dim=(1, 2)).mean()
        delta.copy_((delta + delta.mT) / 2)  # a target need not be symmetric
    return [losses, scales, *deltas]


@gram_loss_fwd.register_fake
def _outputs(features: list[Tensor], targets: list[Tensor], backend: str) -> list[Tensor]:
    losses = features[0].new_empty(len(features), dtype=torch.promote_types(features[0].dtype, torch.float32))
    sizes = [x.shape[:2] for x in features]
    if backend == "triton":
        return [losses, torch.empty_like(losses), *(x.new_empty(n, 2, c, c) for x, (n, c) in zip(features, sizes))]
    return [losses, torch.empty_like(losses), *(losses.new_empty(n, c, c) for n, c in sizes)]


@torch.library.custom_op("fastperc::gram_loss_bwd", mutates_args=())
def gram_loss_bwd(
    features: list[Tensor], scales: Tensor, deltas: list[Tensor], grad_losses: Tensor, backend: str
) -> list[Tensor]:
    """The gradients of the features: 4 / NCHW · Δ ψ, each times its layer's incoming gradient."""
    grads = _gradients(features, scales, deltas, grad_losses, backend)
    if backend == "triton":
        from fastperc.kernels import gram_loss as kernels

        with backends.on_device(scales):
            kernels.gram_loss_bwd(features, scales, deltas, grad_losses.contiguous(), grads)
        return grads
    for x, delta, grad, grad_loss in zip(features, deltas, grads, grad_losses):
        slopes = delta * (grad_loss * (4 / x.numel()))
        if grad.dtype == slopes.dtype:
            torch.bmm(slopes, x.flatten(2), out=grad.flatten(2))
            continue
        for (psi, _), out in zip(_wide_blocks(x), grad.flatten(2).split(PIXELS_AT_ONCE, dim=2)):
            out.copy_(torch.bmm(slopes, psi))
    return grads


@gram_loss_bwd.register_fake
def _gradients(
    features: list[Tensor], scales: Tensor, deltas: list[Tensor], grad_losses: Tensor, backend: str
) -> list[Tensor]:
    return [torch.empty_like(x, memory_format=dense_format(x)) for x in features]


def dense_format(x: Tensor) -> torch.memory_format:
    """The memory format of ``x`` [N, C, H, W] or, if it is a slice, of what it was cut from."""
    channels_last = x.stride(1) == 1 and x.shape[1] > 1
    return torch.channels_last if channels_last else torch.contiguous_format


def _wide_blocks(x: Tensor) -> Iterator[tuple[Tensor, bool]]:
    """ψ [N, C, pixels] in float32 or wider, some pixels at a time, and whether they are the first.

    Summing up in two steps keeps the error small; half precision needs memory for one block, not for all.
    """
    for i, psi in enumerate(x.flatten(2).split(PIXELS_AT_ONCE, dim=2)):
        yield reference.widen(psi), i == 0


class _GramLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: str, *features_and_targets: Tensor) -> Tensor:
        layers = len(features_and_targets) // 2
        features, targets = list(features_and_targets[:layers]), list(features_and_targets[layers:])
        losses, scales, *deltas = torch.ops.fastperc.gram_loss_fwd(features, targets, backend)
        ctx.save_for_backward(*features_and_targets, scales, *deltas)
        ctx.backend, ctx.layers = backend, layers
        return losses

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
        saved, layers = ctx.saved_tensors, ctx.layers
        features, targets, scales, deltas = (
            list(saved[:layers]),
            saved[layers : 2 * layers],
            saved[2 * layers],
            list(saved[2 * layers + 1 :]),
        )
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # to be differentiated again
            losses = torch.stack([reference.gram_loss(x, target) for x, target in zip(features, targets)])
            grads = torch.autograd.grad(losses, features, grad_losses, create_graph=True)
        else:
            grads = torch.ops.fastperc.gram_loss_bwd(features, scales, deltas, grad_losses, ctx.backend)
        return None, *grads, *(None for _ in targets)
