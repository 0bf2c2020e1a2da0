"""The styles that ship with the package, by name. Imports nothing heavy: the command line lists them in its help."""

from pathlib import Path

STYLES = {path.stem: path for path in sorted(Path(__file__).parent.glob("*.safetensors"))}
