"""The weights of a chain's convolutions in the forms that its kernels load: all of a step in one launch.

A number of a form is a weight, the sum of some, or zero. Which ones is found once for each network, by packing the
numbers of the weights instead of the weights; a step then gathers. Sums are taken in float32 and rounded once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

Pack = Callable[[Tensor], Tensor]
"""A convolution's weight → its form, dense and linear in the weight; always the same object for the same form."""

BLOCK = 1024  # numbers per program
OPTIONS = dict(num_warps=4, num_stages=1)


@triton.jit(do_not_specialize=["count"])
def pack_weights_kernel(
    weights_ptrs,  # for each form: [weights] fp16|bf16|fp32
    ends,  # for each form the first program of the next
    index_ptr,  # [TERMS, count] int32: which weights, counted from 1, are added; 0 for none
    packed_ptr,  # [count] fp16|bf16|fp32
    count,
    plain_ptrs,  # for each weight that is only converted: [numbers] fp16|bf16|fp32
    copy_ptrs,  # for each of them: [numbers] as packed
    numbers,
    plain_ends,  # for each of them the first program of the next
    TERMS: tl.constexpr,
    FORMS: tl.constexpr,
    PLAINS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    offs = pid * BLOCK + tl.arange(0, BLOCK)
    mask = offs < count
    start = 0
    for form in tl.static_range(FORMS):
        if (pid >= start) & (pid < ends[form]):
            total = tl.zeros([BLOCK], dtype=tl.float32)
            for term in tl.static_range(TERMS):
                index = tl.load(index_ptr + term * count + offs, mask=mask, other=0)
                total += tl.load(weights_ptrs[form] + (index - 1), mask=index > 0, other=0.0).to(tl.float32)
            tl.store(packed_ptr + offs, total.to(packed_ptr.dtype.element_ty), mask=mask)
        start = ends[form]
    for plain in tl.static_range(PLAINS):
        if (pid >= start) & (pid < plain_ends[plain]):
            own = (pid - start) * BLOCK + tl.arange(0, BLOCK)
            value = tl.load(plain_ptrs[plain] + own, mask=own < numbers[plain], other=0.0)
            tl.store(copy_ptrs[plain] + own, value.to(packed_ptr.dtype.element_ty), mask=own < numbers[plain])
        start = plain_ends[plain]


class Packed(NamedTuple):
    """What :func:`pack_weights` makes."""

    forms: list[list[Tensor]]  # of each weight
    copies: list[Tensor]  # of the plain weights, channels-last


def pack_weights(
    weights: Sequence[Tensor], packs: Sequence[Sequence[Pack]], dtype: torch.dtype, plain: Sequence[Tensor] = ()
) -> Packed:
    """The forms of each of ``weights``, convolutions' [O, I, k, k] or the like, by the functions that ``packs`` has for
    it, and the ``plain`` weights as they are, all in ``dtype``, in one launch."""
    if not weights and not plain:
        return Packed([], [])
    innermost = tuple(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    device = (*weights, *plain)[0].device
    index, layouts, programs = _index(
        tuple(weight.shape for weight in weights), innermost, tuple(map(tuple, packs)), device
    )
    terms, count = index.shape
    sources = [weight if is_nhwc else weight.contiguous() for weight, is_nhwc in zip(weights, innermost)]
    sources = [source for source, of_weight in zip(sources, packs) for _ in of_weight]
    plain = [weight.contiguous(memory_format=torch.channels_last) for weight in plain]
    packed = torch.empty(count, dtype=dtype, device=device)
    copies = [torch.empty_like(weight, dtype=dtype, memory_format=torch.channels_last) for weight in plain]
    numbers = tuple(weight.numel() for weight in plain)
    plain_ends = tuple(itertools.accumulate((triton.cdiv(n, BLOCK) for n in numbers), initial=sum(programs)))[1:]
    ends = tuple(itertools.accumulate(programs))
    none = (packed,)  # a tuple of a kernel's arguments cannot be empty
    pack_weights_kernel[((*ends, *plain_ends)[-1],)](
        tuple(sources) or none,
        ends or (0,),
        index,
        packed,
        count,
        tuple(plain) or none,
        tuple(copies) or none,
        numbers or (0,),
        plain_ends or (0,),
        TERMS=terms,
        FORMS=len(sources),
        PLAINS=len(plain),
        BLOCK=BLOCK,
        **OPTIONS,
    )
    return Packed([[packed.as_strided(*layout) for layout in of_weight] for of_weight in layouts], copies)


@lru_cache(maxsize=64)
def _index(
    shapes: tuple[torch.Size, ...],
    innermost: tuple[bool, ...],
    packs: tuple[tuple[Pack, ...], ...],
    device: torch.device,
) -> tuple[Tensor, list[list[tuple[torch.Size, tuple[int, ...], int]]], tuple[int, ...]]:
    """What the kernel adds up, size, strides and offset of each form in its result, and the programs of each form."""
    columns: list[Tensor] = []
    layouts: list[list[tuple[torch.Size, tuple[int, ...], int]]] = []
    end = 0
    programs: list[int] = []
    for shape, is_nhwc, of_weight in zip(shapes, innermost, packs):
        numbers = torch.arange(1, 1 + shape.numel(), dtype=torch.float64, device="cpu")
        o, i, height, width = shape
        numbers = numbers.view(o, height, width, i).permute(0, 3, 1, 2) if is_nhwc else numbers.view(shape)
        layouts.append([])
        for pack in of_weight:
            form = pack(numbers)
            terms = _terms(numbers, pack)
            columns += [terms, terms.new_zeros(1, -form.numel() % BLOCK)]
            layouts[-1].append((form.shape, form.stride(), end))
            programs.append(triton.cdiv(form.numel(), BLOCK))
            end += programs[-1] * BLOCK
    if not columns:
        return torch.zeros(1, 0, dtype=torch.int32, device=device), layouts, ()
    rows = max(len(column) for column in columns)
    index = torch.cat([torch.nn.functional.pad(column, (0, 0, 0, rows - len(column))) for column in columns], dim=1)
    return index.to(device, torch.int32), layouts, tuple(programs)


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
