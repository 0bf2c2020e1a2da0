"""Named networks and loss weights. Plain data, so that the command line can list the names without importing torch."""

from __future__ import annotations

from typing import Any

MINIMUM_SIDE = 16  # pixels: the smallest height and width that a network accepts

# How many times as large the strokes of a painting may be: the photo is painted at one part in so many of its size.
SMALLEST_STROKE, LARGEST_STROKE = 0.1, 100.0
STROKE_SIDE = 1000  # pixels: the longer side of the largest photo that stroke "auto" paints as it is

# The published style networks, as keywords of TransformNet.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": dict(width=32, norm="batch", padding="zero", upsample="transposed", output="tanh"),
    "eccv16": dict(width=32, norm="batch", padding="reflect40", upsample="transposed", output="tanh"),
    "instance": dict(width=16, norm="instance", padding="reflect40", upsample="transposed", output="tanh"),
    "examples": dict(width=32, norm="instance", padding="reflect", upsample="nearest", output="linear"),
}

# A convention says what the loss weights multiply. Listed here: default weights for each convention. The first two
# suit Caffe's VGG-16.
#   paper:    ‖φ − φ'‖²/CHW, Σ‖G − A‖²_F and Σ(dx² + dy²) on 0–255 pixels, per image: the formulas of the paper's text.
#   means:    the authors' code: the style term is a mean over the C² entries; total variation is ½·Σ over the batch.
#   relative: each term is divided by the size of its target: ‖G − A‖²_F / ‖A‖²_F and ‖φ − φ'‖² / ‖φ'‖². The same
#             weights then suit any layer, VGG and style. Total variation is a mean on 0–1 pixels.
CONVENTIONS: dict[str, dict[str, float]] = {
    "paper": dict(content_weight=1.0, style_weight=1e-4, tv_weight=1e-6),
    "means": dict(content_weight=1.0, style_weight=5.0, tv_weight=1e-6),
    "relative": dict(content_weight=0.3, style_weight=1.0, tv_weight=0.0),
}

# The convention of losses outside style transfer: each term is the mean of its criterion, also over the C² entries of a
# Gram matrix, and there is no total variation.
PLAIN_CONVENTION = dict(content_weight=1.0, style_weight=1.0, tv_weight=0.0)

SCALES = (2, 4, 8, 16)  # by which a super-resolution network can enlarge; the paper uses 4 and 8
ARCHITECTURES = ("paper", "srcnn", "srcnn-915")  # super-resolution: the paper's Table 2; SRCNN with 9-5-5 or 9-1-5
