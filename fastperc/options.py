"""What the texts of the command line's options stand for. Python alone: `--help` is to be instant."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastperc.presets import MINIMUM_SIDE


def path(text: str) -> Path:
    """A path; an empty one, of a shell variable never set, is not taken for the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("an empty name")
    return Path(text)


def natural(text: str) -> int:
    """A whole number from 0 up, as large as a machine's integer."""
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 2^63")
    return value


def positive(text: str) -> int:
    """A whole number from 1 up."""
    value = natural(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return value


def positive_float(text: str) -> float:
    """A finite number above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def weight(text: str) -> float:
    """A finite number from 0 up."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number from 0 up")
    return value


def tile(text: str) -> int | str:
    """``auto``, ``off``, or a number of pixels that a network can paint."""
    if text in ("auto", "off"):
        return text
    side = int(text)
    if side < MINIMUM_SIDE:
        raise argparse.ArgumentTypeError(f"{text} is none of auto, off and the numbers from {MINIMUM_SIDE} up")
    return side


def fraction(text: str) -> float:
    """A number from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def names(text: str) -> tuple[str, ...]:
    """Names between commas, at least one."""
    found = tuple(name.strip() for name in text.split(",") if name.strip())
    if not found:
        raise argparse.ArgumentTypeError("no name given")
    return found


def sizes(text: str) -> list[tuple[int, int]]:
    """Widths and heights of sizes between commas, such as ``512,1920x1080``."""
    found = []
    for name in names(text):
        sides = name.lower().replace("×", "x").split("x")
        if len(sides) > 2 or not all(side.isdecimal() and int(side) >= MINIMUM_SIDE for side in sides):
            raise argparse.ArgumentTypeError(f"{name} is no size like 512 or 1920x1080, {MINIMUM_SIDE} pixels and more")
        found.append((int(sides[0]), int(sides[-1])))
    return found
