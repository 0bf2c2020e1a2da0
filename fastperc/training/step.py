"""One iteration of training: operation by operation on a CPU, as the replay of one CUDA graph on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastperc.engine import cuda
from fastperc.progress import say
from fastperc.training.transfer import DirectTransfer, OverlappedTransfer

# Steps before the CUDA graph is recorded, in which libraries choose algorithms and the optimizer creates its state.
EAGER_STEPS = 3
FUSED_ADAM_DEVICES = ("cpu", "cuda")  # where one kernel updates all weights


def adam(parameters: Iterable[nn.Parameter], lr: float, device: torch.device) -> torch.optim.Adam:
    """Adam in the form that a :class:`TrainStep` on ``device`` needs; its state fits Adam on any other device."""
    if device.type == "cuda":  # a graph reads the learning rate from memory, where it can change between replays
        return torch.optim.Adam(parameters, lr=torch.tensor(lr, device=device), fused=True, capturable=True)
    return torch.optim.Adam(parameters, lr=lr, fused=device.type in FUSED_ADAM_DEVICES)


def train_step(
    net: nn.Module,
    loss: Callable[[Tensor, Tensor], Any],
    optimizer: torch.optim.Optimizer,
    photos: Tensor,
    inputs: Tensor,
    amp: bool,
) -> Any:
    """Updates the weights of ``net`` once.

    Args:
        net: the network.
        loss: (output, photos) → terms, a NamedTuple of scalars, ``total`` the first.
        optimizer: of the network's parameters.
        photos: what the output is compared with, RGB in 0–1 [N, 3, H, W].
        inputs: what the network sees, [N, 3, h, w].
        amp: autocast to bfloat16.

    Returns:
        The terms of the loss before the update.
    """
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(photos.device.type, torch.bfloat16, enabled=amp):
        terms = loss(net(inputs), photos)
    terms.total.backward(_one(terms.total.device, terms.total.dtype))
    optimizer.step()
    return type(terms)(*(term.detach() for term in terms))


@cache
def _one(device: torch.device, dtype: torch.dtype) -> Tensor:
    """The number 1, for all steps: ``backward`` would make it anew in each."""
    return torch.ones((), device=device, dtype=dtype)


class Recording(NamedTuple):
    """A recorded step."""

    replay: Callable[[], object]  # computes the step again
    terms: Any  # of the loss; each replay overwrites them


def record(run: Callable[[], Any]) -> Recording:
    """Records ``run`` as a CUDA graph on the current stream, without computing anything.

    Raises:
        RuntimeError: an operation in it cannot be recorded. It can then run without recording.
    """
    graph, terms = cuda.record(run, torch.cuda.current_stream())
    return Recording(graph.replay, terms)


class TrainStep:
    """An iteration of training, called with a batch of photos; it never waits for a GPU.

    On a GPU the first ``EAGER_STEPS`` calls run operation by operation. The next call records everything from 8-bit
    photos to updated weights as a CUDA graph, which this and all later calls replay; no iteration is skipped or
    repeated. Photos are copied on a stream of their own while the previous step computes. If the network cannot be
    recorded, training goes on operation by operation, after a line that says why. A network in
    ``DistributedDataParallel`` is never recorded.

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
        self.may_record = self.device.type == "cuda" and not isinstance(net, nn.parallel.DistributedDataParallel)
        self.transfer = OverlappedTransfer(self.device) if self.may_record else DirectTransfer(self.device)
        self.recording: Recording | None = None
        self._steps = 0

    def __call__(self, photos: Tensor, lr: float) -> Any:
        """Updates the weights once, with learning rate ``lr``.

        Args:
            photos: uint8 [N, 3, H, W], of the same shape at each call.
            lr: the learning rate of this step.

        Returns:
            The terms of the loss before the update, scalars on the device, valid until the next call.

        Raises:
            ValueError: on a GPU, when the shape is not that of the first call.
        """
        levels = self.transfer.to_device(photos)
        with self.transfer.compute_stream():
            self._set_learning_rate(lr)
            if self.may_record and self.recording is None and self._steps >= EAGER_STEPS:
                self._record(levels)
            self._steps += 1
            if self.recording is None:
                return self._run(levels)
            self.recording.replay()
            return self.recording.terms

    def _run(self, levels: Tensor) -> Any:
        photos = levels / 255
        inputs = photos if self.degrade is None else self.degrade(photos)
        return train_step(self.net, self.loss, self.optimizer, photos, inputs, self.amp)

    def _record(self, levels: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)  # so that the gradients lie in the graph's own memory
        try:
            self.recording = record(lambda: self._run(levels))
        except RuntimeError as error:
            self.may_record = False
            say(f"training goes on without a CUDA graph: {cuda.reason_of(error)}")

    def _set_learning_rate(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
