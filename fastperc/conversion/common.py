"""What the readers of other people's checkpoints share: what they return, and networks in plain PyTorch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastperc import checkpoints
from fastperc.models import TransformNet
from fastperc.models.common import check_image, cropped, reflect_pad_to_multiple

MAX_BYTES = 1 << 30  # of a file that is read as a whole


class Converted(NamedTuple):
    """A network that was read from somebody's checkpoint."""

    kind: str  # whose network it is
    net: nn.Module  # RGB in 0–1 [N, 3, H, W] → RGB [N, 3, H, W], in eval mode
    dtype: torch.dtype  # of the weights in the file
    note: str = ""  # what the user should know about it
    why_not: str = ""  # why it is no TransformNet, in words that follow "it"


class Refused(Exception):
    """Why a file is not converted, in words that follow its name."""


def shown(text: str | bytes) -> str:
    """A text of a file as a message can show it. Texts that are no UTF-8 are bytes in ONNX."""
    return "".join(letter if letter.isprintable() else "?" for letter in str(text)[:60])


def transform_net(path: Path, tensors: Mapping[str, Tensor], **config: Any) -> TransformNet:
    """A ``TransformNet`` with ``tensors``, in eval mode; ``config`` are its arguments.

    Raises:
        InputError: other names or shapes than the network's, or values that are not finite.
    """
    with torch.device("meta"):  # takes no memory, however wide the file says the network is
        checkpoints.check_shapes(TransformNet(**config), tensors, path)
    net = TransformNet(**config)
    checkpoints.load_weights(net, tensors, path)
    return net.eval()


def described(converted: Converted) -> list[str]:
    """What was found, in lines for the user."""
    modules = [*converted.net.modules()]
    counts = {
        "convolutions": (nn.Conv2d, nn.ConvTranspose2d),
        "instance norms": (nn.InstanceNorm2d,),
        "batch norms": (nn.BatchNorm2d,),
    }
    numbers = {name: sum(isinstance(module, kinds) for module in modules) for name, kinds in counts.items()}
    parts = [f"{number} {name}" for name, number in numbers.items() if number]
    weights = sum(parameter.numel() for parameter in converted.net.parameters())
    dtype = str(converted.dtype).removeprefix("torch.")
    lines = [f"{converted.kind}: {', '.join(parts)}, {weights:,} weights in {dtype}"]
    return lines + [line for line in [converted.note] if line]


class Colors(NamedTuple):
    """What a network sees and gives: ``factor · RGB + offset`` for RGB in 0–1, channel by channel.

    The channels of ``factor`` and ``offset`` are in the network's order.
    """

    factor: Sequence[float]
    offset: Sequence[float]
    bgr: bool = False
    output_offset: Sequence[float] | None = None  # if the output has another offset; its factor is the input's


class PictureNet(nn.Module):
    """A network in plain PyTorch: RGB in 0–1 [N, 3, H, W] → RGB [N, 3, scale·H, scale·W], H and W from 16 up.

    Args:
        layers: the network.
        colors: what it sees and gives.
        multiple: of which it needs the sides of images to be; others are extended by reflection at the right and
            bottom, and the picture is cropped.
        border: pixels that are reflected on each side of the image before the first layer.
        scale: pixels of the picture for one of the image.
    """

    def __init__(self, layers: nn.Sequential, colors: Colors, multiple: int, border: int = 0, scale: int = 1) -> None:
        super().__init__()
        self.layers, self.bgr, self.multiple, self.border, self.scale = layers, colors.bgr, multiple, border, scale
        output_offset = colors.offset if colors.output_offset is None else colors.output_offset
        for name, values in (("factor", colors.factor), ("offset", colors.offset), ("output_offset", output_offset)):
            self.register_buffer(name, torch.tensor([*values], dtype=torch.float32).view(1, 3, 1, 1))
        self.factor: Tensor
        self.offset: Tensor
        self.output_offset: Tensor

    def forward(self, x: Tensor) -> Tensor:
        check_image(x)
        height, width = (self.scale * side for side in x.shape[-2:])
        x = x.flip(1) if self.bgr else x
        x = reflect_pad_to_multiple(x * self.factor + self.offset, self.multiple, self.border)
        y = cropped((self.layers(x) - self.output_offset) / self.factor, height, width)
        return y.flip(1) if self.bgr else y


class Residual(nn.Module):
    """``branch(x) + x``, of which ``trimmed`` pixels are cut from each side."""

    def __init__(self, branch: nn.Module, trimmed: int = 0) -> None:
        super().__init__()
        self.branch, self.trimmed = branch, trimmed

    def forward(self, x: Tensor) -> Tensor:
        t = self.trimmed
        return self.branch(x) + (x[..., t:-t, t:-t] if t else x)


class Multiplied(nn.Module):
    """``factor · x + offset``."""

    def __init__(self, factor: float, offset: float = 0.0) -> None:
        super().__init__()
        self.factor, self.offset = factor, offset

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x + self.offset


class WithoutLast(nn.Module):
    """``x`` without its last row and column."""

    def forward(self, x: Tensor) -> Tensor:
        return x[..., :-1, :-1]


def filled(module: nn.Module, **tensors: Tensor) -> nn.Module:
    """``module`` with ``tensors`` as its parameters and buffers.

    Raises:
        Refused: other shapes than the module's, or values that are not finite.
    """
    state = module.state_dict()
    for name, tensor in tensors.items():
        if tensor.shape != state[name].shape:
            raise Refused(f"has a {name} of {list(tensor.shape)} where {list(state[name].shape)} belongs")
        if not tensor.isfinite().all():
            raise Refused(f"has a {name} with values that are not finite")
        state[name].copy_(tensor)
    return module
