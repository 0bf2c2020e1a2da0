"""VGG-16 as a fixed loss network."""

from __future__ import annotations

import os
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from fastperc import ops
from fastperc.errors import InputError
from fastperc.files import read_tensors, write_tensors
from fastperc.models.image_range import check_range
from fastperc.models.vgg_weights import PREPROCESSING, indices, names, vgg_weights
from fastperc.modules.norms import WideStatistics
from fastperc.types import FrozenConv

# Convolutions of each stage; a 2×2 max pooling stands between stages.
STAGES = ((3, 64, 64), (64, 128, 128), (128, 256, 256, 256), (256, 512, 512, 512), (512, 512, 512, 512))
# (name, in, out) of every convolution, in order: ("1_1", 3, 64), ("1_2", 64, 64), …
CONVOLUTIONS = tuple(
    (f"{stage}_{i}", c_in, c_out)
    for stage, channels in enumerate(STAGES, start=1)
    for i, (c_in, c_out) in enumerate(pairwise(channels), start=1)
)
LAYERS = tuple(f"relu{name}" for name, _, _ in CONVOLUTIONS)
TORCHVISION_INDEX = dict(zip(names("VGG-16"), indices("VGG-16", batch_norm=False)))
TORCHVISION_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"


class VGG16Features(WideStatistics):
    """The activations of a pretrained VGG-16: RGB in 0–1 [N, 3, H, W] → a dict from layer name to [N, C, H', W'].

    The network ends at the deepest layer asked for, and its weights never require gradients; gradients flow to the
    image. ``relu1_2``, ``relu2_2``, ``relu3_3`` and ``relu4_3`` are the paper's.

    Args:
        weights_path: ``.npz``, ``.pth`` or ``.safetensors`` with the names ``conv1_1.weight`` … (Caffe's) or
            ``features.0.weight`` … (torchvision's), with any prefix, or ``0.weight`` … (the features alone).
            ``None`` fetches torchvision's weights through ``torch.hub``, once (a download of 528 MB, of which 59 are
            kept).
        layers: names among ``relu1_1`` … ``relu5_3``; one name, or several in any collection.
        preprocessing: ``"caffe"`` (BGR, 0–255 minus the mean), ``"caffe-rgb"`` (the same in RGB) or
            ``"torchvision"``. Default: by the first convolution, which tells the published weights apart; for others
            by their names, ``conv1_1.weight`` for Caffe's and ``features.0.weight`` for torchvision's.

    Raises:
        ValueError: an unknown layer or preprocessing.
        InputError: the file is missing, unreadable, lacks a layer or holds another network, such as VGG-19; no weights
            given and none can be fetched.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        weights_path: str | os.PathLike[str] | None = None,
        layers: Iterable[str] = ("relu1_2", "relu2_2", "relu3_3", "relu4_3"),
        *,
        preprocessing: str | None = None,
    ) -> None:
        super().__init__()
        self.layers = layer_names(layers)
        unknown = [layer for layer in self.layers if layer not in LAYERS]
        if unknown or not self.layers:
            raise ValueError(
                f"no such VGG-16 layer: {', '.join(unknown) or '(none given)'}; there are {', '.join(LAYERS)}"
            )
        if preprocessing not in (None, *PREPROCESSING):
            raise ValueError(f"preprocessing must be one of {', '.join(PREPROCESSING)}, got {preprocessing!r}")
        depth = 1 + max(LAYERS.index(layer) for layer in self.layers)

        if weights_path is None:
            source, tensors = "torchvision's vgg16", fetch_torchvision_weights()
        else:
            source, (tensors, _) = str(weights_path), read_tensors(weights_path)
        convolutions, expected = vgg_weights(tensors, source)
        preprocessing = preprocessing or expected
        self.convs = nn.ModuleDict()
        for name, c_in, c_out in CONVOLUTIONS[:depth]:
            weight, bias = convolutions.get(name, (None, None))
            if weight is None or bias is None:
                deeper = [layer for layer in self.layers if LAYERS.index(layer) >= LAYERS.index(f"relu{name}")]
                raise InputError(
                    f"{source} has no conv{name}, so it cannot give {', '.join(deeper)}: leave those layers out, "
                    f"or use weights that reach them"
                )
            check_convolution(f"{source}: conv{name}", weight, bias, c_in, c_out)
            if name == "1_1" and preprocessing == "caffe":
                weight = weight.flip(1)  # BGR to RGB
            conv = nn.Conv2d(c_in, c_out, 3, padding=1)
            conv.weight.data.copy_(weight)
            conv.bias.data.copy_(bias)  # type: ignore[union-attr]
            self.convs[name] = conv

        mean, std = PREPROCESSING[preprocessing]
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))
        self.requires_grad_(False)

    def forward(self, x: Tensor, layers: Iterable[str] | None = None) -> dict[str, Tensor]:
        """The activations of ``layers`` (default: all those built), computing no deeper than they ask."""
        wanted = self.layers if layers is None else layer_names(layers)
        if not set(wanted) <= set(self.layers):
            raise ValueError(f"layers built are {', '.join(self.layers)}, asked for {', '.join(sorted(wanted))}")
        if x.dim() != 4 or x.shape[1] != 3:
            raise ValueError(f"expected RGB images [N, 3, H, W], got shape {list(x.shape)}")
        check_range("the loss network's input", x)
        taps = {LAYERS.index(layer) for layer in wanted}
        features = ops.vgg_features(self.normalized(x), self.frozen(), taps)
        return {LAYERS[i]: activation for i, activation in features.items()}

    def normalized(self, x: Tensor) -> Tensor:
        """``x``, RGB in 0–1, as the first convolution expects it, in the wider dtype of ``x`` and the weights."""
        dtype = torch.promote_types(x.dtype, self.convs["1_1"].weight.dtype)  # type: ignore[arg-type]
        return ((x - self.mean) / self.std).to(dtype)

    def frozen(self) -> list[FrozenConv]:
        """The convolutions, by their indices in ``LAYERS``, as :func:`fastperc.ops.vgg_loss` takes them."""
        return [
            FrozenConv(conv.weight, conv.bias, pooled=name.endswith("_1") and name != "1_1")  # type: ignore[arg-type]
            for name, conv in self.convs.items()
        ]


def layer_names(layers: Iterable[str]) -> tuple[str, ...]:
    """The names in ``layers``, each once: one name, a collection, or a dict by name.

    Raises:
        ValueError: something that is no name.
    """
    names = (layers,) if isinstance(layers, str) else tuple(layers)
    if wrong := [name for name in names if not isinstance(name, str)]:
        raise ValueError(f"layers are names such as 'relu2_2' (a dict has them as keys), got {wrong[0]!r}")
    return tuple(dict.fromkeys(names))


def check_convolution(name: str, weight: Tensor, bias: Tensor, c_in: int, c_out: int) -> None:
    """Raises an ``InputError`` unless these are finite tensors of a 3×3 convolution; ``name`` is what it calls them."""
    if weight.shape != (c_out, c_in, 3, 3) or bias.shape != (c_out,):
        raise InputError(
            f"{name} has weight {list(weight.shape)} and bias {list(bias.shape)}, "
            f"VGG-16's are {[c_out, c_in, 3, 3]} and {[c_out]}"
        )
    if not weight.isfinite().all() or not bias.isfinite().all():
        raise InputError(f"{name} has values that are not finite")


def fetch_torchvision_weights() -> dict[str, Tensor]:
    """The convolutions of torchvision's published VGG-16, downloaded on first use.

    ``torch.hub``'s cache keeps them (59 MB) without the classifier they come with (470 MB).
    """
    cache = Path(torch.hub.get_dir(), "checkpoints", "vgg16_features-397923af.safetensors")
    if not cache.exists():
        try:
            cache.parent.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(dir=cache.parent) as folder:
                tensors = torch.hub.load_state_dict_from_url(
                    TORCHVISION_URL, folder, map_location="cpu", check_hash=True, weights_only=True
                )
            features = {name: tensor for name, tensor in tensors.items() if name.startswith("features.")}
            write_tensors(cache, features, {"source": TORCHVISION_URL})
        except OSError as error:  # no network, a time-out, a full disk
            raise InputError(
                f"VGG-16's weights could not be fetched ({error}): download {TORCHVISION_URL} where there is a "
                f"network and pass the file (--vgg FILE, or weights_path)"
            ) from None
    return read_tensors(cache)[0]
