"""What ships: a table of the networks, and all that is known of one. Read from the files' headers, without PyTorch."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from fastperc.errors import InputError
from fastperc.files import read_safetensors_header

WIDTH = 250  # characters; no table is as wide
PAINTINGS = {
    "composition_vii": "Composition VII, Wassily Kandinsky, 1913",
    "great_wave": "The Great Wave off Kanagawa, Hokusai, 1831",
    "starry_night": "The Starry Night, Vincent van Gogh, 1889",
    "the_scream": "The Scream, Edvard Munch, 1893",
}
METHODS = {"pixel": "trained on pixels", "feature": "trained on features of VGG-16"}


class Network(NamedTuple):
    """A network on disk, as its file describes it."""

    name: str
    parameters: int  # running statistics of norms included
    size: int  # bytes of the file
    config: dict[str, Any]  # arguments that build the network
    training: dict[str, Any]  # how it was trained
    license: str | None

    @classmethod
    def read(cls, path: Path) -> Network:
        """Reads the header of a network's file.

        Raises:
            InputError: it is missing, damaged or no network of fastperc's.
        """
        shapes, metadata = read_safetensors_header(path)
        try:
            config, training = (dict(json.loads(metadata.get(key, "{}"))) for key in ("config", "training"))
        except (TypeError, ValueError, RecursionError):
            raise InputError(f"{path}: its metadata is damaged") from None
        parameters = sum(map(math.prod, shapes.values()))
        return cls(path.stem, parameters, path.stat().st_size, config, training, metadata.get("license"))

    @property
    def subject(self) -> str:
        """The painting of a style; how a super-resolution network enlarges."""
        if "scale" in self.config:
            srcnn = str(self.training.get("arch", "")).startswith("srcnn")
            method = "SRCNN" if srcnn else METHODS.get(self.training.get("loss", ""), "")
            return f"×{self.config['scale']} {method}".rstrip()
        return PAINTINGS.get(self.name) or str(self.training.get("style", ""))

    @property
    def trained(self) -> str:
        """How long it was trained, and on how much at once."""
        training = self.training
        if not {"iterations", "batch", "size"} <= training.keys():
            return ""
        return f"{training['iterations']:,} × {training['batch']} crops of {training['size']}²"


def table(networks: Iterable[Network]) -> str:
    """A line for each network."""
    networks = list(networks)
    licences = any(network.license for network in networks)
    rows = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="")
    for column in ("name", "painting or method"):
        rows.add_column(column, no_wrap=True)
    for column in ("parameters", "file"):
        rows.add_column(column, justify="right", no_wrap=True)
    for column in ("trained", *(["licence"] if licences else [])):
        rows.add_column(column, no_wrap=True)
    for network in networks:
        cells = [network.name, network.subject, f"{network.parameters:,}", f"{network.size / 1e6:.1f} MB"]
        rows.add_row(*cells, network.trained, *([network.license or ""] if licences else []))
    return _text(rows)


def details(network: Network) -> str:
    """A line for each thing that the file of a network says, the recipe of its training last."""
    rows = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), show_header=False)
    known = {
        "name": network.name,
        "painting" if "scale" not in network.config else "method": network.subject,
        "parameters": f"{network.parameters:,}",
        "file": f"{network.size / 1e6:.1f} MB",
        "licence": network.license,
    }
    config = {name: value for name, value in network.config.items() if value is not None}
    recipe = {name: value for name, value in network.training.items() if value is not None and name != "network"}
    for title, lines in (("", known), ("network", config), ("training", recipe)):
        if title and lines:
            rows.add_row()
            rows.add_row(title)
        for name, value in lines.items():
            if value:
                rows.add_row(f"  {name}" if title else name, _value(value))
    return _text(rows)


def _value(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {item}" for name, item in value.items())
    return "yes" if value is True else str(value)


def _text(rows: Table) -> str:
    text = io.StringIO()
    Console(file=text, width=WIDTH, color_system=None, markup=False, emoji=False, highlight=False).print(rows)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())
