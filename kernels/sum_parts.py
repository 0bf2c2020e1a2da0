"""The sums that gradients of weights are split into, added up: those of several layers in one launch, each in order."""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 512  # numbers per program
OPTIONS = dict(num_warps=4, num_stages=1)
ALIGNMENT = 64  # numbers: what lies in memory that is shared begins at a multiple of it
COLUMNS = tl.constexpr(9)


class Wide(NamedTuple):
    """How a part of ``fastperc.kernels.rgb_weight_gradient`` lies in memory, [2, channels, kernel, run]."""

    kernel: int  # taps in a row or column
    run: int
    channels: int
    to_rgb: bool  # whether the sum is of a convolution to three channels, and turned by 180°


class Sum(NamedTuple):
    """A sum that is in parts, in memory that several sums share."""

    first: int  # where its first part begins
    part_numbers: int  # from one part to the next
    parts: int
    shape: tuple[int, ...]  # of the sum
    wide: Wide | None


@triton.jit(do_not_specialize=["sums"])
def sum_parts_kernel(
    partials_ptr,  # fp32
    table_ptr,  # [sums, COLUMNS] int32: see _table
    out_ptr,  # fp32
    sums,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    start = 0
    end = tl.load(table_ptr)
    for _ in tl.range(1, sums):  # to the row of this program
        if pid >= end:
            start = end
            table_ptr += COLUMNS
            end = tl.load(table_ptr)
    partials_ptr += tl.load(table_ptr + 1)
    part_numbers = tl.load(table_ptr + 2)
    parts = tl.load(table_ptr + 3)
    numbers = tl.load(table_ptr + 5)
    kernel = tl.load(table_ptr + 6)
    run = tl.load(table_ptr + 7)
    channels = tl.load(table_ptr + 8)
    offs = (pid - start) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numbers
    total = tl.zeros([BLOCK], dtype=tl.float32)
    if kernel == 0:
        for _ in tl.range(0, parts, loop_unroll_factor=4):
            total += tl.load(partials_ptr + offs, mask=mask, other=0.0)
            partials_ptr += part_numbers
    else:  # the two halves of a number, one for each of two pixels
        if channels < 0:  # the sum is [3, kernel, kernel, channels], turned
            tap = offs // -channels % (kernel * kernel)
            row = kernel - 1 - tap // kernel
            column = kernel - 1 - tap % kernel
            color = offs // -channels // (kernel * kernel)
            channel = offs % -channels
            half = -channels * kernel * run + 3
        else:  # [channels, kernel, kernel, 3]
            row = offs // 3 // kernel % kernel
            column = offs // 3 % kernel
            color = offs % 3
            channel = offs // 3 // kernel // kernel
            half = channels * kernel * run + 3
        first = (channel * kernel + row) * run + column * 3 + color
        for _ in tl.range(0, parts, loop_unroll_factor=4):
            other = tl.load(partials_ptr + first + half, mask=mask, other=0.0)
            total += tl.load(partials_ptr + first, mask=mask, other=0.0) + other
            partials_ptr += part_numbers
    tl.store(out_ptr + tl.load(table_ptr + 4) + offs, total, mask=mask)


@lru_cache(maxsize=64)
def _table(sums: tuple[Sum, ...], device: torch.device) -> tuple[Tensor, int, list[int]]:
    """A row for each sum, the number of programs, and where each sum begins in the result and where the last one ends.

    A row: the first program of the next sum, where the first part begins, the numbers from part to part, the parts,
    where the sum begins in the result, its numbers, and of a wide convolution the kernel (else 0), the run, and the
    channels, negative to three channels.
    """
    rows, programs, places = [], 0, [0]
    for first, part_numbers, parts, shape, wide in sums:
        numbers = prod(shape)
        programs += triton.cdiv(numbers, BLOCK)
        layout = (0, 0, 0) if wide is None else (*wide[:2], -wide.channels if wide.to_rgb else wide.channels)
        rows.append((programs, first, part_numbers, parts, places[-1], numbers, *layout))
        places.append(places[-1] + numbers + -numbers % ALIGNMENT)
    return torch.tensor(rows, dtype=torch.int32, device="cpu").to(device), programs, places


class SplitSums:
    """Sums in parts, by keys. Their parts share memory; when it is full, what is there is added up in one launch.

    Args:
        nbytes: of the memory. A larger sum gets as much as it needs.
        device: where it is.
    """

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.nbytes, self.device = nbytes, device
        self.memory = torch.empty(0, device=device)
        self.end = 0  # of what is used
        self.waiting: dict[int, Sum] = {}
        self.sums: dict[int, Tensor] = {}

    def empty(
        self,
        key: int,
        parts: int,
        part_shape: tuple[int, ...],
        shape: tuple[int, ...],
        wide: Wide | None,
    ) -> Tensor:
        """Memory for the parts of a sum of ``shape``, to be filled before the next call: see :class:`SumOf`."""
        part_numbers = prod(part_shape)
        if self.end + parts * part_numbers > len(self.memory):
            self.add_up()
            if parts * part_numbers > len(self.memory):
                self.memory = torch.empty(max(self.nbytes // 4, parts * part_numbers), device=self.device)
        first, last = self.end, self.end + parts * part_numbers
        self.waiting[key] = Sum(first, part_numbers, parts, shape, wide)
        self.end = last + -last % ALIGNMENT
        return self.memory[first:last].view(parts, *part_shape)

    def add_up(self) -> dict[int, Tensor]:
        """All sums so far, each of its shape, float32."""
        if self.waiting:
            waiting = tuple(self.waiting.values())
            table, programs, places = _table(waiting, self.device)
            out = torch.empty(places[-1], device=self.device)
            sum_parts_kernel[(programs,)](self.memory, table, out, len(waiting), BLOCK=BLOCK, **OPTIONS)
            for key, place, entry in zip(self.waiting, places, waiting):
                self.sums[key] = out[place : place + prod(entry.shape)].view(entry.shape)
        self.waiting.clear()
        self.end = 0
        return self.sums


class SumOf(NamedTuple):
    """One of several sums in parts: what a kernel fills."""

    sums: SplitSums
    key: int

    def empty(
        self, parts: int, part_shape: tuple[int, ...], shape: tuple[int, ...], wide: Wide | None = None
    ) -> Tensor:
        """Memory [parts, *part_shape] float32 for the parts of the sum, which has ``shape``."""
        return self.sums.empty(self.key, parts, part_shape, shape, wide)
