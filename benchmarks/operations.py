"""What each benchmark measures: its title, and the files that decide how fast it is.

A benchmark is ``bench_<name>.py``. It runs one operation of ``fastperc.ops`` or several; ``COMPOSED`` says which.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent

sys.path.append(str(ROOT))  # lab.py runs before fastperc is installed; an installed fastperc comes first
from fastperc.ops import OPERATIONS  # noqa: E402

FROZEN = tuple(name for name, operation in OPERATIONS.items() if operation.frozen)


def title_of(operation: str) -> str:
    """An operation's name in tables."""
    return OPERATIONS[operation].title


def sources_of(operation: str) -> Iterator[Path]:
    """An operation's own source files."""
    return (path for pattern in OPERATIONS[operation].sources for path in ROOT.glob(pattern) if path.is_file())


class Benchmark(NamedTuple):
    """What ``bench_<name>.py`` measures."""

    title: str  # in tables
    operations: tuple[str, ...]  # the operations that it runs
    folders: tuple[str, ...] = ()  # other folders whose Python files decide how fast it is


_LAYER = ("conv_bn_relu", "conv_chain", "conv3x3", "norm_relu", "instance_norm", "image_io")
_SUBPIXEL = (*_LAYER, "subpixel_conv_bn_relu")
_RGB = (*_LAYER, "rgb_conv", "rgb_conv_stem", "rgb_conv_head")
_LOSSES = ("vgg_loss", "gram_loss", "tv_loss")
_NETWORKS = ("fastperc/models", "fastperc/modules")

# Benchmarks of more than one operation. Any other is of the operation whose name it has.
COMPOSED = {
    "inference": Benchmark("Network", (*FROZEN, "conv3x3", "norm_relu"), ("fastperc/engine", *_NETWORKS)),
    "gallery": Benchmark(
        "Any network",
        (*FROZEN, "conv3x3", "norm_relu", "conv_chain"),
        ("fastperc/rewriting", "fastperc/engine", "fastperc/modules"),
    ),
    "training": Benchmark("Network", (*_LOSSES, *_SUBPIXEL, *_RGB), ("fastperc/losses", *_NETWORKS)),
    "vgg_loss": Benchmark(title_of("vgg_loss"), _LOSSES, ("fastperc/losses", *_NETWORKS)),
    "lpips": Benchmark(title_of("vgg_lpips"), ("vgg_lpips", "lpips_distance"), ("fastperc/losses", *_NETWORKS)),
    "residual_block": Benchmark("Residual block", _LAYER),
    "conv_bn_relu": Benchmark(title_of("conv_bn_relu"), _LAYER),
    "subpixel_conv_bn_relu": Benchmark(title_of("subpixel_conv_bn_relu"), _SUBPIXEL),
    "rgb_conv": Benchmark(title_of("rgb_conv"), _RGB),
}


def benchmark(name: str) -> Benchmark:
    """What ``bench_<name>.py`` measures.

    Raises:
        KeyError: there is neither an operation nor a composed benchmark of this name.
    """
    return COMPOSED[name] if name in COMPOSED else Benchmark(title_of(name), (name,))


def names() -> list[str]:
    """All names that a benchmark may have, in the order of the tables."""
    return [*COMPOSED, *(operation for operation in OPERATIONS if operation not in COMPOSED)]


def sources(name: str) -> list[Path]:
    """The files that decide how fast the benchmark ``name`` is, sorted; none for an unknown name."""
    if name not in names():
        return []
    measured = benchmark(name)
    paths = {path for operation in measured.operations for path in sources_of(operation)}
    for folder in measured.folders:
        paths.update((ROOT / folder).glob("*.py"))
    return sorted(paths)


def tests(frozen: bool) -> list[str]:
    """The names of the test files of operations: of those that run in frozen networks only, or of the others."""
    return [operation for operation in OPERATIONS if (operation in FROZEN) == frozen]
