"""A picture too large for the format of its output is refused before it is painted."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
from pictures import picture
from PIL import Image
from refusals import check_refused


@pytest.fixture
def refused(run, here, monkeypatch):
    """Runs a command that must fail in one line and leave no trace, without painting anything."""

    def tiles(self, *arguments):
        raise AssertionError("painted")

    monkeypatch.setattr("fastperc.engine.engine.Engine.tiles", tiles)
    return partial(check_refused, run, here)


@pytest.mark.parametrize(("out", "width"), [("out.jpg", 65_501), ("out.webp", 16_384), ("out.tga", 65_536)])
def test_stylize(refused, here, model, out, width):
    Image.new("L", (width, 16)).save("long.png")
    refused("stylize", "long.png", "-o", out, "--model", model, says=f"{out}: cannot be written as")


def test_stylize_of_several_skips_it(run, here, model):
    Image.new("L", (65_501, 16)).save("long.png")
    Path("a.jpg").symlink_to("long.png")
    picture(32, 24).save("b.jpg")
    status, _, err = run("stylize", "a.jpg", "b.jpg", "-o", "out", "--model", model)
    assert status == 2 and [path.name for path in Path("out").iterdir()] == ["b.jpg"]
    assert err.startswith(
        "skipped out/a.jpg: cannot be written as JPEG, which holds 65,500 pixels a side, not 65501×16; use"
    )


def test_stylize_counts_the_size_after_resizing(run, refused, here, model):
    picture(640, 160).save("wide.png")
    refused(
        "stylize", "wide.png", "-o", "out.webp", "--size", 16_384, "--model", model, says="which holds 16,383 pixels"
    )


def test_upscale(refused, here, sr_model):
    Image.new("L", (16_376, 16)).save("long.png")
    refused(
        "sr",
        "upscale",
        "long.png",
        "-o",
        "out.jpg",
        "--model",
        sr_model,
        says="holds 65,500 pixels a side, not 65504×64",
    )


def test_optimize(refused, here, vgg_options):
    Image.new("L", (65_501, 16)).save("long.png")
    refused(
        "optimize", "long.png", "--style", "photo.png", "-o", "out.jpg", *vgg_options, says="holds 65,500 pixels a side"
    )
