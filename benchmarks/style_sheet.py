"""The sheet of the styles that ship: each row is a photo, and what each style makes of it.

python benchmarks/style_sheet.py --out docs/styles.jpg
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from fastperc import freeze, load
from fastperc.cli.options import path
from fastperc.files import write_atomically
from fastperc.photos.photo import read_image
from fastperc.photos.sheet import labelled_sheet
from fastperc.weights import STYLES

EXAMPLES = Path(__file__).parents[1] / "examples"
# In the public domain, from scikit-image's sample data; examples/README.md has the credits.
PHOTOS = {
    "Chelsea the cat": EXAMPLES / "chelsea.jpg",
    "Eileen Collins": EXAMPLES / "photos" / "astronaut.jpg",
    "coffee": EXAMPLES / "photos" / "coffee.jpg",
    "DSCOVR on Falcon 9": EXAMPLES / "photos" / "rocket.jpg",
}
QUALITY = 85  # of a JPEG
CELL = (300, 200)  # pixels: the pictures are painted at the photos' own size and shown at this one


def main(arguments: list[str] | None = None) -> None:
    """Writes the sheet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=path, metavar="FILE", required=True, help="the picture to write")
    given = parser.parse_args(arguments)
    with write_atomically(given.out) as temporary:
        labelled_sheet(cells(), columns=1 + len(STYLES)).save(temporary, quality=QUALITY, optimize=True)


def cells() -> Iterator[tuple[str, Image.Image]]:
    """Each photo with its name, and then its painting in each style with the style's."""
    engines = {name: freeze(load(name)) for name in STYLES}
    for label, file in PHOTOS.items():
        photo = read_image(file).rgb
        for name, picture in ((label, photo), *((name, engine(photo)) for name, engine in engines.items())):
            yield name, picture.resize(CELL, Image.Resampling.LANCZOS)


if __name__ == "__main__":
    main()
