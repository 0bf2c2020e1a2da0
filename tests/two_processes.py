"""Work done by two processes that have joined, as training on two GPUs does it."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

COUNT = 2


def in_two_processes(work: Callable[[int], Any], folder: Path) -> list[Any]:
    """What ``work(rank)`` returns in each of two joined processes of one thread each, in the order of ranks."""
    torch.multiprocessing.spawn(_run, (work, folder), COUNT)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(COUNT)]


def _run(rank: int, work: Callable[[int], Any], folder: Path) -> None:
    store = (folder / "store").as_uri()  # a free port may be taken by another test before it is used
    dist.init_process_group("gloo", store, rank=rank, world_size=COUNT, timeout=timedelta(seconds=60))
    torch.set_num_threads(1)
    torch.save(work(rank), folder / f"{rank}.pt")
    dist.destroy_process_group()
