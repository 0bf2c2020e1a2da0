"""Total variation: one pass over the image gives the loss and its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastperc import _native, backends, reference

NORMS = ("l2", "l1")
REDUCTIONS = ("sum", "mean")


def tv_loss(x: Tensor, norm: str = "l2", reduction: str = "sum") -> Tensor:
    """Total variation of a batch of images, the paper's regulariser (section 3.2).

    Args:
        x: [N, C, H, W], any memory format; float32, float64, float16 or bfloat16.
        norm: ``"l2"`` is Σ(dx² + dy²), ``"l1"`` is Σ(|dx| + |dy|), over neighbouring pixels of each channel.
        reduction: ``"sum"``, or ``"mean"``, which divides by the number of elements of ``x``.

    Returns:
        A scalar: float64 for float64, else float32 whatever autocast says. The derivative of |d| at 0 is 0.

    Raises:
        ValueError: another shape, norm or reduction.
    """
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"tv_loss needs a floating-point tensor [N, C, H, W], got {x.dtype} {list(x.shape)}")
    if norm not in NORMS:
        raise ValueError(f"norm must be 'l2' or 'l1', got {norm!r}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be 'sum' or 'mean', got {reduction!r}")
    if backends.choose("tv_loss", native=_native.unsupported(x)) == "reference":
        return reference.tv_loss(x, norm, reduction)
    loss, _ = torch.ops.fastperc.tv_loss_fwd(x, norm, torch.is_grad_enabled() and x.requires_grad)
    return loss / x.numel() if reduction == "mean" else loss


@torch.library.custom_op("fastperc::tv_loss_fwd", mutates_args=())
def tv_loss_fwd(x: Tensor, norm: str, with_grad: bool) -> tuple[Tensor, Tensor]:
    """Σ over ``x`` [N, C, H, W], and its derivative in ``x``'s dtype and layout (empty unless ``with_grad``).

    The derivative is that of the plain sum, of the order of the pixels, so that it survives half precision; weights
    and 1/numel come in with the incoming gradient, in float32.
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


def _setup_context(ctx: Any, inputs: tuple[Tensor, str, bool], output: tuple[Tensor, Tensor]) -> None:
    _, ctx.norm, _ = inputs
    ctx.save_for_backward(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_loss: Tensor | None, grad_grad: Tensor | None) -> tuple[Tensor | None, None, None]:
    (grad,) = ctx.saved_tensors
    result = None if grad_loss is None else (reference.widen(grad) * grad_loss).to(grad.dtype)
    if grad_grad is not None and ctx.norm == "l2":  # differentiated twice: the derivative of l2 is linear and symmetric
        _, second = torch.ops.fastperc.tv_loss_fwd(grad_grad, "l2", True)
        result = second if result is None else result + second
    return result, None, None


tv_loss_fwd.register_autograd(_backward, setup_context=_setup_context)
