"""Super-resolution against ground truth: images are made small, enlarged by each method and compared."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fastperc import reference
from fastperc.errors import InputError
from fastperc.evaluation import Score, luma, psnr, ssim
from fastperc.files import write_atomically
from fastperc.photos.photo import Photo, read_image
from fastperc.presets import MINIMUM_SIDE

Method = Callable[[Photo], Photo]  # a small photo → the large one


# The means that the paper reports: of bicubic, its two networks and SRCNN, by scale and set.
PAPER: dict[tuple[int, str], dict[str, Score]] = {
    key: {method: Score(*score) for method, score in scores.items()}
    for key, scores in {
        (4, "set5"): dict(
            bicubic=(28.43, 0.8114), pixel=(28.40, 0.8205), srcnn=(30.48, 0.8628), feature=(27.09, 0.7680)
        ),
        (4, "set14"): dict(
            bicubic=(25.99, 0.7301), pixel=(25.75, 0.6994), srcnn=(27.49, 0.7503), feature=(24.99, 0.6731)
        ),
        (4, "bsd100"): dict(
            bicubic=(25.96, 0.682), pixel=(25.91, 0.6680), srcnn=(26.90, 0.7101), feature=(24.95, 0.6317)
        ),
        (8, "set5"): dict(bicubic=(23.80, 0.6455), pixel=(24.77, 0.6864), feature=(23.26, 0.7058)),
        (8, "set14"): dict(bicubic=(22.37, 0.5518), pixel=(23.02, 0.5787), feature=(21.64, 0.5837)),
        (8, "bsd100"): dict(bicubic=(22.11, 0.5322), pixel=(22.54, 0.5526), feature=(21.35, 0.5474)),
    }.items()
}


def score(photo: Photo, truth: Photo, border: int) -> Score:
    """``photo`` against ``truth``, of the same size, without ``border`` pixels on each side."""
    levels, target = photo.levels(), truth.levels()
    gray = truth.is_gray()
    inside = slice(border, -border or None)
    x, y = (luma(one, gray)[inside, inside] for one in (levels, target))
    return Score(psnr(x, y, data_range=255).item(), ssim(x, y, data_range=255).item())


def bicubic(scale: int) -> Method:
    """The method that everything is measured against."""

    def enlarge(photo: Photo) -> Photo:
        x = photo.tensor()
        large = reference.bicubic(x, (x.shape[2] * scale, x.shape[3] * scale))
        return Photo(_image(reference.to_levels(large)))

    return enlarge


def _image(levels: Tensor) -> Image.Image:
    """uint8 [1, 3, H, W] as an image."""
    return Image.fromarray(levels[0].permute(1, 2, 0).contiguous().numpy())


class Comparison(NamedTuple):
    """An image, and what each method makes of it when it has been made small."""

    name: str
    truth: Photo
    pictures: dict[str, Photo]
    scores: dict[str, Score]


def compare(
    paths: Iterable[tuple[str, Path]], methods: Mapping[str, Method], scale: int, blur: float = 0.0
) -> Iterable[Comparison]:
    """Runs ``methods`` on each image; (name, file) pairs.

    Args:
        paths: names and files.
        methods: by name.
        scale: how many times smaller the images are made, and enlarged again.
        blur: σ in pixels of a Gaussian before that: none in the published tables, 1 as the paper trains.

    Raises:
        InputError: an image that cannot be read, or is too small.
    """
    for name, path in paths:
        photo = read_image(path).rgb
        width, height = (side // scale * scale for side in photo.size)
        if min(width, height) < scale * MINIMUM_SIDE:
            raise InputError(
                f"{path}: {photo.width}×{photo.height} is too small, both sides need {scale * MINIMUM_SIDE} pixels"
            )
        truth = Photo(photo.crop((0, 0, width, height)))
        small = Photo(_image(reference.to_levels(reference.degrade(truth.tensor(), scale, blur))))
        pictures = {method: enlarge(small) for method, enlarge in methods.items()}
        scores = {method: score(picture, truth, scale) for method, picture in pictures.items()}
        yield Comparison(name, truth, pictures, scores)


def mean(scores: Sequence[Mapping[str, Score]]) -> dict[str, Score]:
    """Each method's mean over images."""
    return {
        method: Score(*(sum(values) / len(values) for values in zip(*(one[method] for one in scores))))
        for method in scores[0]
    }


def published(folder: Path, scale: int) -> dict[str, Score]:
    """The paper's means for the set that ``folder`` is named after, if it has any."""
    name = folder.resolve().name.lower().replace("-", "").replace("_", "")
    return PAPER.get((scale, {"b100": "bsd100"}.get(name, name)), {})


def as_markdown(scores: Mapping[str, Mapping[str, Score]], paper: Mapping[str, Score], blur: float = 0.0) -> str:
    """An aligned Markdown table: PSNR in dB / SSIM of each image by each method, their means, and the paper's.

    ``blur`` is what :func:`compare` was given: the paper's figures are without.
    """
    methods = list(next(iter(scores.values())))
    rows = [["PSNR / SSIM", *methods]]
    rows += [[name, *(str(one[method]) for method in methods)] for name, one in scores.items()]
    average = mean(list(scores.values()))
    rows += [["**mean**", *(f"**{average[method]}**" for method in methods)]]
    if paper:
        rows += [["the paper's mean" + ", no blur" * bool(blur), *(str(paper.get(method, "–")) for method in methods)]]
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    lines = (
        [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))] for row in rows
    )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_csv(path: Path, scores: Mapping[str, Mapping[str, Score]]) -> None:
    """A row for each image and one called ``mean``; columns ``METHOD_psnr`` and ``METHOD_ssim``."""
    methods = list(next(iter(scores.values())))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", *(f"{method}_{kind}" for method in methods for kind in Score._fields)])
    for name, one in [*scores.items(), ("mean", mean(list(scores.values())))]:
        writer.writerow([name, *(f"{value:.6f}" for method in methods for value in one[method])])
    with write_atomically(path) as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8")


PANEL, CAPTION, GAP = 288, 44, 12  # pixels: side of a panel, height of what is written below it, between panels


def figure(comparison: Comparison, square: tuple[int, int, int] | None = None) -> Image.Image:
    """The image with a square of it framed, and that square as it is and as each method has it, with its scores (as in
    the supplement's Figures 3 and 4).

    ``square`` is left, top and side in pixels. Default: where the pictures differ most, a quarter of the shorter side.

    Raises:
        InputError: the square is not within the image.
    """
    truth = comparison.truth.rgb
    left, top, side = square or _most_different(comparison, max(min(truth.size) // 4, 24))
    box = (left, top, left + side, top + side)
    if box[2] > truth.width or box[3] > truth.height:
        raise InputError(
            f"{comparison.name}: {side} pixels a side at {left},{top} are not within {truth.width}×{truth.height}"
        )

    whole = truth.copy()
    ImageDraw.Draw(whole).rectangle(
        (left - 1, top - 1, left + side, top + side), outline="red", width=max(2, side // 30)
    )
    whole.thumbnail((10 * PANEL, PANEL), Image.Resampling.LANCZOS)
    whole = whole.resize((round(whole.width * PANEL / whole.height), PANEL), Image.Resampling.LANCZOS)
    panels = [(whole, comparison.name, "")]
    for name, photo in {"ground truth": comparison.truth, **comparison.pictures}.items():
        crop = photo.rgb.crop(box).resize((PANEL, PANEL), Image.Resampling.NEAREST)
        panels.append((crop, name, str(comparison.scores.get(name, "PSNR / SSIM"))))

    sheet = Image.new("RGB", (sum(panel.width + GAP for panel, *_ in panels) - GAP, PANEL + CAPTION), "white")
    draw, font, left = ImageDraw.Draw(sheet), ImageFont.load_default(16), 0
    for panel, *lines in panels:
        sheet.paste(panel, (left, 0))
        for row, line in enumerate(lines):
            line = line if len(line) <= 32 else f"…{line[-31:]}"
            draw.text((left + panel.width / 2, PANEL + 4 + 20 * row), line, fill="black", font=font, anchor="ma")
        left += panel.width + GAP
    return sheet


def _most_different(comparison: Comparison, side: int) -> tuple[int, int, int]:
    """The square in which the pictures differ most from one another, the truth among them."""
    pictures = torch.stack([luma(one.levels()) for one in (comparison.truth, *comparison.pictures.values())])
    sums = F.avg_pool2d(pictures.var(dim=0)[None, None], side, stride=4)[0, 0]
    row, column = divmod(int(sums.argmax()), sums.shape[1])
    return 4 * column, 4 * row, side
