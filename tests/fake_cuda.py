"""A stand-in for the parts of ``torch.cuda`` that recording a graph uses, with the faults of torch 2.11.

It keeps the state that a capture changes in PyTorch's allocator, random number generator and current stream.
"""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from types import SimpleNamespace

import torch

DEVICE = torch.device("cuda", 0)


class FakeCuda:
    """Patches ``torch.cuda`` by pytest's ``monkeypatch``.

    Args:
        monkeypatch: pytest's.
        tells_allocator: whether ``capture_end`` tells the allocator before it raises, as torch does from 2.12 on.
    """

    def __init__(self, monkeypatch, tells_allocator=False):
        self.tells_allocator = tells_allocator
        self.pools = 0
        self.capturing = set()  # pools that the allocator fills
        self.users = Counter()  # of each pool
        self.draws_captured = False  # the state of the generator
        self.offset = 8
        self.invalid = False
        self.stream = self.first_stream = SimpleNamespace(device=DEVICE, name="first")
        replaced = dict(
            CUDAGraph=self.new_graph,
            graph=self.capture,
            stream=self.on_stream,
            current_stream=lambda device=None: self.stream,
            graph_pool_handle=self.new_pool,
            default_generators=(self,),
        )
        for name, value in replaced.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self.end_allocate_to_pool, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", self.release_pool, raising=False)
        rand = torch.rand
        monkeypatch.setattr(torch, "rand", lambda *size, **kw: self.draw() if kw.get("device") else rand(*size, **kw))

    @property
    def is_clean(self):
        """Whether no capture is under way anywhere, and nothing holds a pool."""
        held = any(self.users.values())
        return not self.capturing and not held and not self.draws_captured and self.stream is self.first_stream

    def new_pool(self):
        self.pools += 1
        return (0, self.pools)

    def new_graph(self):
        return SimpleNamespace(replay=lambda: None)

    @contextmanager
    def on_stream(self, stream):
        before, self.stream = self.stream, stream
        yield
        self.stream = before

    @contextmanager
    def capture(self, graph, stream, capture_error_mode, pool=(0, 99)):
        """Ends as ``torch.cuda.graph`` does: an error of the capture keeps it from restoring the stream."""
        assert not self.capturing, "captures_underway.empty()"
        self.stream = stream
        self.capturing.add(pool)
        self.users[pool] += 1
        self.draws_captured, self.invalid = True, False
        try:
            yield
        finally:
            self.end(pool)

    def end(self, pool):
        if self.tells_allocator:
            self.capturing.remove(pool)
        if self.invalid:
            self.users[pool] -= self.tells_allocator
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        self.capturing.discard(pool)
        self.users[pool] -= 1  # with the graph, which nobody keeps
        self.draws_captured = False

    def wait(self):
        """An operation that a capture refuses."""
        if self.capturing:
            self.invalid = True
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nand much more")

    # torch._C

    def end_allocate_to_pool(self, device, pool):
        if pool not in self.capturing:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.capturing.remove(pool)

    def release_pool(self, device, pool):
        self.users[pool] -= 1
        assert self.users[pool] >= 0, "released twice"

    # The generator

    def draw(self):
        if self.draws_captured:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")
        self.offset += 4

    def get_offset(self):
        return self.offset

    def set_offset(self, offset):
        self.offset = offset

    def clone_state(self):
        return "a state outside of captures"

    def graphsafe_set_state(self, state):
        self.draws_captured = False
