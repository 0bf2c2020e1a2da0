"""The tiles of the convolutions: how large they are, and with how many warps and stages they are compiled.

A tile must fit the shared memory of the GPU that runs it: see :func:`shared_memory`.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch

KIB = 1024
SHARED_MEMORY = {80: 163 * KIB, 86: 99 * KIB, 89: 99 * KIB, 90: 227 * KIB, 100: 227 * KIB, 120: 99 * KIB}
"""Bytes of shared memory that a block may have, by architecture, for compiling without a GPU."""
LARGEST = max(SHARED_MEMORY.values())


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a block may have on ``device``, as CUDA reports it.

    It is the largest there is where kernels run interpreted (a CPU) and where a graph for a GPU is traced without one.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        return LARGEST
    properties: Any = torch.cuda.get_device_properties(device)  # PyTorch's types leave this property out
    return properties.shared_memory_per_block_optin


@cache
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors ``device`` has; an H200's number where kernels run interpreted or are only traced."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


def register_options(limit: int) -> dict[str, int]:
    """Options of Triton's compiler for matrix products on a GPU whose blocks may have ``limit`` bytes of shared memory.

    On all but the largest GPUs the sums fill the registers, and the assembler spills a few to run more warps at a time.
    It does not where a kernel names its own limit, here the most that a thread may have.
    """
    return dict(maxnreg=255) if limit < LARGEST else {}


class ConvTile(NamedTuple):
    """What a program of a convolution computes at a time, and how it is compiled."""

    height: int  # in pixels
    width: int
    channels_out: int
    channels_in: int  # in one step of the sum
    num_warps: int
    num_stages: int

    @property
    def constants(self) -> dict[str, int]:
        """The kernel's constexpr parameters."""
        return dict(TILE_H=self.height, TILE_W=self.width, BLOCK_O=self.channels_out, BLOCK_I=self.channels_in)

    @property
    def options(self) -> dict[str, int]:
        """The options of Triton's compiler."""
        return dict(num_warps=self.num_warps, num_stages=self.num_stages)


PROGRAMS = 128  # a convolution should have no fewer: GPUs have 108 to 148 multiprocessors


def channel_step(channels: int) -> int:
    """How many channels one step of the sum takes: with the least padding, and then in the fewest steps."""
    return min((64, 32, 16), key=lambda step: -(-channels // step) * step)


def conv_tile(itemsize: int, channels_in: int, channels_out: int, pixels: int, limit: int) -> ConvTile:
    """A tile with enough programs for the ``pixels`` of a batch, within ``limit`` bytes of shared memory.

    With the largest limit it is the fastest of those measured on an H200. The others were only compiled.
    """
    step = channel_step(channels_in)
    block = min(128, max(16, 1 << (channels_out - 1).bit_length()))
    programs = -(-pixels // 128) * -(-channels_out // block)  # of 128 pixels
    if itemsize == 4:
        return ConvTile(8, 8, min(block, 64), 16, 8, 2)
    if limit < LARGEST:  # at most 64 sums a thread
        if programs < PROGRAMS:
            return ConvTile(8, 8, min(block, 64), min(step, 32), 4, 4)
        return ConvTile(8, 16, block, min(step, 32), 8 if block > 64 else 4, 4)
    if programs < PROGRAMS:
        return ConvTile(8, 8, min(block, 64), step, 8, 4)  # with 4 warps statistics spill on sm_100
    return ConvTile(8, 16, block, step, 8, 4 if programs < 6 * PROGRAMS or block < 128 else 3)
