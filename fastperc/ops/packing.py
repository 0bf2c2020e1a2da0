"""What is made of a weight once, before a kernel can use it, and kept for as long as the weight lives."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

T = TypeVar("T")

_packed = WeakIdKeyDictionary()  # weight → {key: (the state it was made from, what was made)}


def packed(key: Hashable, make: Callable[[], T], weight: Tensor, *others: Tensor) -> T:
    """What ``make`` makes of ``weight`` and ``others``: made once for a ``key``, and again when they have changed."""
    state = tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in (weight, *others))
    made = _packed.setdefault(weight, {})
    if made.get(key, (None,))[0] != state:
        made[key] = state, make()
    return made[key][1]
