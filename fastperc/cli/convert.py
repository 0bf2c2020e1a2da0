"""``fastperc convert``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fastperc.cli.options import path


def add(commands: argparse._SubParsersAction[Any]) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "convert",
        help="turn other people's checkpoints into fastperc's",
        description="Turns a checkpoint of another project into a network for `fastperc stylize --model`.\n"
        "It reads numbers only: no code in a file is run.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="what it reads:\n"
        "  pytorch/examples fast_neural_style, of any age     .model, .pth\n"
        "  gordicaleksa's and rrmina's networks               .pth\n"
        "  the ONNX model zoo's fast_neural_style             .onnx, with pip install 'fastperc[onnx]'\n"
        "  jcjohnson/fast-neural-style                        .t7\n"
        "  lengstrom/fast-style-transfer                      .ckpt, .index with its .data, or their folder\n\n"
        "The last computes what fastperc's own networks cannot: write it as .pt2 or .onnx.\n\n"
        "examples:\n"
        "  fastperc convert mosaic.pth -o mosaic.safetensors\n"
        "  fastperc convert wave.ckpt -o wave.pt2 && fastperc stylize photo.jpg --model wave.pt2",
    )
    parser.add_argument("input", type=path, metavar="INPUT", help="the checkpoint")
    parser.add_argument(
        "-o",
        "--out",
        required=True,
        type=path,
        metavar="FILE",
        help="the file to write: .safetensors, fastperc's own; .pt2, an archive of torch.export; or .onnx",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command and returns its exit status."""
    from fastperc import checkpoints, conversion, exporting
    from fastperc.errors import InputError
    from fastperc.files import check_overwrites, check_writable
    from fastperc.progress import console

    source: Path = arguments.input
    out: Path = arguments.out
    suffix = out.suffix.lower()
    if suffix not in (".safetensors", *exporting.SUFFIXES):
        raise InputError(f"{out}: the name must end in .safetensors, {' or '.join(exporting.SUFFIXES)}")
    if suffix != ".safetensors":
        exporting.check_format(out)
    check_overwrites([out], [source])
    converted = conversion.read(source)
    if suffix == ".safetensors" and converted.why_not:
        raise InputError(
            f"{source}: cannot be a .safetensors file: {converted.kind} {converted.why_not}; "
            f"write an archive: fastperc convert {source} -o {out.with_suffix('.pt2')}"
        )
    check_writable(out)
    print("\n".join(f"{source}: {line}" for line in conversion.described(converted)))
    if suffix == ".safetensors":
        checkpoints.save(converted.net, out, training={"converted from": converted.kind, "file": source.name})
        print(f"wrote {out}")
    else:
        properties = {"name": source.stem, "network": converted.kind}
        with console.status(f"exporting {source.stem}, and checking its pictures"):
            written = exporting.write(converted.net, out, exporting.Images(), properties)
        print("\n".join(exporting.report(out, written)))
    return 0
