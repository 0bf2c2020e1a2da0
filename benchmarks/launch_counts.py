"""Counts the kernel launches of a training step on a GPU, without a GPU.

    python benchmarks/launch_counts.py [--check] [--where] [NAME ...]

A step goes from 8-bit photos to updated weights, as ``TrainStep`` records it, at a batch of 4. It runs on CPU tensors
that say they are on a GPU (``fastperc.kernels.launches``). The counts are written to ``benchmarks/launches.json`` and
``docs/performance.md`` shows them; ``--check`` compares instead, and ``--where`` prints the lines that launch.

Counted are the launches of Triton kernels; convolutions and matrix products, which are cuDNN's and cuBLAS'; and all
other calls of PyTorch that compute or copy. The C++ module's CUDA kernels are not there: PyTorch computes what they
would.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "benchmarks" / "launches.json"
PAGE = ROOT / "docs" / "performance.md"
ARCH = 90
LIBRARY = {
    "convolution",
    "convolution_backward",
    "cudnn_convolution_relu",
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "_scaled_mm",
}
# What fills memory and then copies to a part of it.
TWO_LAUNCHES = {"slice_backward", "select_backward", "constant_pad_nd"}
NO_LAUNCH = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view"}
TENSORS_IN_A_LAUNCH = (110, 64, 48, 36, 30)  # of a foreach call with lists of 1 to 5 tensors for each
KINDS = ("triton", "library", "other")


class Launched(NamedTuple):
    """A launch, or the launches of one call."""

    kind: str  # of KINDS
    name: str  # of the kernel or of PyTorch's operator
    line: str  # of fastperc that launches it
    times: int = 1


class CountedCalls(TorchDispatchMode):
    """Appends what PyTorch's operators launch to ``launched``."""

    def __init__(self, launched: list[Launched]) -> None:
        super().__init__()
        self.launched = launched

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, result = func._schema.name.partition("::")[2], func(*args, **(kwargs or {}))
        is_empty = isinstance(result, Tensor) and result.numel() == 0
        if not is_empty and (count := launches_of(func, name, args)):
            self.launched.append(Launched("library" if name in LIBRARY else "other", name, place(), count))
        return result


def launches_of(func: Any, name: str, args: Any) -> int:
    """How many kernels the call of PyTorch's operator ``name`` launches on a GPU; 0 for views and the like."""
    returns = func._schema.returns
    views = any(value.alias_info is not None and not value.alias_info.is_write for value in returns)
    returns_tensors = any("Tensor" in str(value.type) for value in returns)
    writes = any(value.alias_info is not None and value.alias_info.is_write for value in func._schema.arguments)
    if views or func.namespace != "aten" or name in NO_LAUNCH or not (returns_tensors or writes):
        return 0
    if name.startswith(("_foreach", "_fused")):
        lists = [value for value in args if isinstance(value, (list, tuple)) and value and isinstance(value[0], Tensor)]
        lists = [tensors for tensors in lists if not name.startswith("_fused") or tensors[0].dim() or len(lists) == 1]
        return math.ceil(len(lists[0]) / TENSORS_IN_A_LAUNCH[len(lists) - 1])
    return 2 if name in TWO_LAUNCHES else 1


def place() -> str:
    """The line of fastperc that makes the current call."""
    frames = [frame for frame in traceback.extract_stack() if "/fastperc/" in frame.filename]
    frames = [frame for frame in frames if not frame.filename.endswith(("/launches.py", "/launch_counts.py"))]
    return f"{frames[-1].filename.rpartition('/fastperc/')[2]}:{frames[-1].lineno}" if frames else "PyTorch"


@contextmanager
def counted() -> Iterator[list[Launched]]:
    """A list that receives what the block launches. To use in ``fastperc.kernels.launches.recording``."""
    from triton.runtime.jit import JITFunction

    launched: list[Launched] = []
    bind = JITFunction.run

    def note(self: Any, *args: Any, **kwargs: Any) -> Any:
        launched.append(Launched("triton", self.__name__, place()))
        return bind(self, *args, **kwargs)

    with mock.patch.object(JITFunction, "run", note), CountedCalls(launched):
        yield launched


class OnDevice:
    """Stands for the copy of photos to the GPU, which overlaps with the step before and is not counted."""

    def to_device(self, photos: Tensor) -> Tensor:
        return photos.contiguous(memory_format=torch.channels_last)

    def compute_stream(self) -> Any:
        return nullcontext()


def launched_by_step(
    build: Callable[[], nn.Module], loss: nn.Module, degrade: Any, size: int, dtype: torch.dtype
) -> list[Launched]:
    """What the step that ``TrainStep`` records launches, for a batch of 4 photos of ``size``²."""
    from fastperc.training import step

    launched: list[Launched] = []

    def record(run: Callable[[], Any]) -> step.Recording:
        with counted() as launches:
            terms = run()
        launched.extend(launches)
        return step.Recording(lambda: None, terms)

    net: Any = build().train()
    net = net.to(memory_format=torch.channels_last)
    autocast = torch.autocast
    with (
        mock.patch.object(step, "OverlappedTransfer", lambda device: OnDevice()),
        mock.patch.object(step, "record", record),
        mock.patch.object(step, "EAGER_STEPS", 1),
        mock.patch.object(
            torch, "autocast", lambda device, of=None, **options: autocast(device, of and dtype, **options)
        ),
    ):
        run = step.TrainStep(net, loss, step.adam(net.parameters(), 1e-3, next(net.parameters()).device), True, degrade)
        for _ in range(2):
            run(torch.zeros(4, 3, size, size, dtype=torch.uint8), 1e-3)
    return launched


def cases() -> dict[str, Callable[[torch.dtype], list[Launched]]]:
    """Networks in training by name, as functions of the dtype of autocast."""
    from fastperc import TransformNet, reference
    from fastperc.kernels import runs
    from fastperc.training.objective import ReconstructionLoss

    def style(build: Callable[[], nn.Module]) -> Callable[[torch.dtype], list[Launched]]:
        return lambda dtype: launched_by_step(build, runs._perceptual_loss(), None, 256, dtype)

    def x4(dtype: torch.dtype) -> list[Launched]:
        loss = ReconstructionLoss("pixel", None)
        loss.distance = runs._perceptual_loss(style=False)
        degrade = partial(reference.degrade, scale=4, blur=1.0)
        return launched_by_step(runs.NETWORKS["super-resolution x4"], loss, degrade, 288, dtype)

    great_wave = partial(TransformNet, "instance", width=16, padding="reflect", upsample="nearest")
    return {
        "paper": style(runs.NETWORKS["paper"]),
        "great_wave": style(great_wave),
        "examples": style(runs.NETWORKS["examples"]),
        "×4": x4,
    }


def table(names: Iterable[str] = ()) -> dict[str, list[Launched]]:
    """What a step of each named case, or of all, launches, by network and dtype."""
    from fastperc.kernels import launches

    found = {}
    with launches.recording(ARCH):
        for name, run in cases().items():
            for dtype in (torch.bfloat16, torch.float16):
                if not names or name in names:
                    torch.manual_seed(0)
                    found[f"{name}, {launches_name(dtype)}"] = run(dtype)
    return found


def launches_name(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def counts(launched: Iterable[Launched]) -> dict[str, dict[str, int]]:
    """The launches by kind and name, most first."""
    found: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    for kind, name, _, count in launched:
        found[kind][name] += count
    return {kind: dict(sorted(names.items(), key=lambda item: (-item[1], item[0]))) for kind, names in found.items()}


def markdown(rows: Mapping[str, Mapping[str, Mapping[str, int]]]) -> str:
    """The table of ``docs/performance.md``."""
    lines = ["| training step, batch 4 | Triton kernels | cuDNN, cuBLAS | PyTorch | all |", "|---|--:|--:|--:|--:|"]
    for name, kinds in rows.items():
        numbers = [sum(kinds[kind].values()) for kind in KINDS]
        lines.append(f"| {name} | {' | '.join(map(str, (*numbers, sum(numbers))))} |")
    return "\n".join(lines)


def page_with(rows: Mapping[str, Mapping[str, Mapping[str, int]]]) -> str:
    """``docs/performance.md`` with the table of ``rows`` between its markers."""
    block = re.compile(r"(<!-- launches -->\n).*?(\n<!-- /launches -->)", re.DOTALL)
    return block.sub(lambda match: match[1] + markdown(rows) + match[2], PAGE.read_text())


def main(argv: list[str] | None = None) -> int:
    """Counts, and writes or compares; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--check", action="store_true", help="compare with the committed counts, and write nothing")
    parser.add_argument("--where", action="store_true", help="print the lines that launch, and write nothing")
    parser.add_argument("names", nargs="*", metavar="NAME", help="paper, great_wave, examples or ×4; default: all")
    arguments = parser.parse_args(argv)
    warnings.filterwarnings("ignore", module="triton")
    os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels launch nothing
    launched = table(arguments.names)
    rows = {name: counts(launches) for name, launches in launched.items()}
    print(markdown(rows))
    if arguments.where:
        for name, launches in launched.items():
            print(f"\n{name}")
            at_lines: Counter[tuple[str, ...]] = Counter()
            for *entry, count in launches:
                at_lines[tuple(entry)] += count
            for (kind, kernel, line), count in at_lines.most_common():
                print(f"{count:4} {kind} {kernel} at {line}")
        return 0
    committed = json.loads(TABLE.read_text())
    if not arguments.check:
        TABLE.write_text(json.dumps(committed | rows, indent=1, ensure_ascii=False) + "\n")
        PAGE.write_text(page_with(committed | rows))
        return 0
    if PAGE.read_text() != page_with(committed):
        print("docs/performance.md shows other counts: run python benchmarks/launch_counts.py", file=sys.stderr)
        return 1
    changed = [name for name in rows if rows[name] != committed.get(name)]
    for name in changed:
        for kind in KINDS:
            was, now = Counter(committed.get(name, {}).get(kind, {})), Counter(rows[name][kind])
            print(f"{name}, {kind}: more {dict(now - was)}, fewer {dict(was - now)}", file=sys.stderr)
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
