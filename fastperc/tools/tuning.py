"""Timing the backends of each operation on a device, at the shapes that training has: ``fastperc tune``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise, product
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastperc import backends, ops
from fastperc.backends import BACKENDS, use_backend
from fastperc.dispatch import Key, Milliseconds
from fastperc.errors import InputError
from fastperc.modules import ConvBNReLU, ResidualBlock, SubpixelConvBNReLU
from fastperc.types import FrozenConv, InstanceNorm, Window

SMALLEST = 16  # pixels a side: what the networks take
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}
ROUNDS, FEWEST_ROUNDS = 9, 3
SECONDS_A_ROUND = 0.005  # at least, of as many calls as that takes
SECONDS_A_CASE = 1.0  # after which no more than the fewest rounds are run

Shapes = tuple[tuple[int, ...], ...]


class Operation(NamedTuple):
    """What to time of an operation."""

    calls: Callable[[int, int], Sequence[Shapes]]
    """From batch and side of the image: for each call in a training step, the shapes of the tensors that the operation
    hands to ``backends.choose``."""
    prepare: Callable[..., Callable[[], Tensor]]
    """From those tensors: the call to be timed."""
    frozen: bool = False
    """Whether frozen networks alone run it: without a gradient."""
    backends: Sequence[str] = BACKENDS
    """What it chooses between."""


def vgg_features(batch: int, size: int) -> Shapes:
    """The shapes of VGG-16's relu1_2, relu2_2, relu3_3 and relu4_3."""
    return tuple((batch, channels, size >> i, size >> i) for i, channels in enumerate((64, 128, 256, 512)))


def prepare_gram_loss(*features: Tensor) -> Callable[[], Tensor]:
    targets = [x.new_zeros(1, x.shape[1], x.shape[1], dtype=torch.float32) for x in features]
    return lambda: ops.gram_loss(features, targets)


def prepare_vgg_loss(images: Tensor) -> Callable[[], Tensor]:
    """VGG-16's convolutions up to relu2_2: from there on the backends do alike."""
    convs = [
        FrozenConv(
            images.new_empty(c_out, c_in, 3, 3).normal_(std=(2 / (9 * c_in)) ** 0.5), images.new_zeros(c_out), i == 2
        )
        for i, (c_in, c_out) in enumerate(pairwise((3, 64, 64, 128, 128)))
    ]
    grams = {i: images.new_zeros(1, c, c, dtype=torch.float32) for i, c in ((1, 64), (3, 128))}
    content = images.detach().flip(3)

    def call() -> Tensor:
        terms = ops.vgg_loss(images, content, convs, 3, grams)
        return terms.content + terms.style.sum()

    return call


def convolution_shapes(batch: int, size: int) -> list[Shapes]:
    """Input and weight of the style network's convolutions between its ends."""
    half, quarter = size // 2, size // 4
    return [
        ((batch, 32, size, size), (64, 32, 3, 3)),
        ((batch, 64, half, half), (128, 64, 3, 3)),
        ((batch, 128, quarter, quarter), (128, 128, 3, 3)),
    ]


def prepare_conv_bn_relu(x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    stride, bias = 1 if weight.shape[0] == weight.shape[1] else 2, weight.new_zeros(weight.shape[0])
    return lambda: ops.conv_bn_relu(x, weight, bias, stride, (1, 1, 1, 1))


def upsampling_shapes(batch: int, size: int) -> list[Shapes]:
    """Input and weight of its ½-stride convolutions."""
    half, quarter = size // 2, size // 4
    return [((batch, 128, quarter, quarter), (128, 64, 3, 3)), ((batch, 64, half, half), (64, 32, 3, 3))]


def prepare_rgb_conv_stem(image: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    window, bias = Window(0, 0, *image.shape[2:]), weight.new_zeros(weight.shape[0])
    return lambda: ops.rgb_conv_stem(image, weight, bias, window, 2, -1, (4, 4, 4, 4), dtype=weight.dtype)


def prepare_rgb_conv_head(x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    out, bias = x.new_empty(len(x), 3, *x.shape[2:]), weight.new_zeros(3)

    def call() -> Tensor:
        ops.rgb_conv_head(x, weight, bias, (4, 4, 4, 4), "zeros", "tanh", out)
        return out

    return call


def prepare_conv_chain(x: Tensor) -> Callable[[], Tensor]:
    """The kind of layer of the style network that takes so many channels."""
    layer: nn.Module = {
        3: lambda: ConvBNReLU(3, 32, 9, padding=4),
        32: lambda: ConvBNReLU(32, 64, 3, 2, 1),
        64: lambda: SubpixelConvBNReLU(64, 32),
        128: lambda: ResidualBlock(128),
    }[x.shape[1]]()
    layer.to(x.device, x.dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return lambda: layer(x)


def prepare_instance_norm(x: Tensor) -> Callable[[], Tensor]:
    norm = InstanceNorm(x.new_ones(x.shape[1]), x.new_zeros(x.shape[1]), 1e-5)
    return lambda: ops.instance_norm(x, norm, relu=True)


def prepare_image_io(image: Tensor) -> Callable[[], Tensor]:
    window = Window(0, 0, *image.shape[2:])
    return lambda: ops.image_io(image, window, 2, -1, image.dtype)


OPERATIONS = {
    "tv_loss": Operation(lambda batch, size: [((batch, 3, size, size),)], lambda x: lambda: ops.tv_loss(x)),
    "gram_loss": Operation(lambda batch, size: [vgg_features(batch, size)], prepare_gram_loss),
    "vgg_loss": Operation(lambda batch, size: [((batch, 3, size, size),)], prepare_vgg_loss),
    "conv_bn_relu": Operation(convolution_shapes, prepare_conv_bn_relu, frozen=True),
    "subpixel_conv_bn_relu": Operation(
        upsampling_shapes,
        lambda x, weight: lambda: ops.subpixel_conv_bn_relu(x, weight, weight.new_zeros(weight.shape[1])),
        frozen=True,
    ),
    "conv_chain": Operation(
        lambda batch, size: [((batch, c, size // s, size // s),) for c, s in ((3, 1), (32, 1), (64, 2), (128, 4))],
        prepare_conv_chain,
        backends=("reference", "triton"),
    ),
    "conv3x3": Operation(
        lambda batch, size: [((batch, 128, size // 4, size // 4), (128, 128, 3, 3))],
        lambda x, weight: lambda: ops.conv3x3(x, weight, weight.new_zeros(weight.shape[0])),
    ),
    "rgb_conv": Operation(
        lambda batch, size: [((batch, 32, size, size), (3, 32, 9, 9))],
        lambda x, weight: lambda: ops.rgb_conv(x, weight, weight.new_zeros(3), 4),
    ),
    "rgb_conv_stem": Operation(
        lambda batch, size: [((batch, 3, size, size), (32, 3, 9, 9))], prepare_rgb_conv_stem, frozen=True
    ),
    "rgb_conv_head": Operation(
        lambda batch, size: [((batch, 32, size, size), (3, 32, 9, 9))], prepare_rgb_conv_head, frozen=True
    ),
    "instance_norm": Operation(
        lambda batch, size: [((batch, c, size // s, size // s),) for c, s in ((32, 1), (64, 2), (128, 4))],
        prepare_instance_norm,
        frozen=True,
    ),
    "image_io": Operation(lambda batch, size: [((batch, 3, size, size),)], prepare_image_io, frozen=True),
}


def tune(device: torch.device, keys: Iterable[Key]) -> dict[Key, Milliseconds]:
    """The milliseconds of a call on ``device``, by backend, for each of ``keys`` as :func:`cases` gives them.

    Where plain PyTorch alone can serve there is nothing to choose, and nothing is timed.
    """
    times = {key: measure(key, device) for key in keys}
    return {key: by_backend for key, by_backend in times.items() if by_backend}


def cases(batch: int, size: int) -> Iterator[Key]:
    """Everything to be timed: each operation, dtype and layout, with its gradient and without.

    Args:
        batch: images.
        size: their height and width in pixels, from 16 up.

    Raises:
        InputError: the images are too small.
    """
    if size < SMALLEST:
        raise InputError(f"--size must be at least {SMALLEST}, got {size}")
    for name, operation in OPERATIONS.items():
        grads = (False,) if operation.frozen else (True, False)
        for shapes, dtype, layout, grad in product(operation.calls(batch, size), DTYPES, LAYOUTS, grads):
            yield Key(name, dtype, layout, grad, shapes)


def tensors_of(key: Key, device: torch.device) -> list[Tensor]:
    """Random tensors as ``key`` has them."""
    tensors = [torch.rand(shape, device=device).to(DTYPES[key.dtype]) for shape in key.shapes]
    return [x.contiguous(memory_format=LAYOUTS[key.layout]).requires_grad_(key.grad) for x in tensors]


def measure(key: Key, device: torch.device) -> Milliseconds:
    """The median over rounds of a call's milliseconds, for each backend that can serve; nothing if plain PyTorch alone
    can.

    The backends take turns, in an order that alternates, so that a machine that slows down slows all of them.
    """
    tensors = tensors_of(key, device)
    operation = OPERATIONS[key.operation]
    run = operation.prepare(*tensors)

    def call() -> None:
        out = run()
        if key.grad:
            torch.autograd.grad(out, tensors, torch.full_like(out, 0.5))

    calls: dict[str, int] = {}  # of a round, by backend
    for backend in reversed(operation.backends):  # plain PyTorch last: it can always serve
        if backend == "triton" and backends.interpreted():
            continue
        if backend == "reference" and not calls:
            return {}
        try:
            _seconds(call, backend, device, 1)  # compiles, and fills caches
        except backends.CannotServe:
            continue
        calls[backend] = max(1, round(SECONDS_A_ROUND / _seconds(call, backend, device, 1)))
    rounds: dict[str, list[float]] = {backend: [] for backend in calls}
    began = time.perf_counter()
    for i in range(ROUNDS):
        if i >= FEWEST_ROUNDS and time.perf_counter() - began > SECONDS_A_CASE:
            break
        for backend in list(calls)[:: -1 if i % 2 else 1]:
            rounds[backend].append(_seconds(call, backend, device, calls[backend]))
    return {backend: 1000 * median(seconds) for backend, seconds in rounds.items()}


def _seconds(call: Callable[[], None], backend: str, device: torch.device, calls: int) -> float:
    with use_backend(backend):
        return seconds(call, device, calls)


def seconds(call: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """Seconds a call, of ``calls`` in a row."""
    synchronize = torch.get_device_module(device).synchronize
    synchronize()
    began = time.perf_counter()
    for _ in range(calls):
        call()
    synchronize()
    return (time.perf_counter() - began) / calls


def report(times: Mapping[Key, Milliseconds]) -> str:
    """A line for each measurement, in milliseconds."""
    lines = [
        f"{'operation':<23}{'dtype':<10}{'layout':<8}{'pass':<9}{'shape':<22}"
        + "".join(f"{backend:>11}" for backend in BACKENDS)
        + "  fastest"
    ]
    for key, by_backend in sorted(times.items()):
        shape = "x".join(map(str, key.shapes[0])) + (f" +{len(key.shapes) - 1}" if len(key.shapes) > 1 else "")
        columns = [f"{by_backend[backend]:11.4g}" if backend in by_backend else f"{'-':>11}" for backend in BACKENDS]
        fastest = min(by_backend, key=by_backend.__getitem__)
        lines.append(
            f"{key.operation:<23}{key.dtype:<10}{key.layout:<8}{'fwd+bwd' if key.grad else 'fwd':<9}{shape:<22}"
            + "".join(columns)
            + f"  {fastest}"
        )
    return "\n".join(lines)
