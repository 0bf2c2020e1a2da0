"""The forms of a chain's weights that its kernels load: forward, and for the gradient of the input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastperc import kernels
from fastperc.ops.common import channels_last
from fastperc.ops.subpixel_conv_bn_relu import as_transposed

if TYPE_CHECKING:
    from fastperc.kernels.pack_weights import Pack


class Weight(NamedTuple):
    """A convolution's weight in the dtype of the computation, as its kernels load it: see :class:`Forms`."""

    forward: Tensor
    backward: Tensor  # for the gradient of the input


class Forms(NamedTuple):
    """What the kernels load in place of a convolution's weight; ``None``: the weight itself, channels-last."""

    forward: Pack | None = None
    backward: Pack | None = None


def _turned(weight: Tensor) -> Tensor:
    """``weight`` rotated by 180°, in and out exchanged, as the gradient to the input needs it."""
    return weight.flip(2, 3).transpose(0, 1)


def stem_form(weight: Tensor) -> Tensor:
    """The form of ``kernels/rgb_conv_stem.py``."""
    return kernels.rgb_conv_stem.pack(weight)


def turned_stem_form(weight: Tensor) -> Tensor:
    """The same of the turned weight."""
    return kernels.rgb_conv_stem.pack(_turned(weight))


def head_form(weight: Tensor) -> Tensor:
    """The form of ``kernels/rgb_conv_head.py``."""
    return kernels.rgb_conv_head.pack(weight)


def turned_head_form(weight: Tensor) -> Tensor:
    """The same of the turned weight."""
    return kernels.rgb_conv_head.pack(_turned(weight))


def transposed_form(weight: Tensor) -> Tensor:
    """The form of ``kernels/subpixel_conv_bn_relu.py``, of a ½-stride convolution."""
    return kernels.subpixel_conv_bn_relu.pack(weight, "transposed")


def nearest_form(weight: Tensor) -> Tensor:
    """The same, of nearest-neighbour upsampling and a convolution."""
    return kernels.subpixel_conv_bn_relu.pack(weight, "nearest")


def as_transposed_form(weight: Tensor) -> Tensor:
    """The ½-stride convolution that equals nearest-neighbour upsampling and ``weight``."""
    return channels_last(as_transposed(weight))


def in_forms(forms: Sequence[Forms], weights: Sequence[Any], dtype: torch.dtype) -> list[Weight]:
    """The ``weights`` of a chain's convolutions in ``forms`` and ``dtype``, in one launch."""
    masters = [weight.detach() for weight in weights]
    packs = [[pack for pack in of_layer if pack is not None] for of_layer in forms]
    special = [i for i, of_layer in enumerate(packs) if of_layer]
    plain = [i for i, of_layer in enumerate(forms) if None in of_layer]
    packed = kernels.pack_weights.pack_weights(
        [masters[i] for i in special], [packs[i] for i in special], dtype, [masters[i] for i in plain]
    )
    packed_forms = {i: iter(of_layer) for i, of_layer in zip(special, packed.forms)}
    copy_of = dict(zip(plain, packed.copies))
    return [
        Weight(*(copy_of[i] if pack is None else next(packed_forms[i]) for pack in of_layer))
        for i, of_layer in enumerate(forms)
    ]
