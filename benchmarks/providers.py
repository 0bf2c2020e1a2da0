"""Who computes an operation in a benchmark; declared once for all of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

PROVIDERS = ("reference", "compile", "fused")


def provide(name: str, reference: Callable[..., Tensor], fused: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function that provider ``name`` times: plain PyTorch, the same through ``torch.compile``, or fastperc's."""
    if name == "compile":
        torch.compiler.reset()
        return torch.compile(reference)
    return {"reference": reference, "fused": fused}[name]
