"""The networks that ship with the package: name → file. Imports nothing heavy, because ``--help`` lists the names."""

from pathlib import Path

FOLDER = Path(__file__).parent
STYLES = {path.stem: path for path in sorted(FOLDER.glob("styles/*.safetensors"))}
SUPER_RESOLUTION = {path.stem: path for path in sorted(FOLDER.glob("super_resolution/*.safetensors"))}  # x4_pixel, …
