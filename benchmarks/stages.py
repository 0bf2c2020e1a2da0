"""The stages of the lab, in their order, and how each is cut short for a rehearsal on a CPU."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec

import operations
from operations import ROOT

PYTEST = ("-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider")
BENCHMARK = ("--benchmark-only", "--benchmark-columns=median,iqr,rounds")
NO_TEST_SELECTED = 5  # pytest's exit status
GPU_TESTS = "cuda or cudnn or triton or graphs"  # in the names of tests that need a GPU
# A few tests, for tools that slow them a hundredfold; the engine's tests cover the head.
KERNEL_TESTS = "on_triton or (cuda and (layout or exact or mask or pool or (formula and bf16 and not head)))"
TEST_PROCESSES = 6  # at once on a GPU, where pytest-xdist is installed

# The families of providers, each in a process of its own: a capture that fails may leave a process unusable. The first
# is the only one on a CPU.
FAMILIES = (
    "not (graph or cudnn or compile or autotune)",
    "fused-graph",
    "(graph or cudnn) and not fused-graph",
)
COMPILED = "compile or autotune"  # providers that compile for minutes before they run


@dataclass(frozen=True)
class Stage:
    """A step of the lab: Python command lines, each in a process of its own."""

    name: str
    limit: float  # seconds, after which it is cut off
    description: str
    commands: Sequence[Sequence[str]]  # arguments of Python; "{rows}" becomes the file of rows. On a CPU the first runs
    prefix: Sequence[str] = ()  # a program that runs Python, with its options
    environment: dict[str, str] = field(default_factory=dict)
    gpu: bool = False  # whether it needs one
    rehearsal: Sequence[str] = ()  # arguments that cut it short
    allowed: tuple[int, ...] = (0,)  # exit statuses that count as success


KERNELS = ("pointwise_conv", "depthwise_conv", "stem_conv")  # of frozen convolutions, with tests of their own
FROZEN = (*operations.tests(frozen=True), *KERNELS, "replay", "engine", "cudnn", "graphs")
TRAINING = (*operations.tests(frozen=False), "loss_terms", "step")
LAYERS = ("rgb_conv", "subpixel_conv_bn_relu", "conv_bn_relu", "residual_block")
LOSSES = ("tv_loss", "gram_loss", "vgg_loss", "lpips", "training")


def bench(
    name: str, limit: float, description: str, benchmarks: Sequence[str] = (), families: Sequence[str] = FAMILIES
) -> Stage:
    """Runs the benchmark ``name``, or ``benchmarks``, once for each of the ``families`` of providers."""
    files = [str(ROOT / "benchmarks" / f"bench_{benchmark}.py") for benchmark in benchmarks or (name,)]
    arguments = (*PYTEST, *files, *BENCHMARK, "--rows={rows}")
    return Stage(
        name,
        limit,
        description,
        [(*arguments, "-k", family) for family in families],
        rehearsal=("--tiny", "--seconds=0.01"),
        allowed=(0, NO_TEST_SELECTED),
    )


def tests(
    name: str,
    limit: float,
    description: str,
    tested: Sequence[str],
    selection: str = GPU_TESTS,
    prefix: Sequence[str] = (),
) -> Stage:
    """Runs ``tests/test_<tested>.py`` where there is such a file, by several processes where pytest can do that."""
    # Memory checkers see what PyTorch's allocator does only if it caches nothing.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if prefix else {}
    files = [ROOT / "tests" / f"test_{test}.py" for test in tested]
    processes = min(TEST_PROCESSES, os.cpu_count() or 1)
    parallel = ("-n", str(processes)) if find_spec("xdist") and not prefix else ()
    command = (*PYTEST, *parallel, *(str(file) for file in files if file.exists()), "-k", selection)
    allowed = (0, NO_TEST_SELECTED)
    return Stage(name, limit, description, [command], prefix, environment, gpu=True, allowed=allowed)


def sanitizer(tool: str) -> Stage:
    """Runs a few kernel tests under a tool of compute-sanitizer."""
    prefix = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--print-limit", "20")
    description = f"compute-sanitizer's {tool} over a few kernel tests"
    return tests(tool, 240, description, (*FROZEN, *TRAINING), KERNEL_TESTS, prefix)


def script(name: str, limit: float, description: str, rehearsal: Sequence[str], gpu: bool = True) -> Stage:
    """Runs ``benchmarks/<name>.py``."""
    command = (str(ROOT / "benchmarks" / f"{name}.py"),)
    return Stage(name, limit, description, [command], gpu=gpu, rehearsal=rehearsal)


TUNE = ("-m", "fastperc", "tune")
FIRST = (
    script("smoke", 60, "each part once: kernels, CUDA graphs, training, pictures, video", ["--tiny"]),
    tests("tests_inference", 120, "tests on the GPU: the engine and its kernels", FROZEN),
    tests("tests_training", 120, "tests on the GPU: operations of training, and the step", TRAINING),
    bench("inference", 150, "whole networks in eval mode, 4K and video"),
    bench("training", 120, "a training step"),
    bench("rgb_conv", 60, "the 9×9 convolutions"),
    bench("subpixel_conv_bn_relu", 60, "the ½-stride convolutions"),
    bench("conv_bn_relu", 60, "the stride-2 convolutions"),
    bench("residual_block", 60, "the residual block"),
    Stage("tune", 180, "fastperc tune: the backends of each operation", [TUNE], rehearsal=["--size=16", "--batch=1"]),
    bench("tv_loss", 45, "total variation"),
    bench("gram_loss", 45, "Gram loss"),
    bench("vgg_loss", 90, "the whole loss network, and its memory"),
    bench("lpips", 90, "LPIPS, and its memory"),
    script("training_speed", 90, "fastperc train with photos and checkpoints", ["--iterations=4", "--size=32"]),
    bench("norm_relu", 30, "norms and the ReLU after them in training"),
    bench("conv3x3", 30, "3×3 convolutions in training"),
)
COMPILED_LAST = (
    bench("inference_compiled", 400, "whole networks by torch.compile and max-autotune", ("inference",), (COMPILED,)),
    bench("losses_compiled", 300, "losses and a training step by torch.compile", LOSSES, (COMPILED,)),
    bench("layers_compiled", 600, "layers by torch.compile and max-autotune", LAYERS, (COMPILED,)),
)
FILES = sorted(file.stem.removeprefix("bench_") for file in (ROOT / "benchmarks").glob("bench_*.py"))
OTHERS = [name for name in FILES if name not in {stage.name for stage in FIRST}]
STAGES = (*FIRST, *(bench(name, 60, operations.benchmark(name).title) for name in OTHERS), *COMPILED_LAST)
SANITIZERS = (sanitizer("memcheck"), sanitizer("racecheck"))
