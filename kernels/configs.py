"""What the Triton kernels are compiled as: one table that the launchers, `aot` and the lab all read."""

from __future__ import annotations

from typing import Any, NamedTuple


class Variant(NamedTuple):
    """One compilation of a Triton kernel, as the package launches it."""

    kernel: Any  # the @triton.jit function
    config: str  # what tells it from its siblings, for people: "bf16 NHWC 64x64"
    signature: dict[str, str | tuple[str, ...]]  # run-time parameter → "*bf16", "*fp32", "i32", ("fp32", "fp32")
    constants: dict[str, Any]  # constexpr parameter → value
    num_warps: int
    num_stages: int
    aligned: tuple[str, ...] = ()  # run-time parameters that are multiples of 16 (bytes, for pointers)
    matrix: bool = False  # whether its products belong on the tensor cores
    first_arch: int = 80  # that it is launched on


class ConvTile(NamedTuple):
    """What a program of a convolution makes at a time, and what it is compiled with."""

    height: int  # pixels
    width: int
    channels_out: int
    channels_in: int  # of one step of the sum
    num_warps: int
    num_stages: int

    @property
    def constants(self) -> dict[str, int]:
        """As a kernel's constexpr parameters."""
        return dict(TILE_H=self.height, TILE_W=self.width, BLOCK_O=self.channels_out, BLOCK_I=self.channels_in)

    @property
    def options(self) -> dict[str, int]:
        """What Triton's compiler is told beside."""
        return dict(num_warps=self.num_warps, num_stages=self.num_stages)


PROGRAMS = 128  # that a convolution should have at least: GPUs have 108 to 148 multiprocessors


def channel_step(channels: int) -> int:
    """How many channels a sum takes at a time: the least beyond them, and of those the most."""
    return min((64, 32, 16), key=lambda step: -(-channels // step) * step)


def conv_tile(itemsize: int, channels_in: int, channels_out: int, pixels: int) -> ConvTile:
    """The largest tile that leaves enough programs for the ``pixels`` of a batch; not measured yet."""
    step = channel_step(channels_in)
    block = min(128, max(16, 1 << (channels_out - 1).bit_length()))
    programs = -(-pixels // 128) * -(-channels_out // block)  # of 128 pixels
    if itemsize == 4:
        return ConvTile(8, 8, min(block, 64), 16, 4, 2)
    if programs < PROGRAMS:
        return ConvTile(8, 8, min(block, 64), step, 4, 4)
    if block < 128:
        return ConvTile(8, 16, block, step, 4, 3)
    if programs < 6 * PROGRAMS:
        return ConvTile(8, 16, block, step, 8, 4)
    return ConvTile(16, 16, block, step, 8, 4)


def deferred_tile(itemsize: int, channels_in: int, channels_out: int, pixels: int) -> ConvTile:
    """The same where what is loaded is still to be normalised, which takes registers; not measured yet."""
    step = channel_step(channels_in)
    block = min(128, max(16, 1 << (channels_out - 1).bit_length()))
    programs = -(-pixels // 128) * -(-channels_out // block)
    if itemsize == 4:
        return ConvTile(8, 8, min(block, 32), 16, 4, 2)
    if programs < PROGRAMS:
        return ConvTile(8, 8, min(block, 64), min(step, 32), 8, 3)
    return ConvTile(8, 16, block, min(step, 32), 8, 3)
