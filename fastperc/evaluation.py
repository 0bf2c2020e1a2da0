"""Super-resolution against ground truth: PSNR and SSIM as the paper reports them, in tables and in pictures.

The protocol, with which ×4 bicubic gives the paper's 28.4 dB on Set5: the image, cropped to a multiple of the scale,
is made small by an antialiased cubic and rounded to 8 bits; what a method makes of that is compared on the rounded
BT.601 luma, a border of as many pixels as the scale left out. A gray image is compared by its own levels.
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
from fastperc.files import write_atomically
from fastperc.images import Photo, read_image
from fastperc.presets import MINIMUM_SIDE

Method = Callable[[Photo], Photo]  # a small photo → the large one


class Score(NamedTuple):
    """How close a picture comes to the truth."""

    psnr: float  # dB
    ssim: float

    def __str__(self) -> str:
        return f"{self.psnr:.2f} / {self.ssim:.4f}"


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


def psnr(x: Tensor, target: Tensor, data_range: float = 1.0) -> Tensor:
    """Peak signal-to-noise ratio in dB, 10 · log₁₀(``data_range``² / mean squared error), over all elements.

    Args:
        x, target: equal shapes, any; computed in float64.
        data_range: from the darkest to the brightest value possible: 1 for RGB in 0–1, 255 for levels.

    Returns:
        A float64 scalar; infinite where the two are equal.

    Raises:
        ValueError: the shapes differ.
    """
    _check_shapes(x, target)
    error = (x.double() - target.double()).square().mean()
    return 10 * torch.log10(data_range**2 / error)


def ssim(x: Tensor, target: Tensor, data_range: float = 1.0) -> Tensor:
    """Structural similarity (Wang et al. 2004): Gaussian windows of 11×11, σ = 1.5, about each pixel.

    Args:
        x, target: [..., H, W] with H and W of at least 6, mirrored outwards; computed in float64.
        data_range: as for :func:`psnr`.

    Returns:
        The mean over all pixels, a float64 scalar; 1 where the two are equal.

    Raises:
        ValueError: the shapes differ, or are too small.
    """
    _check_shapes(x, target)
    if x.dim() < 2 or min(x.shape[-2:]) < 6:
        raise ValueError(f"ssim needs [..., H, W] with H and W of at least 6, got {list(x.shape)}")
    offsets = torch.arange(-5, 6, dtype=torch.float64, device=x.device)
    kernel = torch.exp(-0.5 * (offsets / 1.5) ** 2)
    kernel = kernel / kernel.sum()

    def mean(values: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(values, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))

    planes = (values.double().reshape(-1, 1, *values.shape[-2:]) for values in (x, target))
    x, y = (F.pad(plane, (5, 5, 5, 5), mode="reflect") for plane in planes)
    mean_x, mean_y = mean(x), mean(y)
    variance_x, variance_y = mean(x * x) - mean_x**2, mean(y * y) - mean_y**2
    covariance = mean(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return (luminance * structure).mean()


def _check_shapes(x: Tensor, target: Tensor) -> None:
    if x.shape != target.shape:
        raise ValueError(f"needs equal shapes, got {list(x.shape)} and {list(target.shape)}")


def score(photo: Photo, truth: Photo, border: int) -> Score:
    """``photo`` against ``truth``, of the same size, without ``border`` pixels on each side."""
    levels, target = photo.levels(), truth.levels()
    gray = truth.is_gray()
    inside = slice(border, -border or None)
    x, y = (luma(one, gray)[inside, inside] for one in (levels, target))
    return Score(psnr(x, y, data_range=255).item(), ssim(x, y, data_range=255).item())


def luma(levels: Tensor, gray: bool = False) -> Tensor:
    """BT.601's Y of uint8 ``levels`` [H, W, 3], from 16 to 235 and rounded, as MATLAB's rgb2ycbcr; float64 [H, W].

    Of a ``gray`` image the level itself, as the literature has it for Set14's.
    """
    if gray:
        return levels[..., 0].double()
    weights = torch.tensor([65.481, 128.553, 24.966], dtype=torch.float64) / 255
    return (levels.double() @ weights + 16).round()


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
