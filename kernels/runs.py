"""The table of runs whose launches ``fastperc.kernels.aot`` compiles: networks, image sizes and dtypes.

A convolution of few pixels takes smaller tiles, and a picture with odd sides has strides of its own: so networks run at
several sizes. Runs that launch nothing new are left out, except one of each published network.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from fastperc.kernels.launches import Launch, recording

if TYPE_CHECKING:
    from fastperc.models import VGG16Features

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SHORT = {BF16: "bf16", FP16: "fp16", FP32: "fp32", torch.uint8: "u8"}
STYLE_LAYERS = ("relu1_2", "relu2_2", "relu3_3", "relu4_3")


class Run(NamedTuple):
    """Something that launches kernels."""

    name: str
    start: Callable[[], object]


def recorded(arch: int, table: list[Run]) -> dict[str, Launch]:
    """What the runs of ``table`` launch on a GPU of architecture ``arch``, by key."""
    with recording(arch) as launches:
        for run in table:
            torch.manual_seed(0)
            run.start()
    return launches


def runs() -> list[Run]:
    """The table."""
    return [*_frozen(), *_training(), *_operations()]


def _transform(**changes: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from fastperc import TransformNet

        return TransformNet(**changes)

    return build


def _super_resolution(scale: int) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from fastperc import SuperResolutionNet

        return SuperResolutionNet(scale)

    return build


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "paper": _transform(preset="paper"),
    "eccv16": _transform(preset="eccv16"),
    "instance": _transform(preset="instance"),
    "examples": _transform(preset="examples"),
    "paper, width 16": _transform(preset="paper", width=16),
    "paper, reflect": _transform(preset="paper", padding="reflect"),
    "paper, nearest": _transform(preset="paper", upsample="nearest"),
    "paper, nearest, instance norm": _transform(preset="paper", upsample="nearest", norm="instance"),
    "super-resolution x4": _super_resolution(4),
    "super-resolution x8": _super_resolution(8),
}


def network(name: str) -> nn.Module:
    """A network of the table, with random weights."""
    return NETWORKS[name]()


# Frozen networks


def _frozen() -> Iterator[Run]:
    """Engines, painting from 8-bit images unless it says otherwise."""
    small, medium, large, odd = (256, 256), (512, 512), (1080, 1920), (333, 501)
    for size in (small, medium, large, odd):
        yield paint("paper", size)
        yield paint("examples", size)
    for size in (small, medium, odd):
        yield paint("instance", size)
    yield paint("eccv16", medium)
    for name in ("paper, width 16", "paper, nearest", "paper, nearest, instance norm"):
        for size in (small, large):
            yield paint(name, size)
    yield paint("paper, reflect", large)
    for size in ((72, 72), (270, 480)):
        yield paint("super-resolution x4", size)
    yield paint("super-resolution x8", (270, 480))
    for name in ("paper", "super-resolution x4"):
        yield paint(name, medium, image=FP32)
    yield paint("instance", medium, tile=256)
    yield paint("paper", large, FP16)
    yield paint("paper", small, FP32)
    yield paint("paper, nearest, instance norm", small, FP32)


def paint(
    name: str,
    size: tuple[int, int],
    dtype: torch.dtype = BF16,
    image: torch.dtype = torch.uint8,
    tile: int | str = "auto",
) -> Run:
    """A picture by the frozen network ``name``, for an ``image`` of that dtype."""

    def start() -> None:
        from fastperc import freeze

        engine = freeze(network(name).eval(), dtype)
        with torch.inference_mode(), _products_in(dtype):
            engine(torch.zeros(1, 3, *size, dtype=image), tile)

    return Run(f"{name}, {size[1]}x{size[0]}, {SHORT[dtype]}, image {SHORT[image]}, tile {tile}", start)


def _products_in(dtype: torch.dtype) -> Any:
    """Products in float32 are left to a library, unless the backend is asked for."""
    from fastperc import use_backend

    return use_backend("triton") if dtype == FP32 else nullcontext()


# Training


def _training() -> Iterator[Run]:
    """Networks in training, on photos of 256² or, for super-resolution, 288²."""
    for name in ("paper", "instance", "examples"):
        yield step(name, 4)
    yield gradients("paper, width 16", 4)
    yield gradients("paper, nearest, instance norm", 4)
    yield gradients("super-resolution x4", 4, 72)
    yield gradients("super-resolution x8", 4, 36)
    yield gradients("paper", 4, dtype=FP32)
    yield gradients("paper", 4, image_wants_gradient=True)


def step(name: str, batch: int) -> Run:
    """An iteration of style training, with autocast to bfloat16."""

    def start() -> None:
        from fastperc.training.step import train_step

        net = network(name).train()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
        photos = torch.zeros(batch, 3, 256, 256).contiguous(memory_format=torch.channels_last)
        train_step(net, _perceptual_loss(), optimizer, photos, photos, amp=True)

    return Run(f"training step of {name}, batch {batch}", start)


def gradients(
    name: str,
    batch: int,
    size: int = 256,
    dtype: torch.dtype = BF16,
    image_wants_gradient: bool = False,
) -> Run:
    """The network ``name`` in training, forward and back."""

    def start() -> None:
        net = network(name).train()
        photos = torch.zeros(batch, 3, size, size, requires_grad=image_wants_gradient)
        with torch.autocast("cuda", dtype, enabled=dtype != FP32), _products_in(dtype):
            picture = net(photos)
        picture.sum().backward()

    to = "weights and image" if image_wants_gradient else "weights"
    return Run(f"gradients of {name} to {to}, batch {batch}, {size}x{size}, {SHORT[dtype]}", start)


def _without_momentum(net: nn.Module) -> None:
    """The running statistics become means over all batches."""
    for module in net.train().modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None


@cache
def _loss_features() -> VGG16Features:
    """The paper's loss network; its weights are zero."""
    from safetensors.torch import save_file

    from fastperc.models.vgg import CONVOLUTIONS, VGG16Features

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "vgg16.safetensors")
        weights = {f"conv{name}.weight": torch.zeros(o, i, 3, 3) for name, i, o in CONVOLUTIONS}
        biases = {f"conv{name}.bias": torch.zeros(o) for name, _, o in CONVOLUTIONS}
        save_file(weights | biases, file)
        return VGG16Features(file, STYLE_LAYERS)


def _perceptual_loss(style: bool = True) -> nn.Module:
    from fastperc.losses import PerceptualLoss

    return PerceptualLoss(_loss_features(), torch.zeros(1, 3, 64, 64) if style else None)


# What the networks above do not launch


def _operations() -> Iterator[Run]:
    """Calls of single operations and modules."""
    for dtype in (BF16, FP16):
        for memory_format in (torch.channels_last, torch.contiguous_format):
            yield gram(dtype, memory_format)
            yield lpips(dtype, memory_format)
    yield lpips(FP32, torch.channels_last)
    yield lpips(FP32, torch.contiguous_format)
    for dtype in (BF16, FP16, FP32):
        yield lpips_network(dtype, both_sides=False)
    yield lpips_network(BF16, both_sides=True)
    yield Run("loss network, fp16", lambda: _loss_network(FP16))
    yield Run("loss network, fp32", lambda: _loss_network(FP32))
    yield Run("loss network without style, bf16", lambda: _loss_network(BF16, style=False))
    yield Run("instance norm, bf16", lambda: _instance_norm(BF16))
    yield Run("instance norm, fp32", lambda: _instance_norm(FP32))
    for dtype in (BF16, FP32):
        yield Run(f"other activations, {SHORT[dtype]}", lambda dtype=dtype: _activations(dtype))  # type: ignore[misc]
    for name, change in (("training", nn.Module.train), ("frozen", nn.Module.eval), ("averaged", _without_momentum)):
        yield residual_block(64, name, change)
    yield residual_block(32, "training", nn.Module.train)
    yield Run("statistics of several processes", lambda: _several_processes())


def gram(dtype: torch.dtype, memory_format: torch.memory_format) -> Run:
    """The style loss of the paper's four layers, and its gradient."""

    def start() -> None:
        from fastperc import ops

        shapes = [(4, 64 << i, 256 >> i, 256 >> i) for i in range(4)]
        features = [torch.empty(shape, dtype=dtype, memory_format=memory_format).requires_grad_() for shape in shapes]
        targets = [torch.empty(1, shape[1], shape[1]) for shape in shapes]
        ops.gram_loss(features, targets).sum().backward()

    return Run(f"Gram loss, {SHORT[dtype]}, {'NHWC' if memory_format is torch.channels_last else 'NCHW'}", start)


def lpips(dtype: torch.dtype, memory_format: torch.memory_format) -> Run:
    """LPIPS of VGG-16's features, with gradients of both sides and of one, and without."""

    def start() -> None:
        from fastperc import ops

        channels = (64, 128, 256, 512, 512)
        shapes = [(2, c, 256 >> i, 256 >> i) for i, c in enumerate(channels)]
        weights = [torch.empty(c) for c in channels]
        for wanted in ((True, True), (True, False), (False, False)):
            sides = [
                [torch.empty(s, dtype=dtype, memory_format=memory_format).requires_grad_(want) for s in shapes]
                for want in wanted
            ]
            distance = ops.lpips_distance(sides[0], sides[1], weights).sum()
            if wanted[0]:
                distance.backward()

    return Run(f"LPIPS, {SHORT[dtype]}, {'NHWC' if memory_format is torch.channels_last else 'NCHW'}", start)


def lpips_network(dtype: torch.dtype, both_sides: bool) -> Run:
    """LPIPS of images, with gradients of one side or both."""

    def start() -> None:
        from fastperc import ops
        from fastperc.models.vgg import CONVOLUTIONS
        from fastperc.ops.vgg_lpips import Network
        from fastperc.types import FrozenConv

        taps, channels = (1, 3, 6, 9, 12), (64, 128, 256, 512, 512)
        convs = [
            FrozenConv(torch.zeros(o, i, 3, 3), torch.zeros(o), name.endswith("_1") and name != "1_1")
            for name, i, o in CONVOLUTIONS
        ]
        network = Network(convs, taps, [torch.zeros(c) for c in channels])
        output, target = torch.zeros(4, 3, 256, 256, requires_grad=True), torch.zeros(4, 3, 256, 256)
        with torch.autocast("cuda", dtype, enabled=dtype != FP32):
            terms = ops.vgg_lpips(output, target.requires_grad_(both_sides), network)
            with torch.no_grad():
                ops.vgg_lpips(output, target, network)
        torch.stack(terms).sum().backward()

    return Run(f"LPIPS of images, {SHORT[dtype]}, gradients of {1 + both_sides}", start)


def _loss_network(dtype: torch.dtype, style: bool = True) -> None:
    output, photos = torch.zeros(4, 3, 256, 256, requires_grad=True), torch.zeros(4, 3, 256, 256)
    with torch.autocast("cuda", dtype, enabled=dtype != FP32):
        terms = _perceptual_loss(style)(output, photos)
    terms.total.backward()


def _instance_norm(dtype: torch.dtype) -> None:
    from fastperc import ops
    from fastperc.types import RELU, Epilogue, InstanceNorm

    for channels in (32, 64):
        x = torch.empty(1, channels, 256, 256, dtype=dtype, memory_format=torch.channels_last)
        norm = InstanceNorm(torch.ones(channels), torch.zeros(channels), 1e-5)
        for epilogue in (Epilogue(norm, RELU), Epilogue(norm, None, skip=x)):
            with torch.no_grad():
                ops.instance_norm(x, epilogue)


def _activations(dtype: torch.dtype) -> None:
    """The convolutions and the norm of frozen networks, each with every activation that the table's networks lack."""
    from fastperc import ops
    from fastperc.types import Activation, Epilogue, Geometry, InstanceNorm, Window, same_sides

    size = 256 if dtype == BF16 else 64
    x = torch.empty(1, 128, size, size, dtype=dtype, memory_format=torch.channels_last)
    image, window = torch.empty(1, 3, size, size), Window(0, 0, size, size)
    weight, bias = torch.zeros(128, 128, 3, 3), torch.zeros(128)
    norm = InstanceNorm(torch.ones(128), bias, 1e-5)
    leaky, prelu = Activation("leaky_relu", 0.2), Activation("prelu", slopes=torch.full((128,), 0.25))
    others = [Activation(name) for name in ("relu6", "silu", "sigmoid", "tanh")]
    with torch.no_grad(), _products_in(dtype):
        for activation in (leaky, prelu, *others):
            last = Epilogue(activation=activation)
            ops.conv_bn_relu(x, weight, bias, Geometry(1, same_sides(1)), last._replace(skip=x))
            ops.conv_bn_relu(x, weight, bias, Geometry(2, same_sides(1)), last)
            ops.instance_norm(x, last._replace(norm=norm))
            ops.subpixel_conv_bn_relu(x, weight, bias, "nearest", same_sides(1), last)
            ops.rgb_conv_stem(image, torch.zeros(128, 3, 9, 9), bias, window, (1.0, 0.0), same_sides(4), last, dtype)


def residual_block(size: int, name: str, change: Callable[[nn.Module], object]) -> Run:
    """A residual block of 128 channels by itself, on maps of ``size``²; ``change`` sets how it takes statistics."""

    def start() -> None:
        from fastperc import ResidualBlock

        block = ResidualBlock(128)
        change(block)
        x = torch.empty(4, 128, size, size, requires_grad=True)
        with torch.autocast("cuda", BF16):
            y = block(x)
        y.sum().backward()

    return Run(f"residual block on {size}x{size}, statistics {name}", start)


def _several_processes() -> None:
    """A norm that gives its statistics, and its gradient's sums, for other processes."""
    from fastperc.kernels import norm_coefficients as module

    channels = 128
    partials, weight, bias = torch.empty(1, 64, 3, channels), torch.ones(channels), torch.zeros(channels)
    statistics = torch.empty(1, 3, channels)
    norm = module.norm_coefficients(partials, weight, bias, 1e-5, statistics=statistics)
    module.gradient_coefficients(partials[:, :, :2].contiguous(), weight, norm, False, torch.empty(1, 2, channels))
