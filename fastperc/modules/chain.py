"""Layers in a row: as a chain of kernels, or recorded by PyTorch for any size and batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastperc import ops


def exporting() -> bool:
    """Whether torch.export, torch.onnx or torch.jit.trace records the operations, to repeat them at other sizes.

    What is recorded must not depend on the sizes of the example, neither by a branch nor by a number.
    """
    return torch.jit.is_tracing() or torch.compiler.is_exporting()


def chain(x: Tensor, layers: Sequence[ops.Layer]) -> Tensor:
    """``layers`` one after the other; see :func:`fastperc.ops.conv_chain`."""
    if exporting():  # ops.norm_relu asks whether an instance norm has a single image, which would fix the batch
        layers = [layer._replace(norm=layer.norm and layer.norm.__call__) for layer in layers]
    return ops.conv_chain(x, layers)
