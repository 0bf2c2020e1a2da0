"""Paints a clip: as a file, with its sound, or frame by frame, to do something of your own with each picture.

python examples/video.py clip.mp4 -o painted.mp4 --smooth 0.5
python examples/video.py clip.gif -o frames/

Films need `pip install 'fastperc[video]'`; animated GIF, WebP and PNG do not.
"""

from __future__ import annotations

import argparse
from contextlib import closing
from pathlib import Path

import torch
from PIL import Image

from fastperc import freeze, load
from fastperc.video.jobs import ClipOptions, open_clip, paint_clip
from fastperc.video.painters import StyleFrames, painted


def main() -> None:
    parser = argparse.ArgumentParser(description="Paints a clip.")
    parser.add_argument("clip", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True, help="a clip, or a folder for the frames")
    parser.add_argument("--style", default="great_wave", help="a style that ships, or a file of a network")
    parser.add_argument("--size", type=int, help="pixels of the longer side; default: the clip's")
    parser.add_argument("--smooth", type=float, default=0.0, help="less flicker, from 0 to 1")
    arguments = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    painter = StyleFrames(freeze(load(arguments.style), device=device))

    if arguments.out.suffix:  # a file: reading, painting and writing run side by side, and sound is copied
        options = ClipOptions(long_side=arguments.size, smooth=arguments.smooth)
        count = paint_clip(arguments.clip, arguments.out, painter, options)
    else:  # frames: any iterable of `fastperc.video.clip.Frame` will do, such as a camera's
        arguments.out.mkdir(parents=True, exist_ok=True)
        with closing(open_clip(arguments.clip, long_side=arguments.size)) as clip:
            for count, frame in enumerate(painted(clip.frames(), painter, arguments.smooth), start=1):
                picture = Image.fromarray(frame.levels.numpy())  # levels: uint8 [H, W, 3]
                picture.save(arguments.out / f"{count:06}.png")
    print(f"{arguments.out}: {count} frames")


if __name__ == "__main__":
    main()
