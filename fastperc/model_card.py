"""Model cards: the README.md of a network on the Hugging Face Hub."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fastperc.hub import Address

HOMEPAGE = "https://github.com/fastperc/fastperc"
KINDS = {  # of networks: a tag, and what they do
    "TransformNet": ("style-transfer", "Paints photos in one style."),
    "SuperResolutionNet": ("super-resolution", "Enlarges photos."),
    "SRCNN": ("super-resolution", "Enlarges photos (SRCNN)."),
}


def model_card(address: Address, metadata: Mapping[str, str], license: str | None = None) -> str:
    """A card in Markdown, with a front matter in YAML, made from the metadata of a network's file.

    Args:
        address: of the file on the hub.
        metadata: that :func:`fastperc.save` wrote.
        license: an identifier such as ``bsd-3-clause``. Default: the metadata's, or none.
    """
    tag, purpose = KINDS[metadata["network"]]
    license = license or metadata.get("license")
    front = ["library_name: fastperc", "pipeline_tag: image-to-image"]
    front += [f"license: {json.dumps(license.lower())}"] if license else []  # a string of JSON is one of YAML
    front += ["tags:", "- fastperc", f"- {tag}"]
    command = "stylize" if tag == "style-transfer" else "sr upscale"
    parts = [
        "\n".join(["---", *front, "---"]),
        f"# {address.repo.rpartition('/')[2]}",
        f"{purpose} A network of [fastperc]({HOMEPAGE}), after Johnson, Alahi and Fei-Fei (2016).",
        f"```bash\npip install 'fastperc[hub]'\nfastperc {command} photo.jpg --model {address}\n```",
        "```python\nfrom fastperc import freeze, load\n\n"
        f'picture = freeze(load("{address}"))("photo.jpg")  # a PIL image\n```',
    ]
    if metadata["network"] == "SRCNN":  # which freeze does not take
        parts.pop()
    for title, key in (("Network", "config"), ("Training", "training")):
        if settings := json.loads(metadata.get(key) or "{}"):
            parts.append(f"## {title}\n\n{_table(settings)}")
    return "\n\n".join(parts) + "\n"


def _table(settings: Mapping[str, Any]) -> str:
    rows = [f"| {_cell(name)} | {_cell(value)} |" for name, value in settings.items() if value is not None]
    return "\n".join(["| setting | value |", "|---|---|", *rows])


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return " ".join(text.split()).replace("|", "\\|").replace("`", "'").replace("<", "&lt;")
