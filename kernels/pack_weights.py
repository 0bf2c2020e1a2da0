"""The weights of a chain's convolutions in the forms that its kernels load: all of a step in one launch.

A number of a form is a weight, the sum of some, or zero. Which ones is found once for each network, by packing the
numbers of the weights instead of the weights; a step then gathers. Sums are taken in float32 and rounded once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

Pack = Callable[[Tensor], Tensor]
"""A convolution's weight → its form, dense and linear in the weight; always the same object for the same form."""

BLOCK = 1024  # numbers per program
OPTIONS = dict(num_warps=4, num_stages=1)
ALIGNMENT = 64  # numbers: each form begins at a multiple of it


@triton.jit(do_not_specialize=["count"])
def pack_weights_kernel(
    weights_ptr,  # [weights] fp16|bf16|fp32
    index_ptr,  # [TERMS, count] int32: which weights, counted from 1, are added; 0 for none
    packed_ptr,  # [count] fp16|bf16|fp32
    count,
    TERMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < count
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for term in tl.static_range(TERMS):
        index = tl.load(index_ptr + term * count + offs, mask=mask, other=0)
        total += tl.load(weights_ptr + (index - 1), mask=index > 0, other=0.0).to(tl.float32)
    tl.store(packed_ptr + offs, total.to(packed_ptr.dtype.element_ty), mask=mask)


def pack_weights(weights: Sequence[Tensor], packs: Sequence[Sequence[Pack]], dtype: torch.dtype) -> list[list[Tensor]]:
    """The forms of each of ``weights``, convolutions' [O, I, k, k] or the like, by the functions that ``packs`` has for
    it, in ``dtype``."""
    if not weights:
        return []
    innermost = tuple(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    rows = [weight.permute(0, 2, 3, 1) if is_nhwc else weight for weight, is_nhwc in zip(weights, innermost)]
    flat = torch.cat([row.reshape(-1) for row in rows])
    device = weights[0].device
    index, layouts = _index(tuple(weight.shape for weight in weights), innermost, tuple(map(tuple, packs)), device)
    terms, count = index.shape
    packed = torch.empty(count, dtype=dtype, device=device)
    pack_weights_kernel[(triton.cdiv(count, BLOCK),)](flat, index, packed, count, TERMS=terms, BLOCK=BLOCK, **OPTIONS)
    return [[packed.as_strided(*layout) for layout in of_weight] for of_weight in layouts]


@lru_cache(maxsize=64)
def _index(
    shapes: tuple[torch.Size, ...],
    innermost: tuple[bool, ...],
    packs: tuple[tuple[Pack, ...], ...],
    device: torch.device,
) -> tuple[Tensor, list[list[tuple[torch.Size, tuple[int, ...], int]]]]:
    """What the kernel adds up, and size, strides and offset of each form in its result."""
    columns: list[Tensor] = []
    layouts: list[list[tuple[torch.Size, tuple[int, ...], int]]] = []
    first = end = 0
    for shape, is_nhwc, of_weight in zip(shapes, innermost, packs):
        numbers = torch.arange(first + 1, first + 1 + shape.numel(), dtype=torch.float64, device="cpu")
        first += shape.numel()
        o, i, height, width = shape
        numbers = numbers.view(o, height, width, i).permute(0, 3, 1, 2) if is_nhwc else numbers.view(shape)
        layouts.append([])
        for pack in of_weight:
            form = pack(numbers)
            terms = _terms(numbers, pack)
            padding = -end % ALIGNMENT
            columns += [terms.new_zeros(1, padding), terms]
            layouts[-1].append((form.shape, form.stride(), end + padding))
            end += padding + form.numel()
    rows = max(len(column) for column in columns)
    index = torch.cat([torch.nn.functional.pad(column, (0, 0, 0, rows - len(column))) for column in columns], dim=1)
    return index.to(device, torch.int32), layouts


def _terms(numbers: Tensor, pack: Pack) -> Tensor:
    """[terms, numbers of the form]: the ``numbers`` of the weights that each sums, in memory's order; 0 for none."""
    planes = []
    for row, column in itertools.product(*map(range, numbers.shape[2:])):  # of one tap a sum has one weight at most
        tap = torch.zeros_like(numbers)
        tap[:, :, row, column] = numbers[:, :, row, column]
        form = pack(tap)
        planes.append(form.as_strided((form.numel(),), (1,)))
    terms = torch.stack(planes).sort(0, descending=True).values
    return terms[: max(int((terms > 0).sum(0).max()), 1)]
