"""The weights of VGG in files: their names, which VGG they are of, and what the first convolution expects."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastperc.errors import InputError
from fastperc.models.common import WRAPPER_NAMES

# Mean and deviation of RGB in 0–1 that the first convolution of each set of published weights expects.
CAFFE_MEAN, LEVEL = (123.68 / 255, 116.779 / 255, 103.939 / 255), 1 / 255
PREPROCESSING = {
    "caffe": (CAFFE_MEAN, (LEVEL,) * 3),  # and its channels are BGR
    "caffe-rgb": (CAFFE_MEAN, (LEVEL,) * 3),
    "torchvision": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
# The first filter of VGG-16's conv1_1, by input channel, row and column.
FIRST_FILTER = {
    "caffe": (
        *(0.4295, 0.3735, -0.0614, 0.2748, 0.0387, -0.3672, -0.0575, -0.2622, -0.3501),
        *(0.5504, 0.4401, -0.0814, 0.3457, 0.0406, -0.4535, -0.0586, -0.3307, -0.4850),
        *(0.4800, 0.4085, -0.0651, 0.3105, 0.0502, -0.4034, -0.0509, -0.2852, -0.4185),
    ),
    "torchvision": (
        *(-0.5537, 0.1427, 0.5290, -0.5831, 0.3566, 0.7657, -0.6902, -0.0480, 0.4841),
        *(0.1755, 0.0099, -0.0814, 0.0441, -0.0703, -0.2604, 0.1324, -0.1728, -0.1323),
        *(0.3130, -0.1659, -0.4275, 0.4752, -0.0827, -0.4870, 0.6320, 0.0193, -0.2775),
    ),
}
SIMILAR = 0.05  # relative distance of a first filter that was rounded or trained a little further

# Convolutions of each stage; a pooling stands after each stage.
ARCHITECTURES = {
    "VGG-16": (2, 2, 3, 3, 3),
    "VGG-19": (2, 2, 4, 4, 4),
    "VGG-13": (2, 2, 2, 2, 2),
    "VGG-11": (1, 1, 2, 2, 2),
}
CHANNELS = (64, 128, 256, 512, 512)  # of each stage
NAME = re.compile(
    r"(?:.*\.)?conv(?P<stage>\d)_(?P<number>\d)\.(?P<kind>weight|bias)"  # Caffe's, such as conv1_1.weight
    # torchvision's: features.0.weight, or 0.weight from the features alone, or slice1.0.weight from PyTorch's example
    r"|(?:(?:.*\.)?(?:features|slice\d+)\.)?(?P<index>\d+)\.(?P<kind_at_index>weight|bias)"
)


class VGGWeights(NamedTuple):
    """The convolutions of a file: weight and bias by name, such as ``1_1``; ``None`` where one is missing."""

    convolutions: dict[str, tuple[Tensor | None, Tensor | None]]
    preprocessing: str  # the key of ``PREPROCESSING`` that the weights expect


def vgg_weights(tensors: Mapping[str, Tensor], source: str, asked: str = "VGG-16") -> VGGWeights:
    """The convolutions of the VGG called ``asked`` among ``tensors``, under Caffe's or torchvision's names, with any
    prefix.

    Args:
        tensors: the file's, by name.
        source: what error messages call the file.
        asked: a name of ``ARCHITECTURES``.

    Raises:
        InputError: the file holds another VGG, or none.
    """
    by_name: dict[str, dict[str, Tensor]] = {}
    by_index: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if match := NAME.fullmatch(WRAPPER_NAMES.sub("", key)):
            if match["index"] is None:
                by_name.setdefault(f"{match['stage']}_{match['number']}", {})[match["kind"]] = tensor
            elif tensor.dim() in (1, 4):  # the others are those of a classifier
                by_index.setdefault(int(match["index"]), {})[match["kind_at_index"]] = tensor
    at_index = {i: pair for i, pair in by_index.items() if "weight" in pair and pair["weight"].dim() == 4}
    if "1_1" not in by_name and 0 not in at_index:
        raise InputError(
            f"{source}: holds no {asked}, which has conv1_1.weight or features.0.weight "
            f"(its first tensor is {next(iter(tensors), 'missing')})"
        )

    normed = any(key.endswith("running_mean") for key in tensors)
    architecture = _architecture(by_name.keys(), at_index.keys(), normed, asked)
    if architecture != asked or normed:
        kind = f"{architecture} with batch norm" if normed else architecture
        raise InputError(f"{source}: holds {kind}; give the weights of {asked} (without batch norm)")
    if "1_1" not in by_name:
        by_name = {name: at_index.get(i, {}) for name, i in zip(names(asked), indices(asked, False))}
    convolutions = {name: (pair.get("weight"), pair.get("bias")) for name, pair in by_name.items()}
    return VGGWeights(convolutions, _expected(convolutions["1_1"][0], tensors, "torchvision" if at_index else "caffe"))


def names(architecture: str) -> list[str]:
    """The convolutions in order: ``1_1``, ``1_2``, …"""
    counts = ARCHITECTURES[architecture]
    return [f"{stage}_{i}" for stage, count in enumerate(counts, start=1) for i in range(1, count + 1)]


def convolutions(architecture: str) -> tuple[tuple[str, int, int], ...]:
    """Name, input and output channels of each convolution, in order: ``("1_1", 3, 64)``, ``("1_2", 64, 64)``, …"""
    outputs = [CHANNELS[int(name[0]) - 1] for name in names(architecture)]
    return tuple(zip(names(architecture), [3, *outputs], outputs))


def indices(architecture: str, batch_norm: bool) -> list[int]:
    """Where torchvision's ``features`` Sequential keeps them: conv, norm if ``batch_norm``, ReLU, …, pooling, …"""
    step = 3 if batch_norm else 2
    sizes = [step + (i == count) for count in ARCHITECTURES[architecture] for i in range(1, count + 1)]
    return [0, *accumulate(sizes[:-1])]


def _architecture(given: Collection[str], at_index: Collection[int], batch_norm: bool, asked: str) -> str:
    """The VGG whose first convolutions those of a file are, or else one that has all of them and more between.

    Several have the same first convolutions: ``asked`` comes first.
    """
    present: list[Any] = sorted(given) if given else sorted(at_index)
    known: dict[str, list[Any]] = {
        name: [*names(name)] if given else [*indices(name, batch_norm)]
        for name in dict.fromkeys((asked, *ARCHITECTURES))
    }
    first_ones = (name for name in known if present == known[name][: len(present)])
    some = (name for name in known if set(present) <= set(known[name]))
    return next(first_ones, next(some, "another network"))


def _expected(first: Tensor | None, tensors: Mapping[str, Tensor], usual: str) -> str:
    """The preprocessing that the weights expect: by the first convolution, or else by their names."""
    if first is not None and first.shape == (64, 3, 3, 3):
        for order, suffix in ((first[0], ""), (first[0].flip(0), "-rgb")):
            for name, values in FIRST_FILTER.items():
                published = torch.tensor(values).view(3, 3, 3)
                if (order.float() - published).norm() < SIMILAR * published.norm() and name + suffix in PREPROCESSING:
                    return name + suffix
    # Caffe's weights converted for PyTorch have a dropout before each layer of the classifier, torchvision's after.
    return "caffe" if any(key.endswith("classifier.1.weight") for key in tensors) else usual
