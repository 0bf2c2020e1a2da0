"""The paper's baseline (Gatys et al.; section 4.1): optimises the pixels of a picture under the training objective."""

from __future__ import annotations

import torch
from torch import Tensor

from fastperc.losses import PerceptualLoss
from fastperc.progress import Meter


def optimize(
    content: Tensor, loss: PerceptualLoss, iterations: int = 500, optimizer: str = "lbfgs", lr: float | None = None
) -> Tensor:
    """Minimises ``loss`` over the pixels of a picture. Starts from ``content`` and clamps to 0–1 after each iteration.

    Args:
        content: the photo, RGB in 0–1, float32 [1, 3, H, W].
        loss: the objective, which holds the style.
        iterations: number of steps; 500 in the paper.
        optimizer: ``"lbfgs"`` as in the paper, or ``"adam"``, which needs less memory.
        lr: step size. Default: 1 for L-BFGS, 0.02 for Adam.

    Returns:
        The picture, RGB in 0–1, float32 [1, 3, H, W].

    Raises:
        ValueError: unknown optimizer, or the photo is not in 0–1.
        FloatingPointError: the loss is no longer finite.
    """
    if (most := float(content.max())) > 2:  # somewhat above 1 is what a resize with overshoot gives
        raise ValueError(f"the photo must be RGB in 0–1, but it has values up to {most:.4g}; divide levels by 255")
    image = content.clone(
        memory_format=torch.contiguous_format
    ).requires_grad_()  # L-BFGS needs a view of it as a vector
    solver: torch.optim.Optimizer
    if optimizer == "lbfgs":
        solver = torch.optim.LBFGS([image], lr=1.0 if lr is None else lr, max_iter=1, history_size=20)
    elif optimizer == "adam":
        solver = torch.optim.Adam([image], lr=0.02 if lr is None else lr)
    else:
        raise ValueError(f"optimizer must be 'lbfgs' or 'adam', got {optimizer!r}")

    def closure() -> Tensor:
        solver.zero_grad()
        total = loss(image, content).total
        total.backward()
        return total.detach()

    with Meter("optimizing", iterations) as meter:
        for _ in range(iterations):
            value = float(solver.step(closure))
            if not torch.tensor(value).isfinite():
                raise FloatingPointError(f"the loss is {value}; try a lower --lr or --optimizer adam")
            with torch.no_grad():
                image.clamp_(0, 1)
            meter.advance(f"loss {value:.4g}")
    return image.detach()
