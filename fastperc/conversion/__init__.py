"""Other people's checkpoints of style networks, read without running code."""

from __future__ import annotations

from pathlib import Path

import torch

from fastperc import archives
from fastperc.conversion import johnson, lengstrom, onnx_graph, state_dicts, tensorflow, torch7
from fastperc.conversion.common import Converted, PictureNet, Refused, described
from fastperc.errors import InputError
from fastperc.files import PathLike, check_readable, read_tensors

__all__ = ["Converted", "described", "read"]


def read(path: PathLike) -> Converted:
    """The style network in a checkpoint of somebody's, found by the content of the file.

    Args:
        path: a file; of a TensorFlow checkpoint, any of its files, its name without a suffix, or its folder.

    Raises:
        InputError: the file cannot be read, or holds no network that fastperc converts.
    """
    path = Path(path)
    table = tensorflow.find(path)
    if table is None:
        check_readable(path)
    try:
        converted = _read(path, table)
        if isinstance(converted.net, PictureNet):
            _try(converted.net)
        return converted
    except Refused as reason:
        raise InputError(f"{path}: {reason}") from None


def _read(path: Path, table: Path | None) -> Converted:
    if table is not None:
        return lengstrom.convert(tensorflow.read(table))
    with path.open("rb") as file:
        start = file.read(8)
    if start in torch7.STARTS:
        return johnson.convert(path)
    if start.startswith(torch7.ASCII_STARTS):
        raise Refused(
            "is a Torch7 file in text form, which is not read; write it again in Torch by "
            "torch.save('new.t7', torch.load('old.t7', 'ascii'))"
        )
    if path.suffix.lower() == ".onnx":
        return onnx_graph.convert(path)
    if kind := archives.kind_of(path):
        raise Refused(f"is an archive of {kind}, which needs no conversion: give it to `fastperc stylize --model`")
    tensors, metadata = read_tensors(path)
    if "network" in metadata:
        raise Refused("is fastperc's own already")
    return state_dicts.convert(path, tensors)


def _try(net: PictureNet) -> None:
    """Raises unless the network's layers belong together."""
    size = 32 * net.multiple
    try:
        with torch.no_grad():
            picture = net(torch.rand(1, 3, size, size))
    except Exception:  # PyTorch raises many kinds for layers that do not fit
        picture = torch.empty(0)
    if picture.shape != (1, 3, net.scale * size, net.scale * size):
        raise Refused("holds a network whose layers do not fit together, or that does not go from image to image")
    if not picture.isfinite().all():
        raise Refused("holds a network whose picture of a random image has values that are not finite")
