"""What the browser sends, which comes unchecked, and what the page says of errors."""

from __future__ import annotations

import html
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastperc.errors import InputError
from fastperc.presets import LARGEST_STROKE, SMALLEST_STROKE
from fastperc.web.studio import Cancelled, Studio, StyleOptions

SMALLEST_SIDE, LARGEST_SIDE = 64, 8192  # pixels: the longer side of what is painted


def upload_path(upload: Any, studio: Studio, kind: str) -> Path:
    """The file of an upload.

    Raises:
        InputError: there is none.
    """
    path = upload.get("path") if isinstance(upload, dict) else None
    if not isinstance(path, str) or not Path(path).resolve().is_relative_to(studio.folder):
        raise InputError(f"choose a {kind} first")
    return Path(path)


def number(value: Any, low: float, high: float, name: str) -> float:
    """``value`` as a number.

    Raises:
        InputError: it is none between ``low`` and ``high``.
    """
    try:
        if low <= float(value) <= high:
            return float(value)
    except (TypeError, ValueError):
        pass
    raise InputError(f"{name} is not a number from {low:g} to {high:g}")


def style_options(style: Any, strength: Any, size: Any, keep_colors: Any, stroke: Any = 0) -> StyleOptions:
    """The options that the controls of a tab name. A stroke of 0 is ``"auto"``.

    Raises:
        InputError: one cannot be used.
    """
    side = int(number(size, SMALLEST_SIDE, LARGEST_SIDE, "the size"))
    large = "auto" if stroke == 0 else number(stroke, SMALLEST_STROKE, LARGEST_STROKE, "the stroke size")
    return StyleOptions(str(style), number(strength, 0, 1, "the strength"), side, bool(keep_colors), large)


def sentence_of(error: BaseException, studio: Studio) -> str:
    """What the page says of an error."""
    if isinstance(error, Cancelled):
        return "Cancelled."
    if isinstance(error, MemoryError) or "memory" in str(error):
        return "There is not enough memory; try a smaller size."
    if isinstance(error, OSError):
        return studio.sentence(f"the server cannot write a file: {error.strerror or error}")
    return studio.sentence(str(error))


def with_message(studio: Studio, empty: list[Any], work: Callable[[], list[Any]]) -> list[Any]:
    """What ``work`` returns with an empty message after it, or ``empty`` with a sentence about what went wrong.

    The message is HTML.
    """
    try:
        return [*work(), ""]
    except (Cancelled, InputError, OSError, MemoryError, RuntimeError, ArithmeticError) as error:
        return [*empty, html.escape(sentence_of(error, studio), quote=False)]
