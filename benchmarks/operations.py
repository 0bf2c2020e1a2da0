"""What each benchmark measures: its title, and the files that decide how fast it is. Standard library only.

A benchmark is ``bench_<name>.py``. It runs one operation of ``fastperc.ops`` or several; ``COMPOSED`` says which.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent

# ---- TO BE READ FROM fastperc.ops.OPERATIONS -------------------------------------------------------------------------
# Three things are asked of an operation: its title, its sources (paths relative to ROOT) and whether it runs in frozen
# networks only. `title_of`, `sources_of` and `FROZEN` below are the only places that look at these tables.

_TITLES = {
    "tv_loss": "Total variation",
    "gram_loss": "Gram loss",
    "vgg_loss": "Loss network",
    "norm_relu": "Norm, ReLU",
    "conv3x3": "3×3 conv",
    "conv_bn_relu": "Conv, norm, ReLU",
    "subpixel_conv_bn_relu": "½-stride conv, norm, ReLU",
    "rgb_conv": "9×9 conv",
}
_FOLDERS = ("csrc", "kernels", "fastperc/ops")  # where a name below stands for all files <name>.*
_SHARED = ("frozen", "packing", "onednn", "configs", "deferred")
_WINOGRAD = ("conv3x3", "frozen", "packing", "winograd", "winograd_gradient", "winograd_tile")
_NAMES = {
    "tv_loss": ("tv_loss",),
    "gram_loss": ("gram_loss",),
    "vgg_loss": ("vgg_loss", "vgg_chain", "configs", *_WINOGRAD),
    "norm_relu": ("norm_relu",),
    "conv3x3": _WINOGRAD,
    "conv_bn_relu": ("conv_bn_relu", *_SHARED, *_WINOGRAD),
    "subpixel_conv_bn_relu": ("subpixel_conv_bn_relu", *_SHARED),
    "conv_chain": ("conv_chain", "layer", "fold_gradient", "weight_gradient"),
    "rgb_conv": ("rgb_conv",),
    "rgb_conv_stem": ("rgb_conv", "rgb_conv_stem", *_SHARED),
    "rgb_conv_head": ("rgb_conv", "rgb_conv_head", *_SHARED),
    "instance_norm": ("instance_norm",),
    "image_io": ("image_io",),
}
FROZEN = ("conv_bn_relu", "subpixel_conv_bn_relu", "rgb_conv_stem", "rgb_conv_head", "instance_norm", "image_io")
OPERATIONS = tuple(_NAMES)


def title_of(operation: str) -> str:
    """An operation's name in tables."""
    return _TITLES.get(operation, operation)


def sources_of(operation: str) -> Iterator[Path]:
    """An operation's own source files."""
    for folder in _FOLDERS:
        for name in _NAMES[operation]:
            yield from (path for path in (ROOT / folder).glob(f"{name}.*") if path.is_file())


# ---- END -------------------------------------------------------------------------------------------------------------


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
    "training": Benchmark("Network", (*_LOSSES, *_SUBPIXEL, *_RGB), ("fastperc/losses", *_NETWORKS)),
    "vgg_loss": Benchmark(title_of("vgg_loss"), _LOSSES, ("fastperc/losses", *_NETWORKS)),
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
