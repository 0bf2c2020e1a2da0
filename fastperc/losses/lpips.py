"""LPIPS, the learned perceptual distance of Zhang et al. (2018), on VGG-16."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
from torch import Tensor

from fastperc import ops, reference
from fastperc.errors import InputError
from fastperc.losses.lpips_weights import channel_weights as read_channel_weights
from fastperc.models.image_range import check_range
from fastperc.models.vgg import VGG16Features
from fastperc.models.vgg_weights import PREPROCESSING
from fastperc.modules.norms import WideStatistics
from fastperc.ops.vgg_lpips import Network
from fastperc.types import Tap

LAYERS = {"relu1_2": 64, "relu2_2": 128, "relu3_3": 256, "relu4_3": 512, "relu5_3": 512}  # their channels
SMALLEST = 16  # pixels a side: below, nothing is left after four poolings
REDUCTIONS = ("none", "mean", "sum")


class LPIPSTarget(NamedTuple):
    """The features of fixed images, as :meth:`LPIPS.prepare` gives them; the second argument of :class:`LPIPS`."""

    features: tuple[Tensor, ...]  # at each of ``LAYERS``
    size: tuple[int, int]  # height and width of the images


class LPIPS(WideStatistics):
    """``lpips.LPIPS(net="vgg")(in0, in1)``, for training against it: how far two images look apart.

    Both are RGB in −1…1 [N, 3, H, W] with sides of at least 16 pixels; one of them may have one image, which is
    compared with all of the other. Gradients flow to both. Returns float32 (float64 for float64) of shape [N, 1, 1, 1].
    It has no parameters that want gradients.

    Features are divided by their norm + 1e-10, as in ``lpips``; torchmetrics adds 1e-8 to the square of the norm, which
    is the same to six digits where the norm is over 0.1. Features that are all 0 get a gradient of 0, not NaN.

    Args:
        net: ``"vgg"``; there is no other.
        weights: VGG-16's, as :class:`fastperc.VGG16Features` takes them: torchvision's, in a file, or ``None``, which
            fetches them once.
        channel_weights: a file with ``lpips``' names (its ``vgg.pth``, torchmetrics', ``.safetensors``); ``None`` takes
            that of an installed ``lpips`` or ``torchmetrics``.
        normalize: whether images are RGB in 0–1 instead, as in both libraries.
        reduction: ``"none"`` or ``None``: a distance for each image; ``"mean"`` or ``"sum"``: one scalar, as
            torchmetrics has it.
        spatial: whether to return the distance at each pixel instead, [N, 1, H, W]: each layer's upsampled bilinearly.

    Raises:
        ValueError: another net or reduction; on forward, images of another shape or range.
        InputError: a file is missing or holds something else; no channel weights anywhere.
    """

    def __init__(
        self,
        net: str = "vgg",
        weights: str | os.PathLike[str] | None = None,
        channel_weights: str | os.PathLike[str] | None = None,
        normalize: bool = False,
        reduction: str | None = "none",
        spatial: bool = False,
    ) -> None:
        super().__init__()
        if net not in ("vgg", "vgg16"):
            raise ValueError(f"net must be 'vgg', got {net!r}; the package lpips has 'alex' and 'squeeze'")
        if reduction not in (None, *REDUCTIONS):
            raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
        self.normalize, self.reduction, self.spatial = normalize, reduction or "none", spatial
        for i, weight in enumerate(read_channel_weights(channel_weights, LAYERS)):
            self.register_buffer(f"lin{i}", weight)
        self.features = VGG16Features(weights, LAYERS)
        if not torch.allclose(self.features.std.flatten(), torch.tensor(PREPROCESSING["torchvision"][1])):
            raise InputError(f"{weights}: holds Caffe's VGG-16, or names it so; LPIPS is defined on torchvision's")

    def forward(
        self,
        in0: Tensor,
        in1: Tensor | LPIPSTarget,
        retPerLayer: bool = False,
        normalize: bool | None = None,
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """The distance of ``in0`` and ``in1``, an image or what :meth:`prepare` gave.

        ``retPerLayer`` and ``normalize`` are ``lpips``': the first also returns the list of the layers' terms, without
        the reduction; the second overrides the module's own.
        """
        normalize = self.normalize if normalize is None else normalize
        x = self._normalized("LPIPS' first image", in0, normalize)
        target: Tensor | tuple[Tensor, ...]
        if isinstance(in1, LPIPSTarget):
            target, size = in1.features, in1.size
        else:
            size = (in1.shape[2], in1.shape[3]) if in1.dim() == 4 else (0, 0)
            if len(in1) == 1 and len(in0) > 1 and not in1.requires_grad:
                target = self.prepare(in1, normalize).features
            else:
                target = self._normalized("LPIPS' second image", in1, normalize)
        if tuple(in0.shape[2:]) != size:
            raise ValueError(f"LPIPS needs images of one size, got {list(in0.shape[2:])} and {list(size)}")
        terms = ops.vgg_lpips(x, target, self._network(), in0.shape[2:] if self.spatial else None)
        distance = torch.stack(terms).sum(dim=0)
        if self.reduction != "none":
            count = max(distance.numel(), 1) if self.reduction == "mean" else 1  # a batch of no images gives 0
            distance = distance.sum() / count
        return (distance, terms) if retPerLayer else distance

    @torch.no_grad()
    def prepare(self, target: Tensor, normalize: bool | None = None) -> LPIPSTarget:
        """The features of fixed images, [N, 3, H, W] or one that serves all; computed once, for many calls.

        They hold 0.5 GB for 16 images of 256² in float32.
        """
        normalize = self.normalize if normalize is None else normalize
        x = self._normalized("LPIPS' target", target, normalize)
        network = self._network()
        features = ops.vgg_features(x, network.convs, [Tap(i) for i in network.taps])
        return LPIPSTarget(tuple(features[Tap(i)] for i in network.taps), (x.shape[2], x.shape[3]))

    def _normalized(self, name: str, image: Tensor, normalize: bool) -> Tensor:
        """``image`` as VGG-16's first convolution expects it."""
        if image.dim() != 4 or image.shape[1] != 3 or min(image.shape[2:]) < SMALLEST:
            raise ValueError(
                f"{name} must be RGB [N, 3, H, W] with H and W of at least {SMALLEST}, got shape {list(image.shape)}"
            )
        evaluates = not torch.is_grad_enabled()  # a network's output, which wants no gradient then
        check_range(name, image, evaluates, (0.0, 1.0) if normalize else (-1.0, 1.0))
        dtype = torch.promote_types(image.dtype, self.features.convs["1_1"].weight.dtype)  # type: ignore[arg-type]
        image = reference.widen(image)
        return self.features.normalized(image if normalize else (image + 1) / 2).to(dtype)

    def _network(self) -> Network:
        """The convolutions, where LPIPS compares, and its weights there."""
        taps = tuple(i for i, name in enumerate(self.features.convs) if f"relu{name}" in LAYERS)
        return Network(self.features.frozen(), taps, [self.get_buffer(f"lin{i}") for i in range(len(LAYERS))])

    def extra_repr(self) -> str:
        return f"normalize={self.normalize}, reduction={self.reduction!r}, spatial={self.spatial}"
