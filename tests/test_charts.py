"""Charts of losses: where lines and bands lie."""

from __future__ import annotations

import numpy as np
import pytest
from pictures import pixels
from PIL import ImageColor

from fastperc.training import charts


def test_running_mean():
    values = np.random.default_rng(0).uniform(1, 2, 40)
    expected = np.convolve(values, np.ones(7) / 7, "valid")
    assert charts.running_mean(list(values), 7) == pytest.approx(list(expected))
    assert charts.running_mean([1.0, 2.0], 3) == []


def rows_of(image, color):
    levels = pixels(image)
    return np.nonzero((np.abs(levels - ImageColor.getrgb(color)).max(axis=2) < 20).any(axis=1))[0]


def test_losses_lie_on_a_logarithmic_scale():
    colors = ["#ff0000", "#00ff00", "#0000ff"]
    curves = [charts.Curve([10.0**i] * 5, color) for i, color in enumerate(colors)]
    image = charts.loss_chart([charts.Panel("", curves)])
    low, middle, high = (rows_of(image, color).mean() for color in colors)
    assert low - middle == pytest.approx(middle - high, abs=1) and low - middle > 50


def test_a_band_lies_between_its_edges_and_panels_side_by_side():
    band = charts.Band([1.0] * 4, [2.0] * 4, "#ff0000", opacity=1.0)
    line = charts.Curve([4.0] * 4, "#0000ff")
    image = charts.loss_chart([charts.Panel("left", [band]), charts.Panel("right", [line])])
    left, right = (image.crop((x, 0, x + image.width // 2, image.height)) for x in (0, image.width // 2))
    rows = rows_of(left, "#ff0000")
    assert len(rows) > 50 and (np.diff(rows) == 1).all() and not len(rows_of(right, "#ff0000"))
    distance = rows.min() - rows_of(right, "#0000ff").mean()
    assert distance == pytest.approx(len(rows), abs=3)


@pytest.mark.parametrize("values", [[], [0.0], [1.0, -1.0], [float("nan")], [float("inf")]])
def test_values_without_a_logarithm_are_refused(values):
    with pytest.raises(ValueError, match="finite values above 0"):
        charts.loss_chart([charts.Panel("", [charts.Curve(values, "black")])])


def test_one_iteration_makes_a_chart():
    assert charts.loss_chart([charts.Panel("", [charts.Curve([1.0], "black")])]).size[0] > 0


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("title", ["no text \udcff.png", "a$_x$b$.png", "$\\frac$", "日本.png", "new\nline"])
def test_the_name_of_any_file_is_a_title(title):
    assert charts.loss_chart([charts.Panel(title, [charts.Curve([1.0, 2.0], "black")])]).size[0] > 0
