"""What is exported: a network in plain PyTorch, with its norms folded, for float or uint8 images."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastperc import reference
from fastperc.engine.plan import OWN, Plan, Step, plan_of
from fastperc.models.common import cropped, reflect_pad_to_multiple
from fastperc.presets import MINIMUM_SIDE

INPUTS = ("float", "uint8")


class Images(NamedTuple):
    """The images that an exported network takes."""

    kind: str = "float"  # of INPUTS
    size: tuple[int, int] | None = None  # height and width; None: any
    half: bool = False  # whether the network computes in float16; its images are float32 or uint8 all the same

    def example(self, count: int = 2, height: int = 96, width: int = 100, seed: int = 0) -> Tensor:
        """Random images, ``count`` of them, [N, 3, H, W] float32 or [N, H, W, 3] uint8; of ``size`` if it is fixed."""
        height, width = self.size or (height, width)
        generator = torch.Generator().manual_seed(seed)
        coarse = torch.rand(count, 3, 3 + height // 24, 3 + width // 24, generator=generator)
        smooth = F.interpolate(coarse, (height, width), mode="bilinear", align_corners=True)
        images = (smooth + 0.2 * torch.rand(count, 3, height, width, generator=generator) - 0.1).clamp(0, 1)
        return reference.to_levels(images).permute(0, 2, 3, 1).contiguous() if self.kind == "uint8" else images

    def described(self, scale: int | None = None) -> str:
        """The images in words; with ``scale``, the pictures, which are ``scale`` times as large."""
        times = scale or 1
        names = [f"{times}*{side}" if times > 1 else side for side in ("H", "W")]
        height, width = [str(times * side) for side in self.size] if self.size else names
        levels = self.kind == "uint8"
        shape = f"[N, {height}, {width}, 3]" if levels else f"[N, 3, {height}, {width}]"
        least = "" if self.size or scale else f", H and W from {MINIMUM_SIDE} up"
        return f"{shape} {'uint8, RGB in 0-255' if levels else 'float32, RGB in 0-1'}{least}"


def exportable(net: nn.Module, images: Images) -> nn.Module:
    """``net`` ready to be exported: in eval mode, batch norms folded into the convolutions, for ``images``.

    Args:
        net: one of fastperc's networks, or any other from RGB in 0–1 [N, 3, H, W] to the same, which stays as it is.
        images: what it takes, and in which dtype it computes.
    """
    if isinstance(net, OWN):
        plain: nn.Module = Convolutions(plan_of(net, torch.float32, torch.device("cpu")))
    else:
        plain = copy.deepcopy(net)
    plain = plain.eval().requires_grad_(False)
    if images.half:
        plain = plain.half()
    return Adapted(plain, images)


class Adapted(nn.Module):
    """A network with its dtype and the layout of its images around it; images and pictures are as ``images`` says."""

    def __init__(self, net: nn.Module, images: Images) -> None:
        super().__init__()
        self.net, self.levels, self.dtype = net, images.kind == "uint8", torch.float16 if images.half else torch.float32

    def forward(self, x: Tensor) -> Tensor:
        if self.levels:
            x = x.permute(0, 3, 1, 2).float() / 255
        y = self.net(x.to(self.dtype)).float()
        return reference.to_levels(y).permute(0, 2, 3, 1) if self.levels else y


class Convolutions(nn.Module):
    """A plan in plain PyTorch: RGB in 0–1 [N, 3, H, W] → RGB [N, 3, scale·H, scale·W], not clamped."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.scale, self.border, self.multiple = plan.scale, plan.border, plan.multiple
        self.output = plan.output
        self.steps = [step.name.replace(".", "_") for step in plan.steps]
        for name, step in zip(self.steps, plan.steps):
            self.add_module(name, Convolution(step))

    def forward(self, x: Tensor) -> Tensor:
        height, width = (self.scale * side for side in x.shape[-2:])
        x = reference.to_network_range(x, self.output)
        if self.multiple > 1:
            x = reflect_pad_to_multiple(x, self.multiple, self.border)
        before = x
        for name in self.steps:
            x, before = getattr(self, name)(x, before), x
        if self.multiple > 1:
            x = cropped(x, height, width)
        return reference.to_image_range(x, self.output)


class Convolution(nn.Module):
    """A step in plain PyTorch, under the names ``weight``, ``bias``, ``norm_weight`` and ``norm_bias``."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(step.weight), nn.Parameter(step.bias)
        self.step = step._replace(weight=torch.empty(0), bias=torch.empty(0), norm=None)
        self.trimmed = 2 * (step.kernel // 2 - step.padding)
        self.eps = step.norm.eps if step.norm else None
        if step.norm:
            self.norm_weight, self.norm_bias = nn.Parameter(step.norm.weight), nn.Parameter(step.norm.bias)

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        """[N, C, H, W] → [N, C', H', W']; ``before`` is the input of the step before, which a skip adds."""
        y = self._normalised(self._convolved(x))
        if self.step.skip:
            t = self.trimmed
            y = y + (before[..., t:-t, t:-t] if t else before)
        return y.relu() if self.step.activation else y

    def _convolved(self, x: Tensor) -> Tensor:
        step, p = self.step, self.step.padding
        if step.upsample == "transposed":
            return F.conv_transpose2d(x, self.weight, self.bias, stride=2, padding=1, output_padding=1)
        if step.upsample == "nearest":
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        if p and step.padding_mode != "zeros":
            x, p = F.pad(x, (p, p, p, p), mode=step.padding_mode), 0
        return F.conv2d(x, self.weight, self.bias, step.stride, p)

    def _normalised(self, y: Tensor) -> Tensor:
        """In float32 also in a network of half precision: the sums over a large picture pass float16's range."""
        if self.eps is None:
            return y
        norm = self.norm_weight.float(), self.norm_bias.float()
        return F.instance_norm(y.float(), None, None, *norm, eps=self.eps).to(y.dtype)
