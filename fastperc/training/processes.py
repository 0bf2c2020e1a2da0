"""The processes that train one network together.

``torchrun --nproc-per-node=2 -m fastperc train …`` starts them and describes them in environment variables. Sums over
the processes are gathered first; each process then adds them up in the order of the ranks, so that all get the same
bits.
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
from torch import Tensor, nn

from fastperc.collective import gathered
from fastperc.errors import InputError

# How long a process waits for the others. The first may be packing many photos.
TIMEOUT = timedelta(hours=3)


@dataclass(frozen=True)
class Processes:
    """The processes that train together, as this one sees them: its device, its rank, and their number."""

    device: torch.device
    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0

    @contextmanager
    def first_before_others(self) -> Iterator[None]:
        """Runs the block in the first process, then in all others: they find what the first has written."""
        if not self.is_first:
            dist.barrier()
        try:
            yield
        finally:
            if self.is_first and self.count > 1:
                dist.barrier()

    def mean(self, values: Tensor) -> Tensor:
        """The mean of ``values`` over the processes, of the same shape."""
        return values if self.count == 1 else gathered(values).sum(0) / self.count

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is set in any process."""
        if self.count == 1:
            return flag
        return bool(gathered(torch.tensor([float(flag)], device=self.device)).any())


@contextmanager
def join_processes(device: str) -> Iterator[Processes]:
    """Joins the processes that train together while the block runs; one alone if nothing started several.

    With ``device`` ``"cuda"`` each process takes the GPU of its local rank. A process group that exists already is
    used, and is left in place.

    Raises:
        InputError: the environment variables make no sense, no other process answers, or a GPU is missing.
    """
    joined_before = dist.is_available() and dist.is_initialized()
    if joined_before:
        rank, count = dist.get_rank(), dist.get_world_size()
    else:
        rank, count = _number("RANK", 0), _number("WORLD_SIZE", 1)
    own_device = torch.device(device)
    if count == 1 and not joined_before:
        yield Processes(own_device)
        return
    if own_device.type == "cuda":
        own_device = _own_gpu(own_device, _number("LOCAL_RANK", rank))
        torch.cuda.set_device(own_device)
    if not joined_before:
        _join("nccl" if own_device.type == "cuda" else "gloo", rank, count)
    try:
        yield Processes(own_device, rank, count)
        if not joined_before:
            dist.barrier()  # no process leaves before the first has written its files
    finally:
        if not joined_before:
            gc.collect()  # DistributedDataParallel keeps the group's threads alive in a reference cycle
            dist.destroy_process_group()


def data_parallel(net: nn.Module, processes: Processes, sync_bn: bool) -> nn.Module:
    """``net`` with its gradients averaged over the processes; ``net`` itself where there is only one.

    With ``sync_bn`` its batch norms take their statistics over the batches of all processes. Running statistics are
    those of the first process; with ``sync_bn`` they are equal in all.
    """
    if processes.count == 1:
        return net
    devices = [processes.device] if processes.device.type == "cuda" else None
    parallel = nn.parallel.DistributedDataParallel(net, devices)
    if sync_bn:  # only now: DistributedDataParallel refuses such norms on a CPU. The parameters stay the same.
        nn.SyncBatchNorm.convert_sync_batchnorm(net)
    return parallel


def _join(backend: str, rank: int, count: int) -> None:
    try:
        dist.init_process_group(backend, rank=rank, world_size=count, timeout=TIMEOUT)
    except (ValueError, RuntimeError) as error:  # no address to meet at, or no other process there
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
        raise InputError(f"each of several processes takes its own GPU: give --device cuda, not {device}")
    if index >= torch.cuda.device_count():
        raise InputError(
            f"process {index} finds {torch.cuda.device_count()} GPUs here; start at most one process for each"
        )
    return torch.device("cuda", index)
