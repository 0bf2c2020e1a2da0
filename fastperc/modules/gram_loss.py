"""The style reconstruction loss."""

from __future__ import annotations

from torch import Tensor, nn

from fastperc import ops


class GramLoss(nn.Module):
    """``weight`` · ‖G(x) − G(target)‖²_F, averaged over the batch (paper, equation 4).

    ``x`` is a feature map [N, C, H, W]. ``target`` is a feature map [N or 1, C, H', W'] of any size, or its Gram
    matrix [N or 1, C, C]. Half-precision features are accumulated in float32. Returns a scalar, float32 or wider.

    Raises:
        ValueError: on forward, when the shapes do not fit.
    """

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        gram = ops.gram_matrix(target) if target.dim() == 4 else target
        return self.weight * ops.gram_loss((x,), (gram,))[0]

    def extra_repr(self) -> str:
        return f"weight={self.weight}"
