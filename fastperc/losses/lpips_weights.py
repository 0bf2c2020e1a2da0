"""The channel weights of LPIPS: in a file, or in an installed ``lpips`` or ``torchmetrics``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from torch import Tensor

from fastperc.errors import InputError
from fastperc.files import PathLike, read_tensors

# Where packages keep the weights for VGG-16.
PACKAGES = {"lpips": "weights/v0.1/vgg.pth", "torchmetrics": "functional/image/lpips_models/vgg.pth"}
# lpips' names, such as lin0.model.1.weight (0 without its dropout), with any prefix. It has each tensor a second time,
# with an s and a dot before the number.
NAME = re.compile(r"(?:.*\.)?lin(?:s\.)?(?P<layer>\d)(?:\.model\.\d)?(?:\.weight)?")


def installed_weights() -> Path:
    """The file in an installed ``lpips`` or ``torchmetrics``, neither of which is imported.

    Raises:
        InputError: neither package has it.
    """
    for package, file in PACKAGES.items():
        spec = find_spec(package)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            if (path := Path(folder, file)).is_file():
                return path
    raise InputError(
        "LPIPS needs the weights of its channels: install lpips or torchmetrics, which carry them, "
        "or pass lpips' file vgg.pth as channel_weights"
    )


def channel_weights(path: PathLike | None, layers: Mapping[str, int]) -> list[Tensor]:
    """The channel weights [C], one a layer, float32.

    Args:
        path: a file with ``lpips``' names, ``.pth`` or ``.safetensors``; ``None``: :func:`installed_weights`.
        layers: the number of channels by the name of each layer.

    Raises:
        InputError: no such file, or it has other weights.
    """
    path = installed_weights() if path is None else path
    tensors = {}
    for name, tensor in read_tensors(path)[0].items():
        if match := NAME.fullmatch(name):
            tensors[int(match["layer"])] = tensor
    if not tensors:
        raise InputError(f"{path}: holds no channel weights of LPIPS, which are called lin0.model.1.weight …")
    return [_checked(path, tensors, i, layer, channels) for i, (layer, channels) in enumerate(layers.items())]


def _checked(path: PathLike, tensors: Mapping[int, Tensor], i: int, layer: str, channels: int) -> Tensor:
    weight = tensors.get(i)
    shape: Sequence[int] | str = "missing" if weight is None else list(weight.shape)
    if weight is None or weight.numel() != channels or len(tensors) > 5:
        raise InputError(
            f"{path}: holds the channel weights of another network: those of {layer} should be "
            f"{[1, channels, 1, 1]}, lin{i} is {shape} of {len(tensors)}; lpips' for VGG-16 are in vgg.pth"
        )
    if not weight.isfinite().all():
        raise InputError(f"{path}: lin{i} has values that are not finite")
    return weight.flatten().float()
