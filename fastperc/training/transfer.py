"""Copying a batch of photos to the device on which the step runs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor


class DirectTransfer:
    """Copies photos on the stream that also computes the step."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def to_device(self, photos: Tensor) -> Tensor:
        """``photos`` [N, C, H, W] of any dtype, on the device and in channels-last memory."""
        return photos.to(self.device, non_blocking=True, memory_format=torch.channels_last)

    def compute_stream(self) -> AbstractContextManager[object]:
        """The block computes the step: it runs on the current stream."""
        return nullcontext()


class _Buffer(NamedTuple):
    levels: Tensor
    filled: torch.cuda.Event
    read: torch.cuda.Event


class OverlappedTransfer:
    """Copies photos to a GPU on a stream of its own, up to two batches ahead of the stream that computes.

    A batch goes into one of two buffers in turn, and from there into a tensor at a fixed address, which a CUDA graph
    can read.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._copy_stream, self._compute_stream = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._buffers: list[_Buffer] = []
        self._levels: Tensor | None = None  # what the step reads
        self._next_buffer = 0

    def to_device(self, photos: Tensor) -> Tensor:
        """``photos`` [N, C, H, W], of the same shape and dtype at each call, at the same address at each call.

        Raises:
            ValueError: the shape is not that of the first call.
        """
        if self._levels is None:
            self._levels = self._allocate(photos)
        if photos.shape != self._levels.shape:
            raise ValueError(f"expected photos {list(self._levels.shape)} as before, got {list(photos.shape)}")
        buffer = self._buffers[self._next_buffer]
        self._next_buffer = 1 - self._next_buffer
        with torch.cuda.stream(self._copy_stream):
            buffer.read.wait()
            buffer.levels.copy_(photos, non_blocking=True)
            buffer.filled.record()
        with self.compute_stream():
            buffer.filled.wait()
            self._levels.copy_(buffer.levels)
            buffer.read.record()
        return self._levels

    def compute_stream(self) -> AbstractContextManager[object]:
        """The block computes the step: it runs on the compute stream."""
        return OrderedStream(self._compute_stream)

    def _allocate(self, photos: Tensor) -> Tensor:
        levels, *buffers = (
            torch.empty(photos.shape, dtype=photos.dtype, device=self.device, memory_format=torch.channels_last)
            for _ in range(3)
        )
        self._buffers = [_Buffer(buffer, torch.cuda.Event(), torch.cuda.Event()) for buffer in buffers]
        self._copy_stream.wait_stream(torch.cuda.current_stream(self.device))
        return levels


class OrderedStream:
    """The block runs on ``stream``: after the work queued on the current stream, and before what is queued there later.

    A context manager.
    """

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.stream = stream

    def __enter__(self) -> None:
        self._outer_stream = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(self._outer_stream)
        self._context = torch.cuda.stream(self.stream)
        self._context.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)
        self._outer_stream.wait_stream(self.stream)
