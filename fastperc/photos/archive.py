"""Paints photos with a network from an archive; see :mod:`fastperc.archives`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fastperc.archives import Archive, first_line
from fastperc.engine import stroke as strokes
from fastperc.errors import InputError
from fastperc.progress import Watch, unwatched
from fastperc.types import Window

ODD, EVEN = (131, 157), (160, 192)  # sizes, height and width, of the images that a network is tried with
MULTIPLE = 32  # that a network may need the sides of images to be of
BEYOND = 8.0  # no picture in 0–1 has such values


class ArchivePainter:
    """Paints whole pictures: RGB in 0–1 [1, 3, H, W] in, the same ``scale`` times as large out.

    The network is tried on a random image first. If it cannot take images with odd sides, photos are continued at the
    right and bottom up to a multiple of 32 pixels, and the pictures cropped.

    Raises:
        InputError: it is no network from image to image.
    """

    def __init__(self, archive: Archive) -> None:
        self.archive, self.multiple = archive, 1
        self.size = self._fixed_size()
        if self.size is not None:
            self.scale = self._tried(self.size)
            return
        try:
            self.scale = self._tried(ODD)
        except InputError:
            self.multiple, self.scale = MULTIPLE, self._tried(EVEN)

    def tiles(
        self,
        image: Tensor,
        tile: int | str = "auto",
        dtype: torch.dtype | None = None,
        watch: Watch = unwatched,
        stroke: float | str = 1,
    ) -> Iterator[tuple[Window, Tensor]]:
        """Yields the whole picture as one tile, or with another stroke than 1 in bands of rows.

        See :meth:`fastperc.engine.engine.Engine.tiles`.

        Args:
            image: levels, uint8 [H, W, 3].
            tile: ``"auto"`` or ``"off"``.
            dtype: of the picture. Default: the network's.
            watch: shows progress.
            stroke: see the engine. ``"auto"`` is 1 for a network that takes images of one size only.

        Raises:
            ValueError: no such stroke; another than 1 for a network that enlarges.
            InputError: tiles are asked for; the network cannot take the photo; not enough memory.
        """
        if self.scale != 1 and stroke != 1:
            raise ValueError(f"a network that enlarges takes no stroke but 1, got {stroke!r}")
        if tile not in ("auto", "off"):
            raise InputError("a network from an archive paints the whole photo at once; leave --tile out")
        height, width, _ = image.shape
        size = strokes.painted_size(height, width, 1 if stroke == "auto" and self.size is not None else stroke)
        if size == (height, width):
            yield from self._painted(image, dtype, watch)
        else:
            dtype = dtype or self.archive.dtype
            yield from strokes.tiles(
                image.permute(2, 0, 1)[None], size, dtype, lambda x: self._painted(x[0].permute(1, 2, 0), None, watch)
            )

    def _painted(self, image: Tensor, dtype: torch.dtype | None, watch: Watch) -> Iterator[tuple[Window, Tensor]]:
        """The picture of ``image``, uint8 [H, W, 3], as one tile."""
        height, width, _ = image.shape
        if self.size not in (None, (height, width)):
            rows, columns = self.size or (0, 0)
            raise InputError(
                f"{self.archive.path}: takes {columns}×{rows} pixels only, the photo has {width}×{height}; "
                "resize the photo, or export the network with dynamic sizes"
            )
        for _ in watch(range(1), "painting", 1):
            x = image.permute(2, 0, 1)[None].to(self.archive.device, self.archive.dtype) / 255
            right, bottom = -width % self.multiple, -height % self.multiple
            y = self._picture(F.pad(x, (0, right, 0, bottom), mode="replicate") if right or bottom else x)
        y = y[..., : height * self.scale, : width * self.scale].to(dtype or y.dtype)
        yield Window(0, 0, height * self.scale, width * self.scale), y

    def _fixed_size(self) -> tuple[int, int] | None:
        """Height and width of the only images that it takes, or ``None``."""
        shape = self.archive.shape
        if shape and (len(shape) != 4 or shape[0] not in (1, None) or shape[1] not in (3, None)):
            sizes = ["any" if size is None else str(size) for size in shape]
            raise InputError(f"{self.archive.path}: takes [{', '.join(sizes)}], not an RGB image [1, 3, H, W]")
        sides = shape[2:]
        if not sides or sides == (None, None):
            return None
        if None in sides:
            raise InputError(f"{self.archive.path}: only one side of its images may vary; export it with both dynamic")
        height, width = sides
        assert height is not None and width is not None
        return height, width

    def _tried(self, size: tuple[int, int]) -> int:
        """The scale of the picture that it gives for an image of ``size``."""
        random = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
        y = self._picture(random.to(self.archive.device, self.archive.dtype), tried=True)
        return y.shape[2] // size[0]

    @torch.no_grad()
    def _picture(self, x: Tensor, tried: bool = False) -> Tensor:
        """What the network makes of ``x`` [1, 3, H, W]: [1, 3, s·H, s·W] with a whole s, of ``scale`` unless it is
        ``tried``."""
        path, (height, width) = self.archive.path, x.shape[2:]
        try:
            y = self.archive.call(x)
        except (torch.OutOfMemoryError, MemoryError):
            raise InputError(f"not enough memory for {width}×{height} at once; make the photo smaller") from None
        except Exception as error:  # somebody's network can raise anything
            if "can't allocate memory" in str(error):
                raise InputError(f"not enough memory for {width}×{height} at once; make the photo smaller") from None
            raise InputError(f"{path}: cannot take an RGB image of {width}×{height} ({first_line(error)})") from None
        if not isinstance(y, Tensor):
            raise InputError(
                f"{path}: gives a {type(y).__name__}, not an image; export a network that gives one tensor"
            )
        if y.dim() != 4 or y.shape[:2] != (1, 3) or not y.is_floating_point():
            raise InputError(f"{path}: gives {_described(y)}, not an RGB image [1, 3, H, W]")
        scale = y.shape[2] // height if tried else self.scale
        if scale < 1 or y.shape[2:] != (scale * height, scale * width):
            reason = "which is no whole number of times as large"
            if not tried:
                reason = "a traced network may keep the size of its example: script it, or use torch.export"
            raise InputError(f"{path}: gives {y.shape[3]}×{y.shape[2]} for {width}×{height}; {reason}")
        low, high = (extreme.item() for extreme in y.aminmax())
        if max(-low, high) > BEYOND:
            raise InputError(
                f"{path}: gives values from {low:.4g} to {high:.4g}; a network in an archive must take and give RGB in "
                "0–1, so put the scaling into the network before exporting it"
            )
        return y


def _described(y: Tensor) -> str:
    dtype = "" if y.is_floating_point() else f" of {str(y.dtype).removeprefix('torch.')}"
    return f"{list(y.shape)}{dtype}"
