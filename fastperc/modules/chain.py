"""Layers in a row: as a chain of kernels, or recorded by PyTorch for any size and batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fastperc import ops


def exporting() -> bool:
    """Whether torch.export, torch.onnx or torch.jit.trace records the operations, to repeat them at other sizes.

    What is recorded must not depend on the sizes of the example, neither by a branch nor by a number.
    """
    return torch.jit.is_tracing() or torch.compiler.is_exporting()


def chain(x: Tensor, layers: Sequence[ops.Layer]) -> Tensor:
    """``layers`` one after the other; see :func:`fastperc.ops.conv_chain`."""
    if exporting():
        layers = [layer._replace(norm=layer.norm and _recordable(layer.norm)) for layer in layers]
    return ops.conv_chain(x, layers)


def _recordable(norm: nn.Module) -> Callable[[Tensor], Tensor]:
    """``norm`` as a function, in its own dtype.

    ops.norm_relu would ask whether an instance norm has a single image, which fixes the batch. ONNX has no norms of
    half precision by float32.
    """
    weight = getattr(norm, "weight", None)

    def normalise(x: Tensor) -> Tensor:
        return norm(x if weight is None else x.to(weight.dtype)).to(x.dtype)

    return normalise
