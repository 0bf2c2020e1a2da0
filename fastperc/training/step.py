"""One iteration of training: eagerly on a CPU, as the replay of one CUDA graph on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastperc.progress import say

EAGER_STEPS = 3  # before the graph is recorded: libraries choose algorithms and the optimizer makes its state
OPTIMIZES_AT_ONCE = ("cpu", "cuda")  # where one kernel updates all weights


def adam(parameters: Iterable[nn.Parameter], lr: float, device: torch.device) -> torch.optim.Adam:
    """Adam in the form that a :class:`TrainStep` on ``device`` needs. Its state fits that of any other device."""
    if device.type == "cuda":  # a graph reads the step size from memory, where it may change
        return torch.optim.Adam(parameters, lr=torch.tensor(lr, device=device), fused=True, capturable=True)
    return torch.optim.Adam(parameters, lr=lr, fused=device.type in OPTIMIZES_AT_ONCE)


def train_step(
    net: nn.Module,
    loss: Callable[[Tensor, Tensor], Any],
    optimizer: torch.optim.Optimizer,
    photos: Tensor,
    inputs: Tensor,
    amp: bool,
) -> Any:
    """One iteration on ``photos``, RGB in 0–1 [N, 3, H, W], of which the network sees ``inputs``; returns the terms of
    the loss before the update."""
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(photos.device.type, torch.bfloat16, enabled=amp):
        terms = loss(net(inputs), photos)
    terms.total.backward()
    optimizer.step()
    return type(terms)(*(term.detach() for term in terms))


class TrainStep:
    """Iterations of training, called with photos; nothing in it waits for a GPU.

    On a GPU the first ``EAGER_STEPS`` calls run op by op. Then everything from levels to the updated weights is
    recorded as a CUDA graph, which this and all later calls replay: no iteration is lost, none is repeated. Photos go
    up on a stream of their own into one of two buffers, while the step before is still at work. A network that cannot
    be recorded goes on op by op, after a line that says why; one in ``DistributedDataParallel`` always runs so.

    Args:
        net: the network, on its device.
        loss: (output, photos) → terms, a NamedTuple of scalars, ``total`` the first.
        optimizer: of the network's parameters, best made by :func:`adam`.
        amp: autocast to bfloat16.
        degrade: photos → what the network sees. Default: the photos themselves.
    """

    def __init__(
        self,
        net: nn.Module,
        loss: Callable[[Tensor, Tensor], Any],
        optimizer: torch.optim.Optimizer,
        amp: bool = False,
        degrade: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.net, self.loss, self.optimizer, self.amp, self.degrade = net, loss, optimizer, amp, degrade
        self.device = next(net.parameters()).device
        self.records = self.device.type == "cuda" and not isinstance(net, nn.parallel.DistributedDataParallel)
        self._way = _GPUWay(self.device) if self.records else _Way(self.device)
        self._recording: Recording | None = None
        self._done = 0

    def __call__(self, photos: Tensor, lr: float) -> Any:
        """Updates the weights by ``photos``, uint8 [N, 3, H, W] and of the same shape at each call, with a step size
        of ``lr``.

        Returns:
            The terms of the loss before the update, scalars on the device, valid until the next call.
        """
        levels = self._way.bring(photos)
        with self._way.computing():
            self._set_learning_rate(lr)
            if self.records and self._recording is None and self._done >= EAGER_STEPS:
                self._record(levels)
            self._done += 1
            if self._recording is None:
                return self._run(levels)
            self._recording.replay()
            return self._recording.terms

    def _run(self, levels: Tensor) -> Any:
        photos = levels.float() / 255
        inputs = photos if self.degrade is None else self.degrade(photos)
        return train_step(self.net, self.loss, self.optimizer, photos, inputs, self.amp)

    def _record(self, levels: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)  # so that the graph's own memory holds the gradients
        try:
            self._recording = record(lambda: self._run(levels))
        except RuntimeError as error:
            self.records = False
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            say(f"training goes on without a CUDA graph: {reason}")

    def _set_learning_rate(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr


class Recording(NamedTuple):
    """A step that can be replayed."""

    replay: Callable[[], object]
    terms: Any  # which each replay fills anew


def record(run: Callable[[], Any]) -> Recording:
    """``run`` as a CUDA graph, on the current stream; nothing runs before it is replayed.

    Raises:
        RuntimeError: something in it cannot be recorded.
    """
    graph = torch.cuda.CUDAGraph()
    # Other threads may go on to pin memory for the photos to come.
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
        terms = run()
    return Recording(graph.replay, terms)


class _Way:
    """How photos come to the device, and where what follows is computed."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def bring(self, photos: Tensor) -> Tensor:
        """``photos`` on the device, channels-last."""
        return photos.to(self.device, non_blocking=True, memory_format=torch.channels_last)

    def computing(self) -> AbstractContextManager[object]:
        """Where the step runs."""
        return nullcontext()


class _Buffer(NamedTuple):
    levels: Tensor
    filled: torch.cuda.Event
    read: torch.cuda.Event


class _GPUWay(_Way):
    """By a stream that copies, which runs ahead by two batches, to the stream that computes."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._copying, self._computing = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._buffers: list[_Buffer] = []
        self._levels: Tensor | None = None  # what the graph reads
        self._turn = 0

    def bring(self, photos: Tensor) -> Tensor:
        if self._levels is None:
            self._levels, *buffers = (
                torch.empty(photos.shape, dtype=photos.dtype, device=self.device, memory_format=torch.channels_last)
                for _ in range(3)
            )
            self._buffers = [_Buffer(one, torch.cuda.Event(), torch.cuda.Event()) for one in buffers]
            self._copying.wait_stream(torch.cuda.current_stream(self.device))
        if photos.shape != self._levels.shape:
            raise ValueError(f"expected photos {list(self._levels.shape)} as before, got {list(photos.shape)}")
        buffer = self._buffers[self._turn]
        self._turn = 1 - self._turn
        with torch.cuda.stream(self._copying):
            buffer.read.wait()
            buffer.levels.copy_(photos, non_blocking=True)
            buffer.filled.record()
        with self.computing():
            buffer.filled.wait()
            self._levels.copy_(buffer.levels)
            buffer.read.record()
        return self._levels

    def computing(self) -> AbstractContextManager[object]:
        return _Beside(self._computing)


class _Beside:
    """The block runs on ``stream``, after what the current stream has to do and before what it gets to do."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.stream = stream

    def __enter__(self) -> None:
        self._outside = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(self._outside)
        self._inside = torch.cuda.stream(self.stream)
        self._inside.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._inside.__exit__(*error)
        self._outside.wait_stream(self.stream)
