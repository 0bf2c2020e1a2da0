"""Pictures in tiles, equal to the whole: where to cut, and how an instance norm gets the statistics of the whole map.

A tile of the picture needs a part of each map, with a halo that grows from layer to layer; see
``fastperc.engine.plan``. Batch norm needs no more. An instance norm is measured first, over the whole map, and then is
a batch norm. To measure each layer from the image on would take long, so the small maps, between the last layer
that halves the size and the first that doubles it, are kept in a file.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastperc import ops, reference
from fastperc.engine.plan import Plan, Step, forward, parts
from fastperc.errors import InputError
from fastperc.types import Window


def grid(height: int, width: int, side: int, multiple: int = 4) -> list[Window]:
    """Tiles of a map, about equal, at most ``side`` pixels high and wide, rounded up to a ``multiple``; each begins at
    a multiple."""

    def cuts(size: int) -> list[tuple[int, int]]:
        step = math.ceil(size / math.ceil(size / side))
        step += -step % multiple
        return [(start, min(step, size - start)) for start in range(0, size, step)]

    return [Window(top, left, h, w) for top, h in cuts(height) for left, w in cuts(width)]


class Canvas:
    """One image [1, 3, H, W] on its way through a plan, tile by tile; its instance norms are measured first."""

    def __init__(self, plan: Plan, image: Tensor, side: int) -> None:
        self.plan, self.image = plan, image
        self.sizes = plan.sizes(*image.shape[2:])
        self.steps = list(plan.steps)
        self.start = 0  # the first step whose input is not kept
        self.maps: dict[int, Map] = {}  # those kept, by number: map i is the input of step i
        # The steps with an instance norm, and tiles of their outputs, each about as much of the image as a tile is.
        self.to_measure = {
            i: grid(*self.sizes[i + 1], max(side * self.sizes[i + 1][1] // self.sizes[0][1], 1))
            for i, step in enumerate(self.steps)
            if step.norm is not None
        }

    def measure(self, ticks: Iterator[object]) -> None:
        """Folds each instance norm into its step; takes one of ``ticks`` for each tile of ``to_measure``."""
        for i, regions in self.to_measure.items():
            self._measure(i, regions, ticks)

    def paint(self, region: Window, picture: Tensor) -> None:
        """Fills ``picture`` with the ``region`` of the result."""
        self._run(self.steps[self.start :], region, picture)

    def _run(self, steps: list[Step], region: Window, picture: Tensor | None = None) -> Tensor:
        """``steps``, from ``start`` on, for ``region`` of the last one's output."""
        doing = parts(steps, self.sizes[self.start :], region)
        x = self.maps[self.start].read(doing[0].source).to(self.image.device) if self.start else self.image
        return forward(self.plan, steps, doing, x, picture)

    def _measure(self, i: int, regions: list[Window], ticks: Iterator[object]) -> None:
        """Folds the instance norm of step ``i`` into it, and keeps its output if that is small."""
        step = self.steps[i]
        bare = step._replace(norm=None, activation=None, skip=False)
        kept = Map(step.channels, *self.sizes[i + 1], self.plan.dtype) if self._is_small(i + 1) else None
        count, mean, m2 = 0, torch.zeros(()), torch.zeros(())
        for region in regions:
            next(ticks)
            y = self._run([*self.steps[self.start : i], bare], region)
            if kept is not None:
                kept.write(region, y)
            mean_here, m2_here = ops.instance_statistics(y)[0].cpu().double()
            here = region.height * region.width  # Chan's formula
            count, before = count + here, count
            mean, m2 = (
                mean + (mean_here - mean) * here / count,
                m2 + m2_here + (mean_here - mean) ** 2 * before * here / count,
            )
        variance = m2 / count
        self.steps[i] = step.with_statistics(mean, variance)
        if kept is not None:
            for region in regions:
                y = kept.read(region).to(self.image.device)
                kept.write(region, self._normalised(i, step, y, region, mean, variance))
            self.maps[i + 1], self.start = kept, i + 1
            needed = i if i + 1 < len(self.steps) and self.steps[i + 1].skip else i + 1
            self.maps = {number: kept for number, kept in self.maps.items() if number >= needed}

    def _is_small(self, number: int) -> bool:
        """Whether a map lies between the last step that halves the size and the first that doubles it."""
        before, after = self.plan.steps[:number], self.plan.steps[number:]
        halves, doubles = [step.stride > 1 for step in after], [step.upsample is not None for step in before]
        return any(step.stride > 1 for step in before) and not any(halves) and not any(doubles)

    def _normalised(self, i: int, step: Step, y: Tensor, region: Window, mean: Tensor, variance: Tensor) -> Tensor:
        """The output of step ``i``, from that without norm, activation and skip."""
        assert step.norm is not None
        wide = torch.promote_types(y.dtype, torch.float32)
        mean, variance = mean.to(wide).to(y.device), variance.to(wide).to(y.device)
        y = F.batch_norm(y.to(wide), mean, variance, step.norm.weight, step.norm.bias, eps=step.norm.eps)
        if step.skip:
            y += self.maps[i - 1].read(step.added(region)).to(y.device)
        return reference.activate(y, step.activation).to(self.plan.dtype)


class Map:
    """A map [1, C, H, W] in a temporary file that is deleted with it.

    Raises:
        InputError: the disk has no room for it.
    """

    def __init__(self, channels: int, height: int, width: int, dtype: torch.dtype) -> None:
        self.channels, self.width, self.dtype = channels, width, dtype
        self.pixel = channels * dtype.itemsize  # bytes
        folder, size = tempfile.gettempdir(), height * width * self.pixel
        free = shutil.disk_usage(folder).free
        if size > free:
            raise InputError(
                f"{folder}: a temporary file of {size / 1e9:.1f} GB is needed, {free / 1e9:.1f} GB are free; "
                f"set TMPDIR to a folder with more"
            )
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the map
        self._file.truncate(size)

    def read(self, region: Window) -> Tensor:
        """[1, C, height, width], channels-last."""
        content = np.empty((region.height, region.width * self.pixel), dtype=np.uint8)
        for row, offset in zip(content, self._offsets(region)):
            self._file.seek(offset)
            self._file.readinto(row.data)
        pixels = torch.from_numpy(content).view(self.dtype).view(region.height, region.width, self.channels)
        return pixels.permute(2, 0, 1)[None]

    def write(self, region: Window, x: Tensor) -> None:
        """Stores ``x``, in the form that :meth:`read` returns."""
        rows = x[0].permute(1, 2, 0).flatten(1).contiguous().cpu().view(torch.uint8).numpy()
        for row, offset in zip(rows, self._offsets(region)):
            self._file.seek(offset)
            self._file.write(row.data)

    def _offsets(self, region: Window) -> list[int]:
        """The offset in the file of each row of the region."""
        rows = range(region.top, region.top + region.height)
        return [(row * self.width + region.left) * self.pixel for row in rows]
