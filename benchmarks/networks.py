"""What several benchmarks share: images, features, layers, and a loss network with random weights of true shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import torch
from costs import Cost, gram_loss
from harness import DTYPE, PRODUCTS, Case
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from fastperc import PerceptualLoss, VGG16Features, VGGFeatures, reference
from fastperc.engine.plan import Plan, parts, steps_of
from fastperc.engine.plan import forward as run_plan
from fastperc.models.vgg_weights import convolutions, indices, names
from fastperc.types import Window

Directions = tuple[str, ...]

INFERENCE: Directions = ("inference",)
BOTH: Directions = (*INFERENCE, "forward+backward")
VGG_LAYERS = ("relu1_2", "relu2_2", "relu3_3", "relu4_3")


def image(n: int, height: int, width: int, requires_grad: bool = False) -> Tensor:
    """A random image, RGB in 0–1."""
    return torch.rand(n, 3, height, width, requires_grad=requires_grad)


def levels(n: int, height: int, width: int) -> Tensor:
    """A random image of levels, uint8."""
    return torch.randint(256, (n, 3, height, width), dtype=torch.uint8)


def features(*shape: int, requires_grad: bool = False) -> Tensor:
    """Random features after a ReLU: half of them are zero."""
    return torch.randn(shape).relu().requires_grad_(requires_grad)


def forward(module: nn.Module, *inputs: Tensor) -> Tensor:
    """The module's result. Under ``use_backend("reference")`` this is every module's reference."""
    return module(*inputs)


def trained(module: nn.Module) -> nn.Module:
    """``module`` with batch norms as after training, so that a mistake in folding them shows."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.bias, std=0.1)
    first = next(layer for layer in module.modules() if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)))
    update_bn([torch.rand(1, first.in_channels, 64, 64)], module)
    return module


class FromLevels(nn.Module):
    """A network's first layer, which takes levels."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, image: Tensor) -> Tensor:
        return self.layer(reference.to_network_range(image.to(next(self.parameters()).dtype) / 255, "tanh"))


class ToLevels(nn.Module):
    """A network's last layer, which gives levels."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return reference.to_levels(reference.to_image_range(self.layer(x), "tanh"))


def frozen(module: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    """A layer as the engine runs it, on inputs like ``x``."""
    in_levels = isinstance(module, (FromLevels, ToLevels))
    layer = module.layer if isinstance(module, (FromLevels, ToLevels)) else module
    unit = 1 if in_levels else 255  # a "linear" network works in levels; a bare convolution does not
    steps = [step.to(x.device, torch.float32) for step in steps_of(layer)]
    first, last = steps[0], steps[-1]
    if first.weight.shape[1] == 3:
        steps[0] = first._replace(end="first", weight=first.weight / unit)
    if last.channels == 3:
        steps[-1] = last._replace(end="last", weight=last.weight * unit, bias=last.bias * unit)
    dtype = next(module.parameters()).dtype
    plan = Plan(tuple(steps), 1, 0, 1, "tanh" if in_levels else "linear", dtype)
    sizes = plan.sizes(*x.shape[2:])
    whole = parts(steps, sizes, Window(0, 0, *sizes[-1]))
    shape = (len(x), 3, *sizes[-1])

    def run(x: Tensor) -> Tensor:
        picture = None
        if last.channels == 3:
            picture_dtype = torch.uint8 if in_levels else dtype
            picture = torch.empty(shape, dtype=picture_dtype, device=x.device, memory_format=torch.channels_last)
        return run_plan(plan, steps, whole, x, picture)

    return run


def layer_cases(
    operation: str,
    shape: str,
    module: Callable[[], nn.Module],
    inputs: Callable[[], tuple[Tensor, ...]],
    directions: Sequence[str] = BOTH,
    rounding: float = 0.0,
    trains: bool = False,
) -> list[Case]:
    """Cases of a network's layer, one for each of ``directions``.

    Args:
        operation, shape, module, inputs: as in :class:`Case`.
        directions: ``"inference"``, ``"forward+backward"`` or both.
        rounding: the least tolerance of the output, where the output itself is rounded.
        trains: whether there is a fused kernel for training.
    """
    output, gradient = {"fp32": (1e-5, 1e-3), "bf16": (1e-2, 0.2)}[DTYPE]
    return [
        Case(
            operation,
            direction,
            shape,
            DTYPE,
            module=module,
            inputs=inputs,
            reference=forward,
            fused=forward if direction == "inference" or trains else None,
            freeze=frozen,
            channels_last=True,
            tolerance=(max(output, rounding), gradient),
        )
        for direction in directions
    ]


def loss(module: PerceptualLoss, output: Tensor, content: Tensor) -> Tensor:
    """The total of a perceptual loss, without its terms."""
    return module(output, content).total


def perceptual_loss(deepest: str, size: int) -> PerceptualLoss:
    """Content at relu2_2, style at ``VGG_LAYERS`` down to ``deepest``, and a random style image of ``size``²."""
    layers = VGG_LAYERS[: VGG_LAYERS.index(deepest) + 1]
    return PerceptualLoss(VGG16Features(vgg_file(), layers), torch.rand(1, 3, size, size), convention="relative")


def layer_loss(layer: str, criterion: str = "l1") -> PerceptualLoss:
    """VGG-19's ``layer`` of output and target, as BasicSR's ``PerceptualLoss`` compares them."""
    features = VGGFeatures("vgg19", vgg_file("VGG-19"), layer)
    return PerceptualLoss(features, content_layers=layer, criterion=criterion, convention="plain")


def style_shapes(deepest: str, n: int, size: int) -> list[tuple[int, ...]]:
    """Shapes of the activations of ``n`` images of ``size``² at ``VGG_LAYERS`` down to ``deepest``."""
    return [(n, 64 << i, size >> i, size >> i) for i in range(VGG_LAYERS.index(deepest) + 1)]


def style_costs(deepest: str, n: int, size: int, dtype: str) -> list[Cost]:
    """The costs of the style terms of :func:`perceptual_loss` on ``n`` images."""
    return [cost for shape in style_shapes(deepest, n, size) for cost in gram_loss(shape, PRODUCTS[dtype].itemsize)]


@cache
def vgg_file(architecture: str = "VGG-16") -> Path:
    """A file of random weights under torchvision's names, scaled so that activations keep their size: of VGG-16 down to
    conv4_3, or of all of VGG-19."""
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    index = dict(zip(names(architecture), indices(architecture, batch_norm=False)))
    for name, c_in, c_out in convolutions(architecture):
        if architecture == "VGG-16" and name > "4_3":
            break
        key = f"features.{index[name]}"
        tensors[f"{key}.weight"] = torch.randn(c_out, c_in, 3, 3, generator=generator) * (2 / (9 * c_in)) ** 0.5
        tensors[f"{key}.bias"] = torch.randn(c_out, generator=generator) * 0.01
    path = Path(mkdtemp(), "vgg.pth")
    torch.save(tensors, path)
    return path
