"""The total variation regulariser."""

from __future__ import annotations

from torch import Tensor, nn

from fastperc import ops


class TVLoss(nn.Module):
    """``weight`` · total variation of a batch of images [N, C, H, W]; a scalar, float32 or wider.

    Equivalent to ``weight * (x.diff(dim=2).square().sum() + x.diff(dim=3).square().sum())``, with loss and gradient in
    one pass over the image.

    Args:
        weight: multiplies the loss.
        norm: ``"l2"`` is Σ(dx² + dy²), ``"l1"`` is Σ(|dx| + |dy|).
        reduction: ``"sum"``, or ``"mean"``, which divides by the number of elements of the input.

    Raises:
        ValueError: on forward, another shape, norm or reduction; see :func:`fastperc.ops.tv_loss`.
    """

    def __init__(self, weight: float = 1.0, norm: str = "l2", reduction: str = "sum") -> None:
        super().__init__()
        self.weight, self.norm, self.reduction = weight, norm, reduction

    def forward(self, x: Tensor) -> Tensor:
        loss = ops.tv_loss(x, self.norm, self.reduction)
        return loss if self.weight == 1 else self.weight * loss

    def extra_repr(self) -> str:
        return f"weight={self.weight}, norm={self.norm!r}, reduction={self.reduction!r}"
