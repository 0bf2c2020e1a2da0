"""Total variation: one pass over the image gives the loss and its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastperc import _native, backends, kernels, reference
from fastperc.backends import Implementation, Operation, TuningCases, register
from fastperc.ops.common import COMMON_CPP_SOURCES, COMMON_CUDA_SOURCES

NORMS = ("l2", "l1")
REDUCTIONS = ("sum", "mean")


def tv_loss(x: Tensor, norm: str = "l2", reduction: str = "sum") -> Tensor:
    """Total variation of a batch of images, the paper's regulariser (section 3.2).

    Args:
        x: [N, C, H, W], any memory format; float32, float64, float16 or bfloat16.
        norm: ``"l2"`` is Σ(dx² + dy²), ``"l1"`` is Σ(|dx| + |dy|), over neighbouring pixels of each channel.
        reduction: ``"sum"``, or ``"mean"``, which divides by the number of elements of ``x``.

    Returns:
        A scalar: float64 for float64, else float32, also under autocast. The derivative of |d| at 0 is 0.

    Raises:
        ValueError: another shape, norm or reduction.
    """
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"tv_loss needs a floating-point tensor [N, C, H, W], got {x.dtype} {list(x.shape)}")
    if norm not in NORMS:
        raise ValueError(f"norm must be 'l2' or 'l1', got {norm!r}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be 'sum' or 'mean', got {reduction!r}")
    return TV_LOSS(x, norm, reduction)


@torch.library.custom_op("fastperc::tv_loss_fwd", mutates_args=())
def tv_loss_fwd(x: Tensor, norm: str, with_grad: bool) -> tuple[Tensor, Tensor]:
    """The sum over ``x`` [N, C, H, W], and its derivative in ``x``'s dtype and layout (empty unless ``with_grad``).

    The derivative is that of the plain sum: it has the magnitude of the pixels, so half precision can hold it. Weights
    and 1/numel enter with the incoming gradient, in float32.
    """
    loss, grad = _outputs(x, norm, with_grad)
    _native.tv_loss_fwd(x, grad if with_grad else None, loss, norm)
    return loss, grad


@tv_loss_fwd.register_fake
def _outputs(x: Tensor, norm: str, with_grad: bool) -> tuple[Tensor, Tensor]:
    loss = x.new_empty((), dtype=torch.promote_types(x.dtype, torch.float32))
    if not with_grad:
        return loss, x.new_empty(0)
    layout = torch.channels_last if _native.is_channels_last(x) else torch.contiguous_format
    return loss, torch.empty_like(x, memory_format=layout)


class _TVLoss(torch.autograd.Function):
    """The forward computes the gradient too. The first backward scales it in place and returns it; a further backward,
    or a compiled one, computes it again from ``x``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: str) -> Tensor:
        with_grad = ctx.needs_input_grad[0] and not torch.compiler.is_compiling()
        loss, grad = torch.ops.fastperc.tv_loss_fwd(x, norm, with_grad)
        ctx.save_for_backward(x)
        ctx.norm = norm
        if with_grad:
            ctx.grad = grad
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        grad = None
        if not torch.compiler.is_compiling():
            if torch.is_grad_enabled():  # to be differentiated again
                loss = reference.tv_loss(x, ctx.norm)
                return torch.autograd.grad(loss, x, grad_loss, create_graph=True)[0], None
            grad, ctx.grad = ctx.grad, None
            if grad is not None and grad_loss.device.type == "cpu" and grad_loss.item() == 1:
                return grad, None  # on a GPU, .item() would wait
        if grad is None:
            _, grad = torch.ops.fastperc.tv_loss_fwd(x, ctx.norm, True)
        if grad.dtype == grad_loss.dtype:
            return grad.mul_(grad_loss), None
        return (reference.widen(grad) * grad_loss).to(grad.dtype), None


class _TritonTVLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.norm = norm
        with backends.on_device(x):
            return kernels.tv_loss.tv_loss_fwd(x, norm, _native.is_channels_last(x)).sum()

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again
            loss = reference.tv_loss(x, ctx.norm)
            return torch.autograd.grad(loss, x, grad_loss, create_graph=True)[0], None
        channels_last = _native.is_channels_last(x)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        grad = torch.empty_like(x, memory_format=layout)
        with backends.on_device(x):
            kernels.tv_loss.tv_loss_bwd(x, grad_loss, grad, ctx.norm, channels_last)
        return grad, None


def _why_not_triton(x: Tensor, norm: str, reduction: str) -> str | None:
    if torch.compiler.is_compiling():
        return "torch.compile fuses the formula itself"
    return backends.why_not_triton(x) or ("the tensor is empty" if x.numel() == 0 else None)


def _triton_tv_loss(x: Tensor, norm: str, reduction: str) -> Tensor:
    return _reduced(_TritonTVLoss.apply(x, norm), x, reduction)


def _reduced(loss: Tensor, x: Tensor, reduction: str) -> Tensor:
    return loss / x.numel() if reduction == "mean" else loss


def _why_not_native(x: Tensor, norm: str, reduction: str) -> str | None:
    return _native.why_not(x)


def _native_tv_loss(x: Tensor, norm: str, reduction: str) -> Tensor:
    return _reduced(_TVLoss.apply(x, norm), x, reduction)


TV_LOSS = register(
    Operation(
        "tv_loss",
        "Total variation",
        (
            Implementation("native", _native_tv_loss, _why_not_native),
            Implementation("triton", _triton_tv_loss, _why_not_triton),
            Implementation("reference", reference.tv_loss),
        ),
        TuningCases(lambda batch, size: [((batch, 3, size, size),)], lambda x: (x, "l2", "sum")),
        (*COMMON_CPP_SOURCES, *COMMON_CUDA_SOURCES, "csrc/tv_loss*", "kernels/tv_loss.py", "fastperc/ops/tv_loss.py"),
    )
)
