"""The networks that commands run: the options that name one, finding its file, and loading it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastperc.cli.options import network_file, path, suggest
from fastperc.errors import InputError
from fastperc.hub import Address
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


TRAINED = (
    "a trained network: fastperc's .safetensors, on disk or as hf://OWNER/NAME/FILE on the Hugging Face Hub, or a "
    "state_dict of PyTorch's fast_neural_style example"
)


def add_style_network(parser: argparse.ArgumentParser) -> argparse._MutuallyExclusiveGroup:
    """Adds ``--style`` and ``--model``, which name a style network; returns their group, of which one can be given."""
    model = parser.add_mutually_exclusive_group()
    style = model.add_argument(
        "--style", default=DEFAULT_STYLE, metavar="NAME", help=f"one of {', '.join(STYLES)}; default: %(default)s"
    )
    suggest(style, STYLES)
    model.add_argument("--model", type=network_file, metavar="FILE", help=TRAINED)
    return model


def add_masked_networks(parser: argparse.ArgumentParser) -> None:
    """Adds ``--style`` and ``--model``, stored in order as ``networks``, and ``--mask``, stored as ``masks``.

    Each can be given several times. ``networks`` holds names of styles and what :func:`network_file` returns.
    """
    style = parser.add_argument(
        "--style",
        dest="networks",
        action="append",
        metavar="NAME",
        help=f"one of {', '.join(STYLES)}; default: {DEFAULT_STYLE}",
    )
    suggest(style, STYLES)
    parser.add_argument(
        "--model", dest="networks", action="append", type=network_file, metavar="FILE", help=f"{TRAINED}, {ARCHIVES}"
    )
    parser.add_argument(
        "--mask",
        dest="masks",
        action="append",
        type=path,
        default=[],
        metavar="FILE",
        help="an image of any size: paint where it is white, in part where it is gray; with a mask for each, several "
        "--style and --model share a picture",
    )


def network_files(arguments: argparse.Namespace) -> list[Path]:
    """The files of the networks that the options of :func:`add_masked_networks` name.

    Raises:
        InputError: no style of that name, or not a mask for each network.
    """
    sources, count = arguments.networks or [DEFAULT_STYLE], len(arguments.masks)
    if count != len(sources) and (count or len(sources) > 1):
        raise InputError(
            f"--style and --model name {len(sources)} in all, and --mask is given {count} times; give each network "
            "one mask, in the same order"
        )
    return [style_of_name(source) if isinstance(source, str) else local_file(source) for source in sources]


def style_file(arguments: argparse.Namespace) -> Path:
    """The file of the network that ``--style`` or ``--model`` names.

    Raises:
        InputError: no style of that name.
    """
    return style_of_name(arguments.style) if arguments.model is None else local_file(arguments.model)


def local_file(source: Path | Address) -> Path:
    """``source``, or the local copy of a file on the Hugging Face Hub, which is downloaded if need be.

    Raises:
        InputError: it cannot be downloaded.
    """
    return source.download() if isinstance(source, Address) else source


def style_of_name(name: str) -> Path:
    """The file of the style called ``name`` that ships.

    Raises:
        InputError: no style of that name.
    """
    if name not in STYLES:
        message = f"no style {name!r}; use {', '.join(STYLES)} or --model FILE"
        if Path(name).is_file() or Path(name).suffix.lower() in IMAGE_SUFFIXES:
            message = (
                f"--style takes a name ({', '.join(STYLES)}), not a file; give --model FILE for a trained network; "
                "for a painting use `fastperc optimize`, or train a network by `fastperc train`"
            )
        raise InputError(message)
    return STYLES[name]


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


def load_masked_painter(sources: Sequence[Path], masks: Sequence[Path], device: torch.device) -> Painter:
    """Loads the networks in the files ``sources`` as a painter that gives each its mask; without masks, the only one.

    Raises:
        InputError: a file cannot be read, or holds another kind of network.
    """
    if not masks:
        return load_style_painter(sources[0], device)

    from fastperc.photos.masks import MaskedPainter, read_mask

    images = [read_mask(mask) for mask in masks]
    return MaskedPainter([(load_style_painter(source, device), image) for source, image in zip(sources, images)])


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
