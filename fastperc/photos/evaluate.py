"""Measures super-resolution against ground truth, and shows the scores in tables and figures.

The protocol crops an image to a multiple of the scale, makes it small with an antialiased cubic filter and rounds it to
8 bits. Each method enlarges that. The score compares the rounded BT.601 luma and leaves out a border as wide as the
scale; a file with one channel is compared by its own levels, an RGB file with three equal ones by luma. With this
protocol ×4 bicubic gives the paper's 28.4 dB on Set5.
"""

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
from fastperc.photos.photo import Photo, read_first_frame
from fastperc.presets import MINIMUM_SIDE

Method = Callable[[Photo], Photo]  # enlarges a photo

# The mean scores that the paper reports, by scale and data set: bicubic, its own two networks, and SRCNN.
PAPER_SCORES: dict[tuple[int, str], dict[str, Score]] = {
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
    """The score of ``photo`` against ``truth``, of equal size, without ``border`` pixels on each side."""
    levels, target = photo.levels(), truth.levels()
    inside = slice(border, -border or None)
    x, y = (luma(rgb, truth.gray)[inside, inside] for rgb in (levels, target))
    return Score(psnr(x, y, data_range=255).item(), ssim(x, y, data_range=255).item())


def bicubic(scale: int) -> Method:
    """Antialiased cubic interpolation by ``scale``: the usual baseline."""

    def enlarge(photo: Photo) -> Photo:
        x = photo.tensor()
        large = reference.bicubic(x, (x.shape[2] * scale, x.shape[3] * scale))
        return Photo(_image(reference.to_levels(large)))

    return enlarge


def _image(levels: Tensor) -> Image.Image:
    """Converts uint8 [1, 3, H, W] to an image."""
    return Image.fromarray(levels[0].permute(1, 2, 0).contiguous().numpy())


class Comparison(NamedTuple):
    """An image, and its small copy as each method enlarges it."""

    name: str
    truth: Photo
    pictures: dict[str, Photo]
    scores: dict[str, Score]


def compare(
    paths: Iterable[tuple[str, Path]], methods: Mapping[str, Method], scale: int, blur: float = 0.0
) -> Iterable[Comparison]:
    """Makes each image small, enlarges it with each method, and scores the results.

    Args:
        paths: pairs of name and file.
        methods: the methods by name.
        scale: factor by which the images are made small and enlarged again.
        blur: σ in pixels of a Gaussian blur before the image is made small. Published tables use 0, the paper's
            training uses 1.

    Raises:
        InputError: an image cannot be read or is too small.
    """
    for name, path in paths:
        source = read_first_frame(path)
        photo = source.visible()
        width, height = (side // scale * scale for side in photo.size)
        if min(width, height) < scale * MINIMUM_SIDE:
            raise InputError(
                f"{path}: {photo.width}×{photo.height} is too small; "
                f"both sides need at least {scale * MINIMUM_SIDE} pixels"
            )
        truth = Photo(photo.crop((0, 0, width, height)), gray=source.gray)
        small = Photo(_image(reference.to_levels(reference.degrade(truth.tensor(), scale, blur))))
        pictures = {method: enlarge(small) for method, enlarge in methods.items()}
        scores = {method: score(picture, truth, scale) for method, picture in pictures.items()}
        yield Comparison(name, truth, pictures, scores)


def mean_scores(scores: Sequence[Mapping[str, Score]]) -> dict[str, Score]:
    """The mean score of each method over images."""
    return {
        method: Score(*(sum(values) / len(values) for values in zip(*(by_method[method] for by_method in scores))))
        for method in scores[0]
    }


def paper_scores(folder: Path, scale: int) -> dict[str, Score]:
    """The paper's mean scores for the data set that ``folder`` is named after; empty if the paper has none."""
    name = folder.resolve().name.lower().replace("-", "").replace("_", "")
    return PAPER_SCORES.get((scale, {"b100": "bsd100"}.get(name, name)), {})


def as_markdown(scores: Mapping[str, Mapping[str, Score]], paper: Mapping[str, Score], blur: float = 0.0) -> str:
    """An aligned Markdown table of PSNR in dB / SSIM: a row for each image, their mean and the paper's mean.

    Args:
        scores: by image, then by method.
        paper: the paper's mean scores by method; empty leaves out that row.
        blur: the blur given to :func:`compare`. The paper's scores are without blur; other tables say so in that row.
    """
    methods = list(next(iter(scores.values())))
    rows = [["PSNR / SSIM", *methods]]
    rows += [[name, *(str(by_method[method]) for method in methods)] for name, by_method in scores.items()]
    average = mean_scores(list(scores.values()))
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
    """Writes a CSV file with a row for each image and one called ``mean``; columns ``METHOD_psnr``, ``METHOD_ssim``."""
    methods = list(next(iter(scores.values())))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["image", *(f"{method}_{metric}" for method in methods for metric in Score._fields)])
    for name, by_method in [*scores.items(), ("mean", mean_scores(list(scores.values())))]:
        writer.writerow([name, *(f"{value:.6f}" for method in methods for value in by_method[method])])
    with write_atomically(path) as temporary:
        temporary.write_bytes(text.getvalue().encode("utf-8", "surrogateescape"))  # names of files may be any bytes


PANEL, CAPTION, GAP = 288, 44, 12  # pixels: side of a panel, height of its caption, space between panels


def figure(comparison: Comparison, square: tuple[int, int, int] | None = None) -> Image.Image:
    """Shows one square of the image, as in the supplement's Figures 3 and 4.

    The first panel is the whole image with the square framed. The others are the square in the ground truth and as each
    method restores it, with the method's scores.

    Args:
        comparison: one result of :func:`compare`.
        square: left, top and side in pixels. Default: the square where the pictures differ most, a quarter of the
            shorter side.

    Raises:
        InputError: the square is not inside the image.
    """
    truth = comparison.truth.rgb
    left, top, side = square or _most_different_square(comparison, max(min(truth.size) // 4, 24))
    box = (left, top, left + side, top + side)
    if box[2] > truth.width or box[3] > truth.height:
        raise InputError(
            f"{comparison.name}: the square of {side} pixels at {left},{top} is not inside the image, "
            f"which has {truth.width}×{truth.height}"
        )
    panels = [(_framed(truth, box), comparison.name, "")]
    for name, photo in {"ground truth": comparison.truth, **comparison.pictures}.items():
        crop = photo.rgb.crop(box).resize((PANEL, PANEL), Image.Resampling.NEAREST)
        panels.append((crop, name, str(comparison.scores.get(name, "PSNR / SSIM"))))
    return _sheet(panels)


def _framed(image: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
    """A copy of ``image`` with a red frame around ``box``, resized to the height of a panel."""
    left, top, right, bottom = box
    framed = image.copy()
    ImageDraw.Draw(framed).rectangle(
        (left - 1, top - 1, right, bottom), outline="red", width=max(2, (right - left) // 30)
    )
    framed.thumbnail((10 * PANEL, PANEL), Image.Resampling.LANCZOS)
    return framed.resize((round(framed.width * PANEL / framed.height), PANEL), Image.Resampling.LANCZOS)


def _sheet(panels: Sequence[tuple[Image.Image, str, str]]) -> Image.Image:
    """Images of equal height side by side, each above its two lines of caption."""
    sheet = Image.new("RGB", (sum(panel.width + GAP for panel, *_ in panels) - GAP, PANEL + CAPTION), "white")
    draw, font, left = ImageDraw.Draw(sheet), ImageFont.load_default(16), 0
    for panel, *lines in panels:
        sheet.paste(panel, (left, 0))
        for row, line in enumerate(lines):
            line = line if len(line) <= 32 else f"…{line[-31:]}"
            draw.text((left + panel.width / 2, PANEL + 4 + 20 * row), line, fill="black", font=font, anchor="ma")
        left += panel.width + GAP
    return sheet


def _most_different_square(comparison: Comparison, side: int) -> tuple[int, int, int]:
    """The square (left, top, side) in which the pictures and the ground truth differ most, by the variance of luma."""
    lumas = torch.stack([luma(photo.levels()) for photo in (comparison.truth, *comparison.pictures.values())])
    variances = F.avg_pool2d(lumas.var(dim=0)[None, None], side, stride=4)[0, 0]
    row, column = divmod(int(variances.argmax()), variances.shape[1])
    return 4 * column, 4 * row, side
