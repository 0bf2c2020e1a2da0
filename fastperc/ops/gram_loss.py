"""The style loss: Gram matrices of several feature maps at once, their distances to targets, and the gradients.

``"triton"`` is the fused kernel. ``"native"`` leaves the products to the BLAS library: one in the forward, one in the
backward; autograd would make three.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastperc import backends, kernels, reference
from fastperc.backends import Implementation, Operation, TuningCases, register
from fastperc.ops.common import COMMON_SOURCES, siblings

PIXELS_AT_ONCE = 8192  # in a product of the BLAS library


def gram_loss(features: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """‖G(x) − target‖²_F averaged over the batch (paper, equation 4), for each layer of ``features``.

    Args:
        features: [N, C, H, W] a layer, of one dtype, any memory format; C, H and W may differ from layer to layer.
        targets: Gram matrices [N or 1, C, C], one a layer.

    Returns:
        [layers]: float64 for float64, else float32, also under autocast. Sums are kept in float32 or wider.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    features, targets = tuple(features), tuple(targets)
    check(features, targets)
    first = features[0]
    wide = torch.promote_types(first.dtype, torch.float32)
    with torch.autocast(first.device.type, enabled=False):
        targets = tuple(target.to(first.device, wide) for target in targets)
        return GRAM_LOSS(features, targets)


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


class Kernels(NamedTuple):
    """The two passes of an implementation; each fills the tensors at the end of its list."""

    forward: Callable[[list[Tensor], list[Tensor], Tensor, Tensor, list[Tensor]], None]
    """features, targets → losses [layers], scales [layers], Δ = G − target of each layer."""
    backward: Callable[[list[Tensor], Tensor, list[Tensor], Tensor, list[Tensor]], None]
    """features, scales, Δ, incoming gradients [layers] → gradients of the features."""
    delta: Callable[[Tensor, Tensor], Tensor]
    """features, losses → memory for Δ."""


def _triton_forward(
    features: list[Tensor], targets: list[Tensor], losses: Tensor, scales: Tensor, deltas: list[Tensor]
) -> None:
    with backends.on_device(losses):
        kernels.gram_loss.gram_loss_fwd(features, [target.contiguous() for target in targets], losses, scales, deltas)


def _triton_backward(
    features: list[Tensor], scales: Tensor, deltas: list[Tensor], grad_losses: Tensor, grads: list[Tensor]
) -> None:
    with backends.on_device(scales):
        kernels.gram_loss.gram_loss_bwd(features, scales, deltas, grad_losses.contiguous(), grads)


def _triton_delta(x: Tensor, losses: Tensor) -> Tensor:
    """[N, 2, C, C] in the dtype of ``x``: the sum of the two is Δ times the layer's scale."""
    n, c = x.shape[:2]
    return x.new_empty(n, 2, c, c)


def _blas_forward(
    features: list[Tensor], targets: list[Tensor], losses: Tensor, scales: Tensor, deltas: list[Tensor]
) -> None:
    scales.fill_(1)
    for layer, (x, target, delta) in enumerate(zip(features, targets, deltas)):
        for psi, first in wide_blocks(x):
            delta.baddbmm_(psi, psi.mT, beta=0 if first else 1)
        delta.div_(x[0].numel()).sub_(target)
        losses[layer] = delta.square().sum(dim=(1, 2)).mean()
        delta.copy_((delta + delta.mT) / 2)  # a target need not be symmetric


def _blas_backward(
    features: list[Tensor], scales: Tensor, deltas: list[Tensor], grad_losses: Tensor, grads: list[Tensor]
) -> None:
    for x, delta, grad, grad_loss in zip(features, deltas, grads, grad_losses):
        slopes = delta * (grad_loss * (4 / x.numel()))
        if grad.dtype == slopes.dtype:
            torch.bmm(slopes, x.flatten(2), out=grad.flatten(2))
            continue
        for (psi, _), out in zip(wide_blocks(x), grad.flatten(2).split(PIXELS_AT_ONCE, dim=2)):
            out.copy_(torch.bmm(slopes, psi))


def _blas_delta(x: Tensor, losses: Tensor) -> Tensor:
    """[N, C, C] in the dtype of the losses."""
    n, c = x.shape[:2]
    return losses.new_empty(n, c, c)


KERNELS = {
    "triton": Kernels(_triton_forward, _triton_backward, _triton_delta),
    "native": Kernels(_blas_forward, _blas_backward, _blas_delta),
}


@torch.library.custom_op("fastperc::gram_loss_fwd", mutates_args=())
def gram_loss_fwd(features: list[Tensor], targets: list[Tensor], backend: str) -> list[Tensor]:
    """The losses [layers], and for the backward the scales [layers] and Δ = G − target of each layer, in the form of
    ``KERNELS[backend]``."""
    losses, scales, *deltas = _outputs(features, targets, backend)
    KERNELS[backend].forward(features, targets, losses, scales, deltas)
    return [losses, scales, *deltas]


@gram_loss_fwd.register_fake
def _outputs(features: list[Tensor], targets: list[Tensor], backend: str) -> list[Tensor]:
    losses = features[0].new_empty(len(features), dtype=torch.promote_types(features[0].dtype, torch.float32))
    return [losses, torch.empty_like(losses), *(KERNELS[backend].delta(x, losses) for x in features)]


@torch.library.custom_op("fastperc::gram_loss_bwd", mutates_args=())
def gram_loss_bwd(
    features: list[Tensor], scales: Tensor, deltas: list[Tensor], grad_losses: Tensor, backend: str
) -> list[Tensor]:
    """The gradients of the features: 4 / NCHW · Δ ψ, each times its layer's incoming gradient."""
    grads = _gradients(features, scales, deltas, grad_losses, backend)
    KERNELS[backend].backward(features, scales, deltas, grad_losses, grads)
    return grads


@gram_loss_bwd.register_fake
def _gradients(
    features: list[Tensor], scales: Tensor, deltas: list[Tensor], grad_losses: Tensor, backend: str
) -> list[Tensor]:
    return [torch.empty_like(x, memory_format=dense_format(x)) for x in features]


def dense_format(x: Tensor) -> torch.memory_format:
    """The memory format of ``x`` [N, C, H, W], or of the tensor that it is a slice of."""
    channels_last = x.stride(1) == 1 and x.shape[1] > 1
    return torch.channels_last if channels_last else torch.contiguous_format


def wide_blocks(x: Tensor) -> Iterator[tuple[Tensor, bool]]:
    """ψ [N, C, PIXELS_AT_ONCE or fewer] in float32 or wider, block by block, and whether a block is the first.

    Summing in two steps keeps the error small, and half precision needs float32 memory for one block only.
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
            features = siblings(features)
            losses = torch.stack([reference.gram_loss(x, target) for x, target in zip(features, targets)])
            grads = torch.autograd.grad(losses, features, grad_losses, create_graph=True)
        else:
            grads = torch.ops.fastperc.gram_loss_bwd(features, scales, deltas, grad_losses, ctx.backend)
        return None, *grads, *(None for _ in targets)


def _why_not_native(features: Sequence[Tensor], targets: Sequence[Tensor]) -> str | None:
    if features[0].shape[0] == 0:
        return "the batch is empty"
    if any(target.requires_grad for target in targets):
        return "the target wants a gradient"
    return None


def _why_not_triton(features: Sequence[Tensor], targets: Sequence[Tensor]) -> str | None:
    dtype = features[0].dtype
    if reason := _why_not_native(features, targets):
        return reason
    if dtype not in (torch.float16, torch.bfloat16):
        return f"products in {str(dtype).removeprefix('torch.')} are left to the BLAS library"
    return backends.why_not_triton(features[0])


def _triton(features: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    return _GramLoss.apply("triton", *features, *targets)


def _native(features: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    return _GramLoss.apply("native", *features, *targets)


def _plain(features: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    return torch.stack([reference.gram_loss(x, target) for x, target in zip(features, targets)])


def _tuned_shapes(batch: int, size: int) -> list[tuple[tuple[int, ...], ...]]:
    """VGG-16's relu1_2, relu2_2, relu3_3 and relu4_3, in one call."""
    return [tuple((batch, channels, size >> i, size >> i) for i, channels in enumerate((64, 128, 256, 512)))]


def _tuned_call(*features: Tensor) -> tuple[Any, ...]:
    return features, [x.new_zeros(1, x.shape[1], x.shape[1], dtype=torch.float32) for x in features]


GRAM_LOSS = register(
    Operation(
        "gram_loss",
        "Gram loss",
        (
            Implementation("triton", _triton, _why_not_triton),
            Implementation("native", _native, _why_not_native),
            Implementation("reference", _plain),
        ),
        TuningCases(_tuned_shapes, _tuned_call),
        (*COMMON_SOURCES, "kernels/gram_loss*", "fastperc/ops/gram_loss.py"),
        lambda features, targets: features,
    )
)
