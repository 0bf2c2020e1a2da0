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
