"""VGG-16 and VGG-19 as fixed loss networks."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from fastperc import ops
from fastperc.errors import InputError
from fastperc.files import make_folder, read_tensors, write_tensors
from fastperc.models.image_range import check_range
from fastperc.models.vgg_weights import PREPROCESSING, convolutions, indices, names, vgg_weights
from fastperc.modules.norms import WideStatistics
from fastperc.types import TAP_KINDS, FrozenConv, Tap

ARCHITECTURES = {"vgg16": "VGG-16", "vgg19": "VGG-19"}
TORCHVISION_URLS = {
    "vgg16": "https://download.pytorch.org/models/vgg16-397923af.pth",
    "vgg19": "https://download.pytorch.org/models/vgg19-dcbb9e9d.pth",
}
CONVOLUTIONS = convolutions("VGG-16")
TORCHVISION_INDEX = dict(zip(names("VGG-16"), indices("VGG-16", batch_norm=False)))
NO_PREPROCESSING = "none"  # RGB in 0–1 as it is
PAPER_LAYERS = ("relu1_2", "relu2_2", "relu3_3", "relu4_3")


class VGGFeatures(WideStatistics):
    """The maps of a pretrained VGG: RGB in 0–1 [N, 3, H, W] → a dict from layer name to [N, C, H', W'].

    The network ends at the deepest layer asked for, and its weights never require gradients; gradients flow to the
    image. Besides the maps that it gives, it keeps a bit for each activation and a byte for each pooled one.

    Args:
        arch: ``"vgg16"`` or ``"vgg19"``.
        weights: ``.npz``, ``.pth`` or ``.safetensors`` with the names ``conv1_1.weight`` … (Caffe's) or
            ``features.0.weight`` … (torchvision's), with any prefix, or ``0.weight`` … (the features alone).
            ``None`` fetches torchvision's weights through ``torch.hub``, once (a download of more than 500 MB, of
            which the convolutions are kept: 59 MB, 80 for VGG-19).
        layers: names among ``relu1_1`` … ``relu5_3`` (``relu5_4`` in VGG-19), the same with ``conv`` for a convolution
            before its ReLU, and ``pool1`` … ``pool5``; one name, or several in any collection. Default: the paper's.
        preprocessing: ``"caffe"`` (BGR, 0–255 minus the mean), ``"caffe-rgb"`` (the same in RGB), ``"torchvision"``, or
            ``"none"`` (RGB in 0–1 as it is). Default: VGG-16's by the first convolution, which tells the published
            weights apart; for others by their names, ``conv1_1.weight`` for Caffe's and ``features.0.weight`` for
            torchvision's.
        average_pool: takes the average of 2×2 pixels where VGG takes the greatest, as Gatys et al. do.

    Raises:
        ValueError: an unknown architecture, layer or preprocessing.
        InputError: the file is missing, unreadable, lacks a layer or holds another network; no weights given and none
            can be fetched.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        arch: str = "vgg16",
        weights: str | os.PathLike[str] | None = None,
        layers: Iterable[str] = PAPER_LAYERS,
        *,
        preprocessing: str | None = None,
        average_pool: bool = False,
    ) -> None:
        super().__init__()
        if arch not in ARCHITECTURES:
            raise ValueError(f"arch must be one of {', '.join(ARCHITECTURES)}, got {arch!r}")
        if preprocessing not in (None, *PREPROCESSING, NO_PREPROCESSING):
            known = ", ".join((*PREPROCESSING, NO_PREPROCESSING))
            raise ValueError(f"preprocessing must be one of {known}, got {preprocessing!r}")
        self.arch, self.average_pool = arch, average_pool
        self._taps = taps_of(ARCHITECTURES[arch])
        self.layers = layer_names(layers)
        unknown = [layer for layer in self.layers if layer not in self._taps]
        if unknown or not self.layers:
            raise ValueError(
                f"no such {ARCHITECTURES[arch]} layer: {', '.join(unknown) or '(none given)'}; "
                f"there are {', '.join(self._taps)}"
            )

        if weights is None:
            source, tensors = f"torchvision's {arch}", fetch_torchvision_weights(arch)
        else:
            source, (tensors, _) = str(weights), read_tensors(weights)
        found, expected = vgg_weights(tensors, source, ARCHITECTURES[arch])
        preprocessing = preprocessing or expected
        self.convs = nn.ModuleDict()
        for i, (name, c_in, c_out) in enumerate(convolutions(ARCHITECTURES[arch])):
            deeper = [layer for layer in self.layers if self._taps[layer].conv >= i]
            if deeper:
                self.convs[name] = self._convolution(source, name, found.get(name, (None, None)), (c_in, c_out), deeper)
        if preprocessing == "caffe":
            first: nn.Conv2d = self.convs["1_1"]  # type: ignore[assignment]
            first.weight.data = first.weight.data.flip(1)  # BGR to RGB

        mean, std = PREPROCESSING.get(preprocessing, ((0.0,) * 3, (1.0,) * 3))
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))
        self.requires_grad_(False)

    def _convolution(
        self,
        source: str,
        name: str,
        tensors: tuple[Tensor | None, Tensor | None],
        channels: tuple[int, int],
        deeper: Sequence[str],
    ) -> nn.Conv2d:
        """The convolution called ``name`` with the file's weight and bias; ``deeper`` are the layers that need it."""
        weight, bias = tensors
        if weight is None or bias is None:
            raise InputError(
                f"{source} has no conv{name}, so it cannot give {', '.join(deeper)}: leave those layers out, "
                f"or use weights that reach them"
            )
        check_convolution(f"{source}: conv{name}", weight, bias, channels, ARCHITECTURES[self.arch])
        conv = nn.Conv2d(*channels, 3, padding=1)
        conv.weight.data.copy_(weight)
        conv.bias.data.copy_(bias)  # type: ignore[union-attr]
        return conv

    def forward(self, x: Tensor, layers: Iterable[str] | None = None) -> dict[str, Tensor]:
        """The maps of ``layers`` (default: all those built) in the network's order, computing no deeper than they ask.

        Raises:
            ValueError: other layers than those built; images that are not RGB in 0–1 [N, 3, H, W], or too small for
                the poolings.
        """
        wanted = self.layers if layers is None else layer_names(layers)
        check_images(x)
        check_range("the loss network's input", x)
        taps = self.taps(wanted)
        maps = ops.vgg_features(self.normalized(x), self.frozen(), taps.values())
        layer_of = {tap: layer for layer, tap in taps.items()}
        return {layer_of[tap]: features for tap, features in maps.items()}

    def taps(self, layers: Iterable[str]) -> dict[str, Tap]:
        """Where ``layers`` are in :meth:`frozen`.

        Raises:
            ValueError: a layer that was not built.
        """
        layers = tuple(layers)
        if not set(layers) <= set(self.layers):
            raise ValueError(f"layers built are {', '.join(self.layers)}, asked for {', '.join(sorted(layers))}")
        return {layer: self._taps[layer] for layer in layers}

    def normalized(self, x: Tensor) -> Tensor:
        """``x``, RGB in 0–1, as the first convolution expects it, in the wider dtype of ``x`` and the weights."""
        dtype = torch.promote_types(x.dtype, self.convs["1_1"].weight.dtype)  # type: ignore[arg-type]
        return ((x - self.mean) / self.std).to(dtype)

    def frozen(self) -> list[FrozenConv]:
        """The convolutions, in order, as :func:`fastperc.ops.vgg_loss` takes them."""
        return [
            FrozenConv(
                conv.weight,  # type: ignore[arg-type]
                conv.bias,  # type: ignore[arg-type]
                pooled=name.endswith("_1") and name != "1_1",
                averages=self.average_pool,
            )
            for name, conv in self.convs.items()
        ]


class VGG16Features(VGGFeatures):
    """:class:`VGGFeatures` of VGG-16.

    Args:
        weights_path: the ``weights`` of :class:`VGGFeatures`.
        layers, preprocessing: as there.

    Raises:
        ValueError, InputError: as there.
    """

    def __init__(
        self,
        weights_path: str | os.PathLike[str] | None = None,
        layers: Iterable[str] = PAPER_LAYERS,
        *,
        preprocessing: str | None = None,
    ) -> None:
        super().__init__("vgg16", weights_path, layers, preprocessing=preprocessing)


def taps_of(architecture: str) -> dict[str, Tap]:
    """The layers by name, such as ``conv1_1``, ``relu1_1`` and ``pool1``, in the order of the network."""
    ordered = names(architecture)
    taps = {f"{kind}{name}": Tap(i, kind) for i, name in enumerate(ordered) for kind in TAP_KINDS[:2]}
    last_of_stage = {name[0]: i for i, name in enumerate(ordered)}
    taps |= {f"pool{stage}": Tap(i, "pool") for stage, i in last_of_stage.items()}
    return dict(sorted(taps.items(), key=lambda item: item[1].place))


def check_images(x: Tensor) -> None:
    """Raises a ``ValueError`` unless ``x`` is [N, 3, H, W]."""
    if x.dim() != 4 or x.shape[1] != 3:
        raise ValueError(f"expected RGB images [N, 3, H, W], got shape {list(x.shape)}")


def layer_names(layers: Iterable[str]) -> tuple[str, ...]:
    """The names in ``layers``, each once: one name, a collection, or a dict by name.

    Raises:
        ValueError: something that is no name.
    """
    names = (layers,) if isinstance(layers, str) else tuple(layers)
    if wrong := [name for name in names if not isinstance(name, str)]:
        raise ValueError(f"layers are names such as 'relu2_2' (a dict has them as keys), got {wrong[0]!r}")
    return tuple(dict.fromkeys(names))


def check_convolution(name: str, weight: Tensor, bias: Tensor, channels: tuple[int, int], architecture: str) -> None:
    """Raises an ``InputError`` unless these are finite tensors of a 3×3 convolution; ``name`` is what it calls them."""
    c_in, c_out = channels
    if weight.shape != (c_out, c_in, 3, 3) or bias.shape != (c_out,):
        raise InputError(
            f"{name} has weight {list(weight.shape)} and bias {list(bias.shape)}, "
            f"{architecture}'s are {[c_out, c_in, 3, 3]} and {[c_out]}"
        )
    if not weight.isfinite().all() or not bias.isfinite().all():
        raise InputError(f"{name} has values that are not finite")


def fetch_torchvision_weights(arch: str = "vgg16") -> dict[str, Tensor]:
    """The convolutions of torchvision's published VGG, downloaded on first use.

    ``torch.hub``'s cache keeps them (59 MB, 80 for VGG-19) without the classifier they come with (470 MB).
    """
    url = TORCHVISION_URLS[arch]
    digest = Path(url).stem.partition("-")[2]
    cache = Path(torch.hub.get_dir(), "checkpoints", f"{arch}_features-{digest}.safetensors")
    if not cache.exists():
        try:
            make_folder(cache.parent)
            with TemporaryDirectory(dir=cache.parent) as folder:
                tensors = torch.hub.load_state_dict_from_url(
                    url, folder, map_location="cpu", check_hash=True, weights_only=True
                )
            features = {name: tensor for name, tensor in tensors.items() if name.startswith("features.")}
            write_tensors(cache, features, {"source": url})
        except OSError as error:  # no network, a time-out, a full disk
            argument = "--vgg FILE, or weights_path" if arch == "vgg16" else "weights=FILE"
            raise InputError(
                f"{ARCHITECTURES[arch]}'s weights could not be fetched ({error}): download {url} where there is a "
                f"network and pass the file ({argument})"
            ) from None
    return read_tensors(cache)[0]
