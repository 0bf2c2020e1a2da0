"""``fastperc web``, and ``fastperc stylize --webcam``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastperc.cli.clips import check_no_clip_options
from fastperc.cli.networks import (
    DEFAULT_STYLE,
    load_painter,
    load_style_painter,
    local_file,
    network_files,
    super_resolution_file,
)
from fastperc.cli.options import add_device, add_tile, network_file, positive
from fastperc.errors import InputError
from fastperc.weights import STYLES

if TYPE_CHECKING:
    import torch

    from fastperc.photos.jobs import Painter
    from fastperc.web.guard import Address
    from fastperc.web.server import LiveSource
    from fastperc.web.studio import Networks

HOST, PORT = "127.0.0.1", 7860
MEGABYTES, MEGAPIXELS, SECONDS, WAITING = 200, 50, 60, 8  # default limits
WEBCAM_HELP = "a camera: 0, /dev/video0 or what FFmpeg calls it, such as 'FaceTime HD Camera'"

SHIPPED = {DEFAULT_STYLE: STYLES[DEFAULT_STYLE]} | STYLES  # in the order of the page


def port(text: str) -> int:
    """A number of a port.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text} is not a port, a number from 0 to 65535")
    return int(text)


def add(commands: argparse._SubParsersAction[Any]) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "web",
        help="a page to paint in the browser",
        description="Serves a page in which photos and clips are painted and enlarged. Only this machine can\n"
        "reach it, nothing is sent elsewhere, and what was uploaded is deleted at the end. Ctrl-C stops it.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  fastperc web                                 at http://127.0.0.1:7860\n"
        "  fastperc web --model runs/mine/model.safetensors --port 8000\n"
        "  fastperc web --webcam 0                      with the painted picture of a camera\n"
        "  fastperc web --host 0.0.0.0                  for everybody in the network, without a password",
    )
    parser.add_argument(
        "--model",
        type=network_file,
        metavar="FILE",
        action="append",
        default=[],
        help="a style network of your own, beside those that ship; may be given several times",
    )
    parser.add_argument("--webcam", metavar="DEVICE", help=WEBCAM_HELP)
    add_tile(parser, "paint")
    add_device(parser)
    server = parser.add_argument_group("server")
    server.add_argument("--host", default=HOST, help="who can reach the page; default: %(default)s, this machine alone")
    server.add_argument("--port", type=port, default=PORT, metavar="N", help="default: %(default)s; 0: any free one")
    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--max-megabytes", type=positive, default=MEGABYTES, metavar="N", help="of an upload; default: %(default)s"
    )
    limits.add_argument(
        "--max-megapixels",
        type=positive,
        default=MEGAPIXELS,
        metavar="N",
        help="of a photo, and of an enlarged one; default: %(default)s",
    )
    limits.add_argument(
        "--max-seconds", type=positive, default=SECONDS, metavar="N", help="of a clip; default: %(default)s"
    )
    limits.add_argument(
        "--max-waiting",
        type=positive,
        default=WAITING,
        metavar="N",
        help="how many may wait, since one picture is painted at a time; default: %(default)s",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command and returns its exit status."""
    from fastperc.web.guard import Address

    own = named([local_file(model) for model in arguments.model])
    selected = next(reversed(own), DEFAULT_STYLE)
    return serve(arguments, SHIPPED | own, Address(arguments.host, arguments.port), selected)


def named(models: list[Path]) -> dict[str, Path]:
    """Names of style networks for the page: those of the files, with a number where they are taken."""
    names: dict[str, Path] = {}
    for model in models:
        name, number = model.stem, 2
        while name in names or name in STYLES:
            name, number = f"{model.stem}-{number}", number + 1
        names[name] = model
    return names


def serve(
    arguments: argparse.Namespace, styles: dict[str, Path], address: Address, selected: str, smooth: float = 0.0
) -> int:
    """Serves the page until Ctrl-C.

    Args:
        arguments: with ``device``, ``tile`` and ``webcam``, and perhaps limits, strength, size and colours.
        styles: name → file.
        address: where.
        selected: the style that is chosen at first.
        smooth: of the camera's picture.
    """
    from fastperc.devices import find_device
    from fastperc.web import server
    from fastperc.web.limits import Limits

    networks = networks_of(styles, find_device(arguments.device), arguments.tile)
    limits = Limits(
        getattr(arguments, "max_megabytes", MEGABYTES),
        getattr(arguments, "max_megapixels", MEGAPIXELS),
        getattr(arguments, "max_seconds", SECONDS),
        getattr(arguments, "max_waiting", WAITING),
    )
    server.serve(networks, address, limits, live_source(arguments, selected, smooth), selected)
    return 0


def networks_of(styles: dict[str, Path], device: torch.device, tile: int | str = "auto") -> Networks:
    """The networks of the page: these styles, and the super-resolution networks that ship."""
    from fastperc.web.studio import Networks

    def load_enlarger(method: str, scale: int) -> Painter:
        return load_painter(super_resolution_file(method, scale), scale, device)

    return Networks(styles, lambda source: load_style_painter(source, device), load_enlarger, tile)


def live_source(arguments: argparse.Namespace, style: str, smooth: float) -> LiveSource | None:
    """The camera that ``--webcam`` names, painted as the command's other options say."""
    from fastperc.web.camera import LiveOptions
    from fastperc.web.server import LiveSource
    from fastperc.web.studio import StyleOptions

    if arguments.webcam is None:
        return None
    options = StyleOptions(
        style,
        getattr(arguments, "strength", 1.0),
        getattr(arguments, "size", None),
        getattr(arguments, "keep_colors", False),
        getattr(arguments, "stroke", "auto"),
    )
    return LiveSource(arguments.webcam, LiveOptions(options, smooth))


def add_webcam(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``fastperc stylize`` for a camera."""
    camera = parser.add_argument_group("camera")
    camera.add_argument(
        "--webcam",
        metavar="DEVICE",
        help=f"paint {WEBCAM_HELP}; its picture is shown in a page at http://{HOST}:{PORT}, in place of INPUT",
    )
    camera.add_argument("--port", type=port, metavar="N", help=f"of that page; default: {PORT}; 0: any free one")


def run_webcam(arguments: argparse.Namespace) -> int:
    """Runs ``fastperc stylize --webcam`` and returns its exit status.

    Raises:
        InputError: files are given too, or the camera cannot be opened.
    """
    from fastperc.web.guard import Address

    if arguments.inputs or arguments.out is not None:
        raise InputError("--webcam takes the place of INPUT and --out; leave them out")
    check_no_clip_options(argparse.Namespace(**{**vars(arguments), "smooth": None}))
    if arguments.masks:
        raise InputError("--mask is for photos and clips, not for --webcam")
    (source,) = network_files(arguments)
    address = Address(HOST, PORT if arguments.port is None else arguments.port)
    styles = {source.stem: source} | {name: file for name, file in STYLES.items() if name != source.stem}
    return serve(arguments, styles, address, source.stem, arguments.smooth or 0.0)
