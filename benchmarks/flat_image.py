"""What style networks make of a flat grey area, and its spectrum: dots and hatches at a fixed period are bright points.

    python benchmarks/flat_image.py [NETWORK ...] [--out docs/flat-image.png]

A NETWORK is a style that ships or a file; default: all that ship. Prints the highest peak of each spectrum.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image
from torch import Tensor

from fastperc import freeze, load
from fastperc.cli.options import path
from fastperc.evaluation import flat_picture, highest_peak, power_spectrum
from fastperc.files import check_writable, write_atomically
from fastperc.training.charts import DPI, MUTED, STYLE, check_available
from fastperc.weights import STYLES

DETAIL = 96  # pixels of the picture shown, a side
DECIBELS = (-10, 30)  # black and white in the spectrum, above its median
COLUMN, HEIGHT = 2.3, 5.0  # inches


def main(arguments: list[str] | None = None) -> None:
    """Draws the figure and prints the peaks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=list(STYLES), metavar="NETWORK", help="default: all that ship")
    parser.add_argument("--out", type=path, metavar="FILE", help="the figure to draw; default: none")
    given = parser.parse_args(arguments)
    if given.out is not None:
        check_available()
        check_writable(given.out)
    pictures = {name: flat_picture(freeze(load(name))) for name in given.networks}
    for name, picture in pictures.items():
        print(f"{name}: {highest_peak(power_spectrum(picture.mean(0)))}")
    if given.out is not None:
        with write_atomically(given.out) as temporary:
            figure_of(pictures).save(temporary)


def figure_of(pictures: dict[str, Tensor]) -> Image.Image:
    """A column for each network: a part of its picture [3, H, W] above the spectrum of the whole."""
    import numpy as np
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure((COLUMN * len(pictures), HEIGHT), DPI // 2, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        columns = figure.subplots(2, len(pictures), squeeze=False).T
        for (upper, lower), (name, picture) in zip(columns, pictures.items()):
            upper.imshow(picture[:, :DETAIL, :DETAIL].permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
            upper.set_title(Path(name).stem, loc="left")
            upper.set_axis_off()
            power = power_spectrum(picture.mean(0))
            decibels = 10 * (power / power.median()).clamp_min(1e-9).log10()
            lower.imshow(decibels.numpy(), "gray", vmin=DECIBELS[0], vmax=DECIBELS[1], extent=(-0.5, 0.5, 0.5, -0.5))
            lower.set_title(f"highest peak {highest_peak(power).decibels:.1f} dB", loc="left", color=MUTED)
            lower.set_xlabel("cycles per pixel")
        canvas.draw()
        return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


if __name__ == "__main__":
    main()
