"""Several processes that train one network: who this one is among them, and what they find out together.

``torchrun --nproc-per-node=2 -m fastperc train …`` starts them and says so in environment variables. What is summed
over processes is gathered first and summed by each of them in the order of ranks, so that all have the same bits.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from fastperc.collective import gathered
from fastperc.errors import InputError

# How long processes wait for each other: the first may be packing many photos before the rest may go on.
PATIENCE = timedelta(hours=3)


@dataclass(frozen=True)
class Processes:
    """This process among those that train together; alone unless something started it as one of several."""

    device: torch.device
    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that writes files and speaks."""
        return self.rank == 0

    @contextmanager
    def one_first(self) -> Iterator[None]:
        """The block runs in the first process, then in the others: where it leaves behind what they can use."""
        if not self.first:
            dist.barrier()
        try:
            yield
        finally:
            if self.first and self.count > 1:
                dist.barrier()

    def mean(self, values: Tensor) -> Tensor:
        """The mean of ``values``, of any shape, over the processes."""
        return values if self.count == 1 else gathered(values).sum(0) / self.count

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is set in any process."""
        if self.count == 1:
            return flag
        return bool(gathered(torch.tensor([float(flag)], device=self.device)).any())


@contextmanager
def processes(device: str) -> Iterator[Processes]:
    """The processes that train together on devices like ``device``, joined while the block runs.

    Of ``"cuda"`` each takes the GPU of its own number on its machine. A process group that is there already is used,
    and left alone in the end.

    Raises:
        InputError: the environment makes no sense, or there are more processes than GPUs.
    """
    joined = dist.is_available() and dist.is_initialized()
    if joined:
        rank, count = dist.get_rank(), dist.get_world_size()
    else:
        rank, count = _number("RANK", 0), _number("WORLD_SIZE", 1)
    own = torch.device(device)
    if count == 1 and not joined:
        yield Processes(own)
        return
    if own.type == "cuda":
        own = _own_gpu(own, _number("LOCAL_RANK", rank))
        torch.cuda.set_device(own)
    if not joined:
        _join("nccl" if own.type == "cuda" else "gloo", rank, count)
    try:
        yield Processes(own, rank, count)
        if not joined:
            dist.barrier()  # nobody leaves before the first has written all it has to
    finally:
        if not joined:
            gc.collect()  # a network in DistributedDataParallel holds on to the group's threads, in a cycle
            dist.destroy_process_group()


def _join(backend: str, rank: int, count: int) -> None:
    try:
        dist.init_process_group(backend, rank=rank, world_size=count, timeout=PATIENCE)
    except (ValueError, RuntimeError) as error:  # no address to meet at, or nobody there
        raise InputError(
            f"the {count} processes cannot be joined ({error}); start them by torchrun --nproc-per-node={count}"
        ) from None


def _number(name: str, default: int) -> int:
    text = os.environ.get(name) or str(default)
    if not text.isdecimal():
        raise InputError(f"{name} is {text!r} in the environment, where torchrun puts a number")
    return int(text)


def _own_gpu(device: torch.device, index: int) -> torch.device:
    if device.index is not None:
        raise InputError(f"of several processes each takes a GPU of its own: give --device cuda, not {device}")
    if index >= torch.cuda.device_count():
        raise InputError(
            f"process {index} finds {torch.cuda.device_count()} GPUs here; start at most one process for each"
        )
    return torch.device("cuda", index)
