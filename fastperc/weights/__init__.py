"""The networks that ship with the package, by name. Imports nothing heavy: the command line lists them in its help."""

from pathlib import Path

HERE = Path(__file__).parent
STYLES = {path.stem: path for path in sorted(HERE.glob("styles/*.safetensors"))}
SUPER_RESOLUTION = {path.stem: path for path in sorted(HERE.glob("super_resolution/*.safetensors"))}  # x4_pixel, …
