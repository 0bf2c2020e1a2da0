"""Paints parts of a picture that masks choose, each with its own network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageChops, ImageOps
from torch import Tensor

from fastperc import reference
from fastperc.engine.frames import EIGHT_BIT_MODES, given
from fastperc.files import PathLike
from fastperc.photos.jobs import Painter, paint_tiles
from fastperc.photos.photo import read_first_frame
from fastperc.photos.stylize import stylize_levels
from fastperc.progress import Watch, unwatched
from fastperc.types import Window

Mask = PathLike | Image.Image | np.ndarray
WHITE = 255


def read_mask(path: PathLike) -> Image.Image:
    """Reads an image file as a mask, mode L: its lightness, upright, where transparent parts count as black.

    Raises:
        InputError: the file is missing, unreadable, not an image or cut short.
    """
    photo = read_first_frame(path)
    lightness = photo.rgb.convert("L")
    return lightness if photo.alpha is None else ImageChops.multiply(lightness, photo.alpha)


def as_mask(mask: Mask) -> Image.Image:
    """``mask`` as an image of mode L.

    Args:
        mask: a file; an image, which may have colours and alpha; or levels, uint8 [H, W].

    Raises:
        InputError: the file cannot be read.
        ValueError: an array of another shape or dtype, or an image of more than eight bits.
    """
    if isinstance(mask, np.ndarray):
        if mask.dtype != np.uint8 or mask.ndim != 2 or not mask.size:
            raise ValueError(f"expected a mask of uint8 levels [H, W], got {mask.dtype} {list(mask.shape)}")
        return Image.fromarray(mask)
    if not isinstance(mask, Image.Image):
        return read_mask(mask)
    if mask.mode not in EIGHT_BIT_MODES:
        raise ValueError(f"a mask of mode {mask.mode} has no known range; convert it to L, or give its path")
    mask = ImageOps.exif_transpose(mask)
    if not mask.has_transparency_data:
        return mask.convert("L")
    rgba = mask.convert("RGBA")
    return ImageChops.multiply(rgba.convert("RGB").convert("L"), rgba.getchannel("A"))


class MaskedPainter:
    """Paints with several networks, each where its mask is white. Where every mask is black, the photo shows.

    Gray parts of a mask blend. Where masks overlap and their sum is above white, they share the place in proportion. A
    mask is stretched to the size of the picture. All white, it changes nothing; all black, the photo stays as it is.

    Only levels are kept of the whole picture, one byte a pixel for each mask; blending is done tile by tile. Each
    network but the last rounds to levels, so that with several a soft edge may be one level off.

    Args:
        layers: pairs of a painter that keeps the size, such as a frozen style network, and its mask, see
            :func:`as_mask`.

    Raises:
        InputError: a mask cannot be read.
        ValueError: no pair, or a painter that enlarges.
    """

    scale = 1

    def __init__(self, layers: Sequence[tuple[Painter, Mask]]) -> None:
        if not layers or any(painter.scale != self.scale for painter, _ in layers):
            raise ValueError("expected pairs of a painter that keeps the size and a mask")
        self.painters = [painter for painter, _ in layers]
        self.masks = [as_mask(mask) for _, mask in layers]
        self._resized: tuple[tuple[int, int], list[Tensor]] = (0, 0), []  # a size, and the masks in that size

    def __call__(
        self,
        image: Any,
        strength: float = 1.0,
        keep_colors: bool = False,
        tile: int | str = "auto",
        stroke: float | str = 1,
    ) -> Any:
        """The painting of an image, as an engine returns it.

        Args:
            image: levels, uint8 [H, W, 3], as a tensor or a NumPy array; a PIL image; or the path of an image file.
            strength, keep_colors, tile, stroke: see :func:`fastperc.photos.stylize.stylize`.

        Raises:
            ValueError: another shape or dtype.
            InputError: there is not enough memory, or a file cannot be read.
        """
        levels, like = given(image)
        if levels.dtype != torch.uint8 or levels.dim() != 3 or levels.shape[2] != 3:
            raise ValueError(f"expected one image of uint8 levels [H, W, 3], got {levels.dtype} {list(levels.shape)}")
        return like(stylize_levels(self, levels, strength, keep_colors, tile, stroke=stroke))

    def tiles(
        self,
        image: Tensor,
        tile: int | str = "auto",
        dtype: torch.dtype | None = None,
        watch: Watch = unwatched,
        stroke: float | str = 1,
    ) -> Iterator[tuple[Window, Tensor]]:
        """Yields the tiles of the last network, blended with the photo and the other networks' pictures.

        Args:
            image: levels, uint8 [H, W, 3].
            tile, watch, stroke: see :meth:`fastperc.engine.engine.Engine.tiles`. Masks keep the image's size.
            dtype: of the tiles, RGB in 0–1 [1, 3, h, w]. Default: float32.
        """
        masks = self._masks_of_size(image.shape[1], image.shape[0])
        canvas = image if len(masks) == 1 else image.clone()
        for number, painter in enumerate(self.painters):
            for rows, columns, y in paint_tiles(painter, image, tile, watch, stroke):
                y = _over(canvas[rows, columns], y, _share([mask[rows, columns] for mask in masks], number))
                if number == len(masks) - 1:
                    yield Window(rows.start, columns.start, *y.shape[2:]), y.to(dtype or torch.float32)
                else:
                    canvas[rows, columns] = reference.to_levels(y)[0].permute(1, 2, 0)
                del y  # the tile may be the whole picture, and the next network needs the memory

    def _masks_of_size(self, width: int, height: int) -> list[Tensor]:
        """The masks, each uint8 [H, W]. The frames of a clip share those of one size."""
        if self._resized[0] != (width, height):
            # Bilinear: its values stay between those of the mask, so that white stays white and black stays black.
            images = [mask.resize((width, height), Image.Resampling.BILINEAR) for mask in self.masks]
            self._resized = (width, height), [torch.from_numpy(np.array(image)) for image in images]
        return self._resized[1]


def _over(levels: Tensor, y: Tensor, share: Tensor) -> Tensor:
    """``y``, RGB in 0–1 [1, 3, h, w], over ``levels``, uint8 [h, w, 3], as far as ``share``, [h, w], says."""
    x = levels.permute(2, 0, 1)[None].to(y.device).float() / WHITE
    return torch.lerp(x, y, share.to(y.device))


def _share(masks: Sequence[Tensor], number: int) -> Tensor:
    """How much of painting ``number`` goes over what was painted before it, from 0 to 1: float32 [h, w].

    Painting k has the weight mₖ / max(Σm, 255) in the end. What is painted after it covers it, so that here it takes
    that weight's part of what the later ones leave.
    """
    total = torch.zeros(masks[0].shape)
    for mask in masks:
        total += mask
    left = total.clamp_(min=WHITE)
    for mask in masks[number + 1 :]:
        left -= mask
    return masks[number] / left.clamp_(min=1)  # nothing is left only where this mask is black
