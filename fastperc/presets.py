"""The networks and loss weights that have names. Plain data: the command line lists them before torch is imported."""

from __future__ import annotations

from typing import Any

MINIMUM_SIDE = 16  # pixels: what a network takes

# What each published family of networks is; a keyword of TransformNet replaces one entry.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": dict(width=32, norm="batch", padding="zero", upsample="transposed", output="tanh"),
    "eccv16": dict(width=32, norm="batch", padding="reflect40", upsample="transposed", output="tanh"),
    "instance": dict(width=16, norm="instance", padding="reflect40", upsample="transposed", output="tanh"),
    "examples": dict(width=32, norm="instance", padding="reflect", upsample="nearest", output="linear"),
}

# What the weights multiply, by convention; and weights that suit it, those of the first two with Caffe's VGG.
#   paper:    ‖φ − φ'‖²/CHW, Σ‖G − A‖²_F and Σ(dx² + dy²) on 0–255 pixels, per image: the text's formulas.
#   means:    the authors' code: the style term a mean over the C² entries, the variation ½·Σ over the whole batch.
#   relative: each term against the size of its target, ‖G − A‖²_F / ‖A‖²_F and ‖φ − φ'‖² / ‖φ'‖², so that weights mean
#             the same for every layer, VGG and style; the variation a mean on 0–1 pixels.
CONVENTIONS: dict[str, dict[str, float]] = {
    "paper": dict(content_weight=1.0, style_weight=1e-4, tv_weight=1e-6),
    "means": dict(content_weight=1.0, style_weight=5.0, tv_weight=1e-6),
    "relative": dict(content_weight=0.3, style_weight=1.0, tv_weight=0.0),
}

SCALES = (2, 4, 8, 16)  # how many times a super-resolution network may enlarge; the paper's are 4 and 8
ARCHITECTURES = ("paper", "srcnn", "srcnn-915")  # of super-resolution: Table 2; Dong et al.'s 9-5-5 and 9-1-5
