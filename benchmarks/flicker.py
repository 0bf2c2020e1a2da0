"""Measures how much painted clips flicker, with and without ``--smooth``: the table of ``docs/video.md``.

    python benchmarks/flicker.py                     # prints the table
    python benchmarks/flicker.py --write             # and puts it into docs/video.md

The clip is a still photo with a square that moves across it, without and with noise, encoded as H.264. It needs
``pip install 'fastperc[video]'``, and takes about a minute on two cores.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastperc import freeze, load, read_image
from fastperc.video.jobs import open_clip
from fastperc.video.painters import StyleFrames
from fastperc.video.smoothing import Smoother, flicker

ROOT = Path(__file__).resolve().parent.parent
PHOTO, PAGE = ROOT / "examples" / "chelsea.jpg", ROOT / "docs" / "video.md"
MARKERS = "<!-- flicker -->", "<!-- /flicker -->"
SIZE = 320, 214  # pixels; H.264 needs even sides
FRAMES, RATE, CRF = 20, 25, 18
SQUARE, STEP = 32, 8  # pixels: its side, and how far it moves from frame to frame
NOISE = 0, 2  # standard deviation in levels
STRENGTHS = 0.0, 0.25, 0.5, 1.0  # of --smooth
STYLES = "great_wave", "starry_night"


def levels(index: int, photo: np.ndarray, noise: float, generator: np.random.Generator) -> np.ndarray:
    """A frame of the clip, uint8 [H, W, 3]."""
    frame = photo.astype(np.float64)
    left, top = STEP * index, photo.shape[0] // 2
    frame[top : top + SQUARE, left : left + SQUARE] = (240, 60, 40)
    return (frame + noise * generator.standard_normal(frame.shape)).round().clip(0, 255).astype(np.uint8)


def write_clip(path: Path, photo: np.ndarray, noise: float, frames: int = FRAMES) -> None:
    """Writes the clip by PyAV, as H.264."""
    import av

    generator = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"crf": str(CRF)})
        stream.height, stream.width = photo.shape[:2]
        stream.pix_fmt = "yuv420p"
        for index in range(frames):
            frame = av.VideoFrame.from_ndarray(levels(index, photo, noise, generator), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def read_clip(path: Path) -> list[Tensor]:
    """The frames as a player shows them, each uint8 [H, W, 3]."""
    with closing(open_clip(path)) as clip:
        return [frame.levels for frame in clip.frames()]


def measured(frames: Sequence[Tensor], pictures: Sequence[Tensor], strength: float) -> float:
    """The flicker of ``pictures``, which a network painted of ``frames``, after smoothing."""
    if strength:
        smoother = Smoother(strength)
        pictures = [smoother(frame, picture) for frame, picture in zip(frames, pictures)]
    return flicker(frames, pictures)


def table(styles: Sequence[str] = STYLES, frames: int = FRAMES, size: tuple[int, int] = SIZE) -> str:
    """Measures, and returns the table in Markdown."""
    photo = np.asarray(read_image(PHOTO).resize(size, Image.Resampling.LANCZOS))
    strengths = [f"`--smooth {strength:g}`" if strength else "no smoothing" for strength in STRENGTHS]
    lines = [f"| style | noise of the clip | {' | '.join(strengths)} |", "|---|---|" + "---:|" * len(STRENGTHS)]
    with tempfile.TemporaryDirectory() as folder:
        clips = {}
        for noise in NOISE:
            path = Path(folder, f"{noise}.mp4")
            write_clip(path, photo, noise, frames)
            clips[noise] = read_clip(path)
    for style in styles:
        engine = freeze(load(style))
        for noise, clip in clips.items():
            pictures = list(StyleFrames(engine)(clip))
            values = [f"{measured(clip, pictures, strength):.2f}" for strength in STRENGTHS]
            lines.append(f"| `{style}` | {f'{noise} levels' if noise else 'none'} | {' | '.join(values)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measures the flicker of painted clips.")
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.relative_to(ROOT)}")
    options = parser.parse_args(arguments)
    rendered = table()
    print(rendered)
    if options.write:
        before, begin, rest = PAGE.read_text(encoding="utf-8").partition(MARKERS[0])
        _, end, after = rest.partition(MARKERS[1])
        if not end:
            sys.exit(f"{PAGE} has no {' … '.join(MARKERS)}")
        PAGE.write_text(f"{before}{begin}\n{rendered}\n{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
