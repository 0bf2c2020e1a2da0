"""``fastperc push``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fastperc.cli.options import path


def add(commands: argparse._SubParsersAction[Any]) -> None:
    """Adds the command to the parser."""
    parser = commands.add_parser(
        "push",
        help="upload a network to the Hugging Face Hub",
        description="Uploads a network to the Hugging Face Hub, where `--model hf://OWNER/NAME/FILE` and\n"
        "fastperc.load find it. Says what it does, and prints the address of the commit. A new repository\n"
        "gets a model card, made from what the file says of its training.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  fastperc push runs/mine/model.safetensors me/my-style --license cc-by-4.0\n"
        "  fastperc push runs/mine/model.safetensors me/my-style --name second.safetensors\n"
        "  fastperc stylize photo.jpg --model hf://me/my-style/model.safetensors\n\n"
        "It needs a package and a token: pip install 'fastperc[hub]' && hf auth login",
    )
    parser.add_argument("file", type=path, metavar="FILE", help="a network that fastperc saved, NAME.safetensors")
    parser.add_argument("repo", metavar="OWNER/NAME", help="the repository; a new one is created if there is none")
    parser.add_argument("--name", metavar="FILE", help="the file's name in the repository; default: its own")
    parser.add_argument("--private", action="store_true", help="only you can see the repository, if it is new")
    parser.add_argument(
        "--license",
        metavar="ID",
        help="the licence for a new card, such as bsd-3-clause or cc-by-4.0; default: what the file says, if anything",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Runs the command and returns its exit status."""
    from fastperc import checkpoints
    from fastperc.errors import InputError
    from fastperc.files import read_safetensors_header
    from fastperc.hub import SCHEME, Address, Upload, check_repo, push
    from fastperc.model_card import model_card
    from fastperc.progress import say

    source: Path = arguments.file
    repo = check_repo(arguments.repo)
    address = Address.parse(f"{SCHEME}{repo}/{arguments.name or source.name}")
    metadata = read_safetensors_header(source).metadata
    if metadata.get("network") not in checkpoints.NETWORKS:
        raise InputError(f"{source}: not a network saved by fastperc; `fastperc convert` makes one of other projects'")
    checkpoints.load(source)  # refuses a file that nobody could load
    card = model_card(address, metadata, arguments.license)
    print(push(Upload(source, repo, address.file, card, arguments.private), say))
    return 0
