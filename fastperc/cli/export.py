"""``fastperc export``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from fastperc.cli.networks import add_style_network, shipped_file, style_file
from fastperc.cli.options import path, sizes, suggest
from fastperc.weights import STYLES, SUPER_RESOLUTION

FIXED = 512  # pixels a side, of --size fixed
LICENSE = "BSD-3-Clause"  # of the networks that ship


def add(commands: argparse._SubParsersAction[Any]) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "export",
        help="write a network for other programs: ONNX, or an archive of torch.export",
        description="Writes a network for other programs: an .onnx file, or an archive of torch.export (.pt2).\n"
        "Its pictures are compared with PyTorch's at several sizes before the file is kept.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  fastperc export --style great_wave -o great_wave.onnx\n"
        "  fastperc export --style great_wave -o great_wave.onnx --fp16 --input uint8\n"
        "  fastperc export --model runs/mine/model.safetensors -o mine.pt2\n"
        "  fastperc export --network x4_pixel -o x4.onnx --size 320x240\n\n"
        ".onnx needs three packages: pip install 'fastperc[onnx]'",
    )
    network = add_style_network(parser)
    shipped = network.add_argument(
        "--network", metavar="NAME", help="any network that ships, such as x4_pixel, which enlarges four times"
    )
    suggest(shipped, STYLES | SUPER_RESOLUTION)
    parser.add_argument(
        "-o", "--out", required=True, type=path, metavar="FILE", help="the file to write: NAME.onnx or NAME.pt2"
    )
    parser.add_argument(
        "--input",
        choices=["float", "uint8"],
        default="float",
        help="the images that the network takes and gives: float, float32 RGB in 0-1 [N, 3, H, W]; uint8, RGB in 0-255 "
        "[N, H, W, 3], as image libraries have them; default: %(default)s",
    )
    parser.add_argument(
        "--fp16",
        action="store_true",
        help="store the weights and compute in float16, instance norms in float32; the images stay as --input says",
    )
    parser.add_argument(
        "--size",
        type=size,
        default="dynamic",
        metavar="dynamic|fixed|WxH",
        help=f"sizes of the images: dynamic, any; fixed, {FIXED}x{FIXED} pixels; or N or WIDTHxHEIGHT, that size only; "
        "how many are given at once always varies; default: %(default)s",
    )
    parser.add_argument(
        "--license",
        metavar="TEXT",
        help=f"the licence that is stored in the file; default: {LICENSE} for the networks that ship, else none",
    )
    parser.set_defaults(run=run)


def size(text: str) -> tuple[int, int] | None:
    """Width and height in pixels; ``None`` for ``dynamic``.

    Raises:
        argparse.ArgumentTypeError: it is neither a size nor ``dynamic`` nor ``fixed``.
    """
    if text == "dynamic":
        return None
    if text == "fixed":
        return FIXED, FIXED
    values = sizes(text)
    if len(values) != 1:
        raise argparse.ArgumentTypeError(f"{text} is not dynamic, fixed or one size like 512 or 1920x1080")
    return values[0]


def run(arguments: argparse.Namespace) -> int:
    """Runs the command and returns its exit status."""
    from fastperc import archives, checkpoints, exporting
    from fastperc.errors import InputError
    from fastperc.files import check_overwrites, check_writable
    from fastperc.progress import console

    out: Path = arguments.out
    source = shipped_file(arguments.network) if arguments.network else style_file(arguments)
    exporting.check_format(out)
    check_overwrites([out], [source])
    if (kind := archives.kind_of(source)) is not None:
        raise InputError(
            f"{source}: is an archive of {kind} already; export its network in Python by torch.onnx.export"
        )
    net = checkpoints.load(source)
    check_writable(out)
    properties = {
        "name": source.stem,
        "network": type(net).__name__,
        "config": json.dumps(net.config),
        "training": json.dumps(checkpoints.read_training(source)),
    }
    if license := arguments.license or (LICENSE if arguments.model is None else None):
        properties["license"] = license
    fixed = arguments.size and (arguments.size[1], arguments.size[0])
    images = exporting.Images(arguments.input, fixed, arguments.fp16)
    with console.status(f"exporting {source.stem}, and checking its pictures"):
        written = exporting.write(net, out, images, properties)
    print("\n".join(exporting.report(out, written)))
    return 0
