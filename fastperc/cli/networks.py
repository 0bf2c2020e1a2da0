"""The networks that commands run: the options that name one, finding its file, and loading it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastperc.cli.options import path
from fastperc.errors import InputError
from fastperc.weights import STYLES, SUPER_RESOLUTION

if TYPE_CHECKING:
    import torch
    from torch import nn

    from fastperc.photos.jobs import Painter

DEFAULT_STYLE = "great_wave"
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif"}  # of paintings
METHODS = "bicubic", "srcnn", "pixel", "feature"  # ways to enlarge; all but the first are networks


ARCHIVES = (
    "or an archive of TorchScript or torch.export (.pt2) of any network from RGB in 0-1 to the same, which is "
    "run on the whole photo at once, without tiles"
)


def add_style_network(parser: argparse.ArgumentParser, archives: bool = False) -> argparse._MutuallyExclusiveGroup:
    """Adds ``--style`` and ``--model``, which name a style network; returns their group, of which one can be given.

    Args:
        parser: of the command.
        archives: whether ``--model`` takes archives too, see :mod:`fastperc.archives`.
    """
    model = parser.add_mutually_exclusive_group()
    model.add_argument(
        "--style", default=DEFAULT_STYLE, metavar="NAME", help=f"one of {', '.join(STYLES)}; default: %(default)s"
    )
    model.add_argument(
        "--model",
        type=path,
        metavar="FILE",
        help="a trained network: fastperc's .safetensors, or a state_dict of PyTorch's fast_neural_style example"
        + (f", {ARCHIVES}" if archives else ""),
    )
    return model


def style_file(arguments: argparse.Namespace) -> Path:
    """The file of the network that ``--style`` or ``--model`` names.

    Raises:
        InputError: no style of that name.
    """
    if arguments.model is None and arguments.style not in STYLES:
        message = f"no style {arguments.style!r}; use {', '.join(STYLES)} or --model FILE"
        if Path(arguments.style).is_file() or Path(arguments.style).suffix.lower() in IMAGE_SUFFIXES:
            message = (
                f"--style takes a name ({', '.join(STYLES)}), not a file; give --model FILE for a trained network; "
                "for a painting use `fastperc optimize`, or train a network by `fastperc train`"
            )
        raise InputError(message)
    return arguments.model or STYLES[arguments.style]


def load_style(source: Path, device: torch.device) -> nn.Module:
    """Loads the style network in the file ``source``.

    Raises:
        InputError: the file cannot be read, or holds another kind of network.
    """
    from fastperc import checkpoints
    from fastperc.models import TransformNet

    net = checkpoints.load(source, device)
    if not isinstance(net, TransformNet):
        raise InputError(f"{source}: holds a {type(net).__name__}, which is not a style network")
    return net


def load_style_painter(source: Path, device: torch.device) -> Painter:
    """Loads the style network or the archive in the file ``source`` and makes it ready to paint.

    Raises:
        InputError: the file cannot be read, or holds another kind of network.
    """
    from fastperc import archives
    from fastperc.engine import freeze
    from fastperc.photos.archive import ArchivePainter

    if archives.kind_of(source) is None:
        return freeze(load_style(source, device))
    painter = ArchivePainter(archives.load(source, device))
    if painter.scale != 1:
        raise InputError(f"{source}: enlarges {painter.scale} times; use `fastperc sr upscale --model {source}`")
    return painter


def shipped(names: Sequence[str]) -> list[Path]:
    """The files of networks that ship, styles or super-resolution; the name ``all`` stands for all of them.

    Raises:
        InputError: no such name.
    """
    known = STYLES | SUPER_RESOLUTION
    if unknown := [name for name in names if name not in known and name != "all"]:
        raise InputError(f"no network {unknown[0]!r} ships; use {', '.join(known)} or all, or --model FILE")
    return list(known.values()) if "all" in names else [known[name] for name in dict.fromkeys(names)]


def shipped_file(name: str) -> Path:
    """The file of the network ``name`` that ships, of any kind.

    Raises:
        InputError: no such name.
    """
    known = STYLES | SUPER_RESOLUTION
    if name not in known:
        raise InputError(f"no network {name!r} ships; use {', '.join(known)}, or --model FILE")
    return known[name]


def super_resolution_file(method: str, scale: int) -> Path:
    """The file of the network that ships for one of ``METHODS`` and a scale.

    Raises:
        InputError: none ships.
    """
    name = f"x{scale}_{method}"
    if name not in SUPER_RESOLUTION:
        methods = [known.partition("_")[2] for known in SUPER_RESOLUTION if known.startswith(f"x{scale}_")]
        scales = sorted(int(known[1:].partition("_")[0]) for known in SUPER_RESOLUTION if known.endswith(f"_{method}"))
        choice = " or ".join(methods) if methods else f"--scale {' or '.join(map(str, scales))}"
        raise InputError(f"no {method!r} network ships for ×{scale}; use {choice}, or give the file of a network")
    return SUPER_RESOLUTION[name]


def load_painter(source: Path, scale: int | None, device: torch.device) -> Painter:
    """Loads the super-resolution network or the archive in the file ``source`` and makes it ready to paint.

    Raises:
        InputError: the file cannot be read, holds another kind of network, or one of another ``scale`` than given.
    """
    from fastperc import archives, checkpoints
    from fastperc.models import SRCNN, SuperResolutionNet
    from fastperc.photos.archive import ArchivePainter
    from fastperc.photos.upscale import make_painter

    painter: Painter
    if archives.kind_of(source) is not None:
        painter = ArchivePainter(archives.load(source, device))
        if painter.scale == 1:
            raise InputError(f"{source}: does not enlarge; use `fastperc stylize --model {source}`")
    else:
        net = checkpoints.load(source, device)
        if not isinstance(net, (SRCNN, SuperResolutionNet)):
            raise InputError(f"{source}: holds a {type(net).__name__}, which is not a super-resolution network")
        painter = make_painter(net)
    if scale is not None and painter.scale != scale:
        raise InputError(f"{source}: enlarges {painter.scale} times, not {scale}")
    return painter
